"""What is to be multiplied with what: boxes of results, each with the taps that reach the input from there.

Integers alone, kept by problem: no tensors, no tiles' contents.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

from adaptconv.backends.triton.geometry import geometry
from adaptconv.problem import Direction, Problem

MOST_JOBS = 128  # the kernel finds its own among so many
_MOST_ENDS = 40  # ends of segments tried along an axis: their pairs are walked
_WORTH = 0.97  # more boxes must leave no more than this share of the products


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis: the result at ``first + pitch * q`` reads, through tap i, ``step * q + offsets[i]``.

    Attributes:
        source: places that are read; zeros lie outside.
        target: places that are written.
        step: places of the source a count.
        pitch: places of the target a count.
        offsets: one for each tap, for ``first = 0``.
    """

    source: int
    target: int
    step: int
    pitch: int
    offsets: tuple[int, ...]

    @property
    def still(self) -> bool:
        """Whether a result reads just its own place: nothing moves along the axis."""
        return self.source == self.target and self.step == self.pitch == 1 and not any(self.offsets)


@dataclass(frozen=True, slots=True)
class Sweep:
    """A problem on as few axes as it needs: still ones are merged into their neighbours or into the batch.

    Attributes:
        batch: images, with what was merged into them.
        axes: one to three.
        taps: indices in the compact weight of the taps that count.
    """

    batch: int
    axes: tuple[Axis, ...]
    taps: tuple[int, ...]

    @property
    def sources(self) -> int:
        """Places an image that are read."""
        return math.prod(axis.source for axis in self.axes)

    @property
    def targets(self) -> int:
        """Places an image that are written."""
        return math.prod(axis.target for axis in self.axes)


@dataclass(frozen=True, slots=True)
class Segment:
    """Counts along one axis: results at ``first + pitch * q`` for ``q < count``; the taps alive, and their offsets."""

    first: int
    count: int
    alive: frozenset[int]
    offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """A box of results: one segment an axis. ``taps`` are positions in ``Sweep.taps``."""

    segments: tuple[Segment, ...]
    taps: tuple[int, ...]

    @property
    def size(self) -> int:
        """Results an image."""
        return math.prod(segment.count for segment in self.segments)


@lru_cache(maxsize=1024)
def sweep(problem: Problem) -> Sweep:
    """FORWARD and GRAD_WEIGHT as they are; GRAD_INPUT with input and output exchanged, and offsets negated."""
    g = geometry(problem)
    axes = []
    for a in range(3):
        offsets = tuple(offset[a] for offset in g.offsets)
        if problem.direction is Direction.GRAD_INPUT:
            axes.append(Axis(g.out[a], g.size[a], 1, g.stride[a], tuple(-o for o in offsets)))
        else:
            axes.append(Axis(g.size[a], g.out[a], g.stride[a], 1, offsets))
    return _merged(Sweep(problem.batch, tuple(axes), g.live))


def _merged(whole: Sweep) -> Sweep:
    batch, axes = whole.batch, list(whole.axes)
    while len(axes) > 1 and axes[0].still:
        batch *= axes.pop(0).source
    for a in range(len(axes) - 1, 0, -1):
        before, last = axes[a - 1], axes[a]
        if last.still and before.step == before.pitch == 1:
            wide = tuple(o * last.source for o in before.offsets)
            axes[a - 1 : a + 1] = [Axis(before.source * last.source, before.target * last.source, 1, 1, wide)]
    return Sweep(batch, tuple(axes), whole.taps)


