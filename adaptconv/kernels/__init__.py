"""Kernel families: what users define, and any ``AdaptiveConv1d/2d/3d`` takes in place of a kernel size.

Importing loads what every layer needs; the other families come when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptconv.kernels.base import Family, Slot
from adaptconv.kernels.grid import FixedTaps, Grid, dilate

if TYPE_CHECKING:
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

_LATER = {
    "Interpolated": "interpolated",
    "LearnableSpacing": "spacing",
    "Masked": "masked",
    "PartiallyDilated": "partial",
    "Symmetric": "symmetric",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'adaptconv.kernels' has no attribute {name!r}; families: {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(f"adaptconv.kernels.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
