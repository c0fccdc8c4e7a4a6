"""Kernel families: what users define, and any ``AdaptiveConv1d/2d/3d`` takes in place of a kernel size."""

from __future__ import annotations

from adaptconv.kernels.base import Family, Slot
from adaptconv.kernels.grid import FixedTaps, Grid, dilate

__all__ = ["Family", "FixedTaps", "Grid", "Slot", "dilate"]
