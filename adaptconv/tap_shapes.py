"""Where the taps of known shapes sit, as plain integers: partially dilated kernels, masks, patterns in one window."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from adaptconv.errors import ConvArgumentError
from adaptconv.grids import Offset, Offsets


def per_axis(value: int | Sequence[int], axes: int, name: str, least: int = 1) -> Offset:
    """A setting given as an int or as one int an axis, spelled out.

    Raises:
        ConvArgumentError: another number of ints, or a value below ``least``.
    """
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or not all(isinstance(v, int) and v >= least for v in values):
        raise ConvArgumentError(f"{name} must be an int or {axes} ints of at least {least}, got {value!r}")
    return values


def grid_offsets(size: Offset, dilation: Offset) -> tuple[Offsets, Offset]:
    """Offsets and window of one regular grid."""
    offsets = itertools.product(*(range(0, s * d, d) for s, d in zip(size, dilation, strict=True)))
    return tuple(offsets), tuple((s - 1) * d + 1 for s, d in zip(size, dilation, strict=True))


def partial_offsets(
    island: int | Sequence[int], wing: int | Sequence[int], dilation: int | Sequence[int], axes: int | None
) -> tuple[Offsets, Offset]:
    """Offsets and window of a dense island with dilated wings.

    Raises:
        ConvArgumentError: settings that do not fit together, or an even island.
    """
    lengths = [len(v) for v in (island, wing, dilation) if not isinstance(v, int)]
    rank = lengths[0] if lengths else (axes or 1)
    islands = per_axis(island, rank, "island")
    wings = per_axis(wing, rank, "wing", least=0)
    dilations = per_axis(dilation, rank, "dilation")
    if any(width % 2 == 0 for width in islands):
        raise ConvArgumentError(f"the island of a partially dilated kernel must be odd on every axis, got {islands}")
    halves = [width // 2 for width in islands]
    reach = [half // d + w for half, d, w in zip(halves, dilations, wings, strict=True)]
    radius = [max(half, r * d) for half, r, d in zip(halves, reach, dilations, strict=True)]
    dense = itertools.product(*(range(c - h, c + h + 1) for c, h in zip(radius, halves, strict=True)))
    wide = itertools.product(
        *(range(c - r * d, c + r * d + 1, d) for c, r, d in zip(radius, reach, dilations, strict=True))
    )
    return tuple(set(dense) | set(wide)), tuple(2 * c + 1 for c in radius)


def mask_offsets(mask: Any) -> tuple[Offsets, Offset]:
    """The non-zero positions of a mask (nested sequences, a NumPy array or a tensor), and its extents.

    Raises:
        ConvArgumentError: a ragged mask.
    """
    nested = mask.tolist() if hasattr(mask, "tolist") else mask
    window: list[int] = []
    level = nested
    while isinstance(level, (list, tuple)):
        window.append(len(level))
        level = level[0] if level else 0
    offsets: list[Offset] = []

    def walk(part: Any, prefix: Offset) -> None:
        if len(prefix) == len(window):
            if part:
                offsets.append(prefix)
            return
        if not isinstance(part, (list, tuple)) or len(part) != window[len(prefix)]:
            raise ConvArgumentError("a tap mask must be rectangular: every row of an axis has the same length")
        for i, item in enumerate(part):
            walk(item, (*prefix, i))

    walk(nested, ())
    return tuple(offsets), tuple(window)


def rounded_density(share: float) -> float:
    """A share in (0, 1], rounded up to two significant bits (1, 3/4, 1/2, 3/8, ...): few values, so that records meet.

    Raises:
        ConvArgumentError: a share out of range.
    """
    if not 0 < share <= 1:
        raise ConvArgumentError(f"the density of a pattern is a share above 0 and at most 1, got {share!r}")
    share = max(share, 2.0**-10)
    step = 2.0 ** (math.frexp(share)[1] - 2)
    return min(1.0, math.ceil(share / step) * step)
