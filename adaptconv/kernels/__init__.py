"""Kernel families: what users define, and any ``AdaptiveConv1d/2d/3d`` takes in place of a kernel size."""

from __future__ import annotations

from adaptconv.kernels.base import Family, Slot
from adaptconv.kernels.grid import FixedTaps, Grid, dilate
from adaptconv.kernels.interpolated import Interpolated
from adaptconv.kernels.masked import Masked
from adaptconv.kernels.partial import PartiallyDilated
from adaptconv.kernels.spacing import LearnableSpacing
from adaptconv.kernels.symmetric import Symmetric

__all__ = [
    "Family",
    "FixedTaps",
    "Grid",
    "Interpolated",
    "LearnableSpacing",
    "Masked",
    "PartiallyDilated",
    "Slot",
    "Symmetric",
    "dilate",
]