@lru_cache(maxsize=1024)
def jobs(problem: Problem, rows: int, cut: bool) -> tuple[Job, ...]:
    """Boxes that cover every result once, those with most taps first.

    Phases of a stride are always apart: each has taps of its own. With ``cut``, boxes are also cut where taps leave
    the input, along the axes where that saves products, counted in tiles of ``rows`` results.
    """
    s = sweep(problem)
    whole = [_phases(axis) for axis in s.axes]
    best = _boxes(whole, len(s.taps))
    if cut:
        finer = [
            [piece for phase in phases for piece in _cut(phase, axis, rows * axis.target / (s.batch * s.targets))]
            for phases, axis in zip(whole, s.axes, strict=True)
        ]
        bound = _WORTH * products(best, s.batch, rows)
        for choice in itertools.product((False, True), repeat=len(s.axes)):
            pieces = [fine if pick else coarse for pick, coarse, fine in zip(choice, whole, finer, strict=True)]
            if not any(choice) or math.prod(map(len, pieces)) > MOST_JOBS:
                continue
            boxes = _boxes(pieces, len(s.taps))
            count = products(boxes, s.batch, rows)
            if count <= bound:
                best, bound = boxes, count - 1
    return tuple(sorted(best, key=lambda job: -len(job.taps)))


def products(boxes: tuple[Job, ...], batch: int, rows: int) -> int:
    """Tiles times taps; a tile costs about a tap more to begin and end."""
    return sum(-(-batch * job.size // rows) * (len(job.taps) + 1) for job in boxes)


def phases(problem: Problem) -> int:
    """Boxes that a problem has at least."""
    return math.prod(min(axis.pitch, axis.target) for axis in sweep(problem).axes)


def _boxes(pieces: list[list[Segment]], taps: int) -> tuple[Job, ...]:
    boxes = []
    for segments in itertools.product(*pieces):
        alive = frozenset.intersection(*(segment.alive for segment in segments))
        boxes.append(Job(segments, tuple(t for t in range(taps) if t in alive)))
    return tuple(boxes)


def _phases(axis: Axis) -> list[Segment]:
    """One segment for each remainder of the pitch, with the taps whose source is a whole number of places away."""
    found = []
    for first in range(min(axis.pitch, axis.target)):
        count = -(-(axis.target - first) // axis.pitch)
        alive = frozenset(i for i, o in enumerate(axis.offsets) if (o + first) % axis.pitch == 0)
        offsets = tuple((o + first) // axis.pitch for o in axis.offsets)
        found.append(_narrowed(Segment(first, count, alive, offsets), axis))
    return found


def _narrowed(segment: Segment, axis: Axis) -> Segment:
    """Only the taps that reach the source from some count of the segment."""
    alive = set()
    for i in segment.alive:
        low, high = reach(segment.offsets[i], axis)
        if max(low, 0) < min(high, segment.count):
            alive.add(i)
    return replace(segment, alive=frozenset(alive))


def reach(offset: int, axis: Axis) -> tuple[int, int]:
    """Counts ``low <= q < high`` at which ``step * q + offset`` is inside the source."""
    return -(offset // axis.step), -((offset - axis.source) // axis.step)


def _cut(phase: Segment, axis: Axis, spare: float) -> list[Segment]:
    """The segments of a phase with the fewest products: the exact best over the places where a tap comes or goes.

    A segment pays, for each of its taps, its length and ``spare``: about half a tile is empty at each box's end.
    """
    limits = {i: reach(phase.offsets[i], axis) for i in phase.alive}
    ends = {end for limit in limits.values() for end in limit if 0 < end < phase.count}
    if len(ends) > _MOST_ENDS:
        ends = set(sorted(ends)[:: -(-len(ends) // _MOST_ENDS)])
    marks = [0, *sorted(ends), phase.count]
    distinct: dict[tuple[int, int], list[int]] = {}  # taps with one offset come and go together
    for i, limit in limits.items():
        distinct.setdefault(limit, []).append(i)
    cost: list[float] = [0.0]
    origin = [0]
    for b in range(1, len(marks)):
        choices = []
        for a in range(b):
            here = sum(len(taps) for (low, high), taps in distinct.items() if low < marks[b] and marks[a] < high)
            choices.append((cost[a] + (marks[b] - marks[a] + spare / 2) * here, a))
        least, a = min(choices)
        cost.append(least)
        origin.append(a)
    found = []
    b = len(marks) - 1
    while b > 0:
        a = origin[b]
        start = marks[a]
        offsets = tuple(o + start * axis.step for o in phase.offsets)
        piece = Segment(phase.first + start * axis.pitch, marks[b] - start, phase.alive, offsets)
        found.append(_narrowed(piece, axis))
        b = a
    return found[::-1]
