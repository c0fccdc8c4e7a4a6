"""The text of a tap pattern: a grid ``3x3d2x2`` or a mask ``010/111/010``, then maybe a footprint or a density.

The footprint is written ``*0.5,1,0.5``, one filter an axis; the density ``~0.5``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from adaptconv.errors import ConvArgumentError
from adaptconv.grids import Offset, Offsets, single_grid

Footprint = tuple[tuple[float, ...], ...]
MAX_AXES = 3


def written(offsets: Offsets, window: Offset, footprint: Footprint | None, density: float) -> str:
    """Canonical text of a pattern: equal patterns have equal text."""
    if footprint is None:
        return _core(offsets, window) + ("" if density == 1 else f"~{density:.17g}")
    core = tuple(w - len(f) + 1 for w, f in zip(window, footprint, strict=True))
    filters = [",".join(f"{value:.17g}" for value in axis_filter) for axis_filter in footprint]
    return f"{_core(offsets, core)}*{'x'.join(filters)}"


def _core(offsets: Offsets, window: Offset) -> str:
    grid = single_grid(offsets)
    if grid is not None and grid.extent == window:
        text = "x".join(map(str, grid.size))
        if any(d != 1 for d in grid.dilation) or set(text) <= {"0", "1"}:
            text += "d" + "x".join(map(str, grid.dilation))
        return text
    taps = set(offsets)
    axes = len(window)
    padded = (1,) * (MAX_AXES - axes) + tuple(window)
    planes = []
    for z in range(padded[0]):
        rows = []
        for y in range(padded[1]):
            rows.append("".join("1" if (z, y, x)[MAX_AXES - axes :] in taps else "0" for x in range(padded[2])))
        planes.append("/".join(rows))
    text = "//".join(planes)
    # A mask with a single row or plane says its rank by a trailing separator.
    separator = {1: "", 2: "/", 3: "//"}[axes]
    return text if separator in text else text + separator


def read_footprint(text: str, axes: int) -> Footprint:
    """What follows the ``*``.

    Raises:
        ConvArgumentError: it is not one filter an axis.
    """
    try:
        footprint = tuple(tuple(float(value) for value in part.split(",")) for part in text.split("x"))
    except ValueError:
        footprint = ()
    if len(footprint) != axes or not all(math.isfinite(value) for part in footprint for value in part):
        raise ConvArgumentError(
            f"cannot read the footprint {text!r}: expected {axes} filters such as '0.5,1,0.5', joined by 'x'"
        )
    return footprint


def read_density(text: str) -> float:
    """What follows the ``~``.

    Raises:
        ConvArgumentError: it is no number.
    """
    try:
        return float(text)
    except ValueError:
        raise ConvArgumentError(f"cannot read the density {text!r}: expected a share such as '0.125'") from None


def read_mask(text: str) -> list[list[list[int]]]:
    """A mask's planes of rows of 0 and 1."""
    return [[[int(c) for c in row] for row in plane.split("/")] for plane in text.rstrip("/").split("//")]


def read_grid(text: str) -> tuple[Sequence[int], Sequence[int]]:
    """Size and dilation of a grid.

    Raises:
        ConvArgumentError: it is no grid.
    """
    size_text, _, dilation_text = text.partition("d")
    try:
        size = tuple(int(part) for part in size_text.split("x"))
        dilation = tuple(int(part) for part in dilation_text.split("x")) if dilation_text else (1,) * len(size)
    except ValueError:
        raise ConvArgumentError(
            f"cannot read tap pattern {text!r}: expected a mask such as '10101/11111' or a grid such as '3x3d2x2'"
        ) from None
    return size, dilation
