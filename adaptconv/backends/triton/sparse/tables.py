"""The schedule as the kernels read it: rows of integers, and how many programs there are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from adaptconv.backends.triton.sparse.schedule import Axis, Sweep, jobs, reach, sweep
from adaptconv.problem import Problem

_WHOLE = 8  # places of a vector of 16 bytes, the longest
Rows = tuple[tuple[int, ...], ...]
_JOB_COUNTS = (1, 128)  # a kernel is compiled for each


@dataclass(frozen=True, slots=True)
class Products:
    """FORWARD and GRAD_INPUT in tables.

    Attributes:
        sweep: the problem on its axes.
        jobs: a row a job: first tile, extents z y x, base in the target, first tap, end of taps, 0.
        taps: a row a job and tap: offsets z y x, their sum in places of the source, index in the weight, 0, 0, 0.
        tiles: of all jobs.
        room: jobs the kernel is compiled for.
    """

    sweep: Sweep
    jobs: Rows
    taps: Rows
    tiles: int
    room: int


@dataclass(frozen=True, slots=True)
class Sums:
    """GRAD_WEIGHT in tables.

    Attributes:
        sweep: the problem on its axes.
        boxes: a row for so many taps together: see ``kernels.weight_product``.
        slots: for each tap of the problem its place among those that count, or -1.
    """

    sweep: Sweep
    boxes: Rows
    slots: tuple[int, ...]


def pitches(extents: list[int]) -> list[int]:
    """Places from one count to the next along each axis of a contiguous map."""
    steps = [1]
    for extent in reversed(extents[1:]):
        steps.append(steps[-1] * extent)
    return steps[::-1]


@lru_cache(maxsize=1024)
def products(problem: Problem, rows: int, cut: bool) -> Products:
    """Tables for tiles of so many rows."""
    s = sweep(problem)
    read, written = pitches([a.source for a in s.axes]), pitches([a.target for a in s.axes])
    lead = (1,) * (3 - len(s.axes))
    table: list[tuple[int, ...]] = []
    taps: list[tuple[int, ...]] = []
    tiles = 0
    for job in jobs(problem, rows, cut):
        base = sum(segment.first * pitch for segment, pitch in zip(job.segments, written, strict=True))
        extents = (*lead, *(segment.count for segment in job.segments))
        table.append((tiles, *extents, base, len(taps), len(taps) + len(job.taps), 0))
        for t in job.taps:
            offsets = [segment.offsets[t] for segment in job.segments]
            place = sum(o * pitch for o, pitch in zip(offsets, read, strict=True))
            taps.append((*(0,) * len(lead), *offsets, place, s.taps[t], 0, 0, 0))
        tiles += -(-s.batch * job.size // rows)
    return Products(s, tuple(table), tuple(taps) or ((0,) * 8,), tiles, _room(table))


@lru_cache(maxsize=1024)
def sums(problem: Problem, share: int) -> Sums:
    """Tables for programs of ``share`` taps: neighbours in their list, in the smallest box that holds all."""
    s = sweep(problem)
    read, written = pitches([a.source for a in s.axes]), pitches([a.target for a in s.axes])
    lead = (0,) * (3 - len(s.axes))
    boxes = []
    for start in range(0, len(s.taps), share):
        together = range(start, min(start + share, len(s.taps)))
        spans = [_span(axis, together) for axis in s.axes]
        row = [*(1 for _ in lead), *(high - low for low, high in spans)]
        row.append(sum(low * pitch for (low, _), pitch in zip(spans, written, strict=True)))
        for t in range(start, start + share):
            known = min(t, together[-1])  # past the end: the last one again, kept nowhere
            offsets = [axis.offsets[known] + low * axis.step for axis, (low, _) in zip(s.axes, spans, strict=True)]
            place = sum(o * pitch for o, pitch in zip(offsets, read, strict=True))
            row += [*lead, *offsets, place, t if t in together else -1]
        boxes.append((*row, *(0,) * (20 - len(row))))
    return Sums(s, tuple(boxes), _slots(problem, s))


def _span(axis: Axis, taps: range) -> tuple[int, int]:
    """Counts of the target at which some of the taps is inside the source."""
    limits = [reach(axis.offsets[t], axis) for t in taps]
    return max(0, min(low for low, _ in limits)), min(axis.target, max(high for _, high in limits))


@lru_cache(maxsize=1024)
def planar_vector(problem: Problem) -> int:
    """Places that a vector has where channels may stay outermost, as the problem lays them out; 0 where they may not.

    Along the one axis on which taps move, every extent and offset must be a multiple of it, two at least. Products of
    float32 are left out: their operands would be turned one by one.
    """
    s = sweep(problem)
    axis = s.axes[-1]
    if problem.memory_format is not torch.contiguous_format or problem.dtype == "float32":
        return 0
    if len(s.axes) > 1 or s.batch != problem.batch or axis.step * axis.pitch != 1:
        return 0
    whole = math.gcd(_WHOLE, axis.source, axis.target, *axis.offsets)
    return whole if whole > 1 else 0


@lru_cache(maxsize=1024)
def planar_products(problem: Problem, columns: int, cut: bool) -> Products:
    """Tables of ``planar_kernels.planar_product`` for tiles of so many places."""
    s, vec = sweep(problem), planar_vector(problem)
    table: list[tuple[int, ...]] = []
    taps: list[tuple[int, ...]] = []
    tiles = 0
    for job in jobs(problem, columns, cut):
        (segment,) = job.segments
        ends = len(taps) + len(job.taps)
        table.append((tiles, segment.first // vec, segment.count // vec, len(taps), ends, 0, 0, 0))
        taps += [((segment.offsets[t] - segment.first) // vec, s.taps[t]) for t in job.taps]
        tiles += -(-segment.count // columns) * s.batch
    return Products(s, tuple(table), tuple(taps) or ((0, 0),), tiles, _room(table))


@lru_cache(maxsize=1024)
def planar_sums(problem: Problem) -> Sums:
    """Tables of ``planar_kernels.planar_weight``."""
    s, vec = sweep(problem), planar_vector(problem)
    (axis,) = s.axes
    spans = [_span(axis, range(i, i + 1)) for i in range(len(s.taps))]
    boxes = ((low // vec, (high - low) // vec, axis.offsets[i] // vec, i) for i, (low, high) in enumerate(spans))
    return Sums(s, tuple(boxes), _slots(problem, s))


def _room(table: list[tuple[int, ...]]) -> int:
    return next(count for count in _JOB_COUNTS if count >= len(table))


def _slots(problem: Problem, s: Sweep) -> tuple[int, ...]:
    slot = {t: i for i, t in enumerate(s.taps)}
    return tuple(slot.get(t, -1) for t in range(len(problem.taps)))
