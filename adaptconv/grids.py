"""Regular grids in a set of offsets: what a pattern must be, or be covered by, to run natively."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Offset = tuple[int, ...]
Offsets = tuple[Offset, ...]
_STEPS_TRIED = {1: 12, 2: 6, 3: 4}  # dilations tried an axis when covering
_STARTS_TRIED = 64


@dataclass(frozen=True, slots=True)
class Grid:
    """A regular lattice of taps inside a window.

    Attributes:
        origin: offset of the first tap, one integer an axis.
        size: taps along each axis.
        dilation: step between neighbouring taps along each axis (1 where ``size`` is 1).
        taps: for each lattice point in row-major order, the index of the tap of the pattern that
            it carries, or -1 where an earlier grid of the same cover already carries it (its
            weight in this grid is then zero).
    """

    origin: Offset
    size: Offset
    dilation: Offset
    taps: tuple[int, ...]

    @property
    def extent(self) -> Offset:
        """Dense extent of the lattice along each axis: ``(size - 1) * dilation + 1``."""
        return tuple((s - 1) * d + 1 for s, d in zip(self.size, self.dilation, strict=True))


def _progression(values: Sequence[int]) -> tuple[int, int, int] | None:
    """(first, count, step) if the sorted distinct values are equally spaced."""
    if len(values) == 1:
        return values[0], 1, 1
    step = values[1] - values[0]
    if all(b - a == step for a, b in itertools.pairwise(values)):
        return values[0], len(values), step
    return None


def single_grid(offsets: Offsets) -> Grid | None:
    """Sorted offsets as one regular grid; None if they are not one, or none at all."""
    if not offsets:
        return None
    axes = []
    for axis in range(len(offsets[0])):
        progression = _progression(sorted({offset[axis] for offset in offsets}))
        if progression is None:
            return None
        axes.append(progression)
    origin, size, dilation = (tuple(part) for part in zip(*axes, strict=True))
    if math.prod(size) != len(offsets):
        return None  # the projections are regular but the taps do not fill their product
    return Grid(origin, size, dilation, tuple(range(len(offsets))))


def cover(offsets: Offsets, limit: int) -> tuple[Grid, ...] | None:
    """Few regular grids that own every offset once (greedy, largest gain first); None past ``limit``."""
    whole = single_grid(offsets)
    if whole is not None:
        return (whole,)
    index = {offset: t for t, offset in enumerate(offsets)}
    left = set(offsets)
    grids: list[Grid] = []
    while left:
        if len(grids) == limit:
            return None
        widest = _widest(offsets, left)
        if widest is None:
            return None
        origin, size, dilation = widest
        points = list(_lattice(origin, size, dilation))
        grids.append(Grid(origin, size, dilation, tuple(index[p] if p in left else -1 for p in points)))
        left.difference_update(points)
    return tuple(grids)


def _lattice(origin: Offset, size: Offset, dilation: Offset) -> Iterable[Offset]:
    return itertools.product(*(range(o, o + s * d, d) for o, s, d in zip(origin, size, dilation, strict=True)))


def _widest(offsets: Offsets, left: set[Offset]) -> tuple[Offset, Offset, Offset] | None:
    """The grid of taps that owns most of what is left, fewest wasted points on a tie."""
    taps = set(offsets)
    axes = len(offsets[0])
    sample = list(itertools.islice(offsets, 64))
    steps = [
        sorted({abs(a[axis] - b[axis]) for a in left for b in sample} - {0})[: _STEPS_TRIED[axes]] or [1]
        for axis in range(axes)
    ]
    best: tuple[int, int, Offset, Offset, Offset] | None = None
    for dilation in itertools.product(*steps):
        starts = {
            o
            for o in taps
            if not any(_moved(o, axis, -d) in taps for axis, d in enumerate(dilation))
            and any(_moved(o, axis, d) in taps for axis, d in enumerate(dilation))
        }
        if len(starts) > _STARTS_TRIED:
            continue  # scattered at this step: no grid here owns more than a few taps
        for origin in sorted(starts | set(itertools.islice(sorted(left), 16))):
            size = _grow(taps, origin, dilation)
            owned = sum(p in left for p in _lattice(origin, size, dilation))
            candidate = (owned, -math.prod(size), origin, size, dilation)
            if best is None or candidate[:2] > best[:2]:
                best = candidate
    if best is None:
        return None
    _, _, origin, size, dilation = best
    return origin, size, tuple(d if s > 1 else 1 for d, s in zip(dilation, size, strict=True))


def _moved(offset: Offset, axis: int, by: int) -> Offset:
    return (*offset[:axis], offset[axis] + by, *offset[axis + 1 :])


def _grow(taps: set[Offset], origin: Offset, dilation: Offset) -> Offset:
    """Largest lattice of taps from an origin, growing every axis in turn while it fits."""
    size = [1] * len(origin)
    growing = True
    while growing:
        growing = False
        for axis in range(len(origin)):
            size[axis] += 1
            if all(p in taps for p in _lattice(origin, tuple(size), dilation)):
                growing = True
            else:
                size[axis] -= 1
    return tuple(size)
