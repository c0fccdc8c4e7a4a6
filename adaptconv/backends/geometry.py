"""A problem's taps as the one grid that torch's convolution knows, with the padding that belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from adaptconv.problem import Padding, Problem
from adaptconv.taps import TapPattern


@dataclass(frozen=True, slots=True)
class Geometry:
    """A single-grid problem as torch's convolution wants it.

    Attributes:
        size: taps an axis.
        dilation: step an axis.
        padding: zeros (before, after) an axis; negative where the window's border holds no tap and
            reaches past the padding, so that the input is cropped.
    """

    size: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: Padding

    @property
    def symmetric(self) -> tuple[int, ...] | None:
        """Padding as torch takes it, or None if it is uneven or negative."""
        if all(before == after >= 0 for before, after in self.padding):
            return tuple(before for before, _ in self.padding)
        return None

    @property
    def pads(self) -> list[int]:
        """Padding as ``F.pad`` takes it."""
        return [zeros for pair in reversed(self.padding) for zeros in pair]


@lru_cache(maxsize=4096)
def _geometry(taps: TapPattern, padding: Padding) -> Geometry | None:
    grid = taps.single_grid()
    if grid is None:
        return None
    moved = tuple(
        (before - origin, after - (window - origin - extent))
        for (before, after), origin, window, extent in zip(padding, grid.origin, taps.window, grid.extent, strict=True)
    )
    return Geometry(grid.size, grid.dilation, moved)


def geometry(problem: Problem) -> Geometry | None:
    """The problem's taps as one grid with its own padding; None if they are not one grid."""
    return _geometry(problem.taps, problem.padding)
