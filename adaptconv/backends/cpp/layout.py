"""A problem laid out for the kernel: its extents, its tiles, and the order in which taps are walked."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from adaptconv.problem import Direction, Problem

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_JOBS = 16  # pieces of work to cut a problem into at least, so that threads share it evenly; not their number:
_PIECE = 2048  # results must not depend on that. Outputs of a piece below which it is not cut further.
_RUN, _RUN_ROWS = 8, 4  # taps and rows that the kernel of a weight gradient keeps in registers


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the kernel is told: constant for a problem and its knobs.

    Attributes:
        spec: the fields of ``Spec`` in tiles.h but for the number of threads, which is last.
        steps: places relative to a block and the taps of its rows there; for a weight gradient the taps' places, those
            of runs first, and the lengths of the runs.
        live: indices of the taps that can touch the input, as the kernel has them; None if that is all in order.
        shape: of the result.
        partial: for a weight gradient, ``[C_out * C_in / groups, parts, live taps]``.
    """

    spec: tuple[int, ...]
    steps: ctypes.Array[ctypes.c_int64]
    live: tuple[int, ...] | None
    shape: tuple[int, ...]
    partial: tuple[int, int, int]


def abreast(problem: Problem) -> int:
    """Output channels of a group whose sums are in registers together, for they read the same input: 1, 2 or 4."""
    return math.gcd(problem.c_out // problem.groups, 4)


def best_step(
    offsets: Sequence[tuple[int, int, int]], rows: int, stride: int, height: int, density: float = 1.0,
    channels: int = 1,
) -> tuple[int, float]:  # fmt: skip
    """The distance between the rows of a block at which they share most input, and the cost of an output row.

    The cost counts loads as one and multiply-adds as a half; of the taps a channel has this density, at random.
    Rows are those of so many output channels each, which share what they load.
    """
    heights = sorted({y for _, y, _ in offsets})
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    candidates = {1}
    if gaps and rows > 1:
        candidates |= {gap // stride for gap in (math.gcd(*gaps), min(gaps)) if gap % stride == 0}
    best = (1, math.inf)
    for step in sorted(candidates):
        places = _loads(_places(offsets, rows, step * stride), density, channels) / channels
        blocks = sum(math.ceil(math.ceil((height - p) / step) / rows) for p in range(min(step, height)))
        cost = blocks * (places + 0.5 * rows * len(offsets) * density) / height
        if cost < best[1]:
            best = step, cost
    return best


def _places(offsets: Sequence[tuple[int, int, int]], rows: int, apart: int) -> dict[tuple[int, int, int], list[int]]:
    """Every place a block reads, with the tap through which each of its rows reads it, or -1."""
    places: dict[tuple[int, int, int], list[int]] = {}
    for t, (z, y, x) in enumerate(offsets):
        for i in range(rows):
            places.setdefault((z, y + i * apart, x), [-1] * rows)[i] = t
    return places


def _loads(places: dict[tuple[int, int, int], list[int]], density: float, channels: int) -> float:
    """How many of the places a block is expected to load: those with a weight for any of its rows and channels."""
    if density == 1:
        return len(places)
    return sum(1 - (1 - density) ** (channels * sum(t >= 0 for t in taps)) for taps in places.values())


def _runs(offsets: Sequence[tuple[int, int, int]], stride: int, height: int) -> tuple[int, list[list[int]]]:
    """Taps one above the other, evenly apart, in runs of 3 to 8; and the distance in output rows."""
    columns: dict[tuple[int, int], dict[int, int]] = {}
    for t, (z, y, x) in enumerate(offsets):
        columns.setdefault((z, x), {})[y] = t
    gaps = [b - a for column in columns.values() for a, b in itertools.pairwise(sorted(column))]
    if not gaps:
        return 1, []
    gap = max(set(gaps), key=lambda g: (gaps.count(g), -g))
    if gap % stride or height < _RUN_ROWS * (gap // stride):
        return 1, []
    runs = []
    for column in columns.values():
        for y in sorted(column):
            if y - gap in column:
                continue
            chain = []
            while y in column:
                chain.append(column[y])
                y += gap
            cuts = math.ceil(len(chain) / _RUN)
            runs += [chain[len(chain) * i // cuts : len(chain) * (i + 1) // cuts] for i in range(cuts)]
    return gap // stride, [run for run in runs if len(run) >= 3]


def flattened(problem: Problem) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
    """The taps that can touch the input, by index and as offsets on three axes."""
    live = problem.taps.live(problem.spatial, problem.padding, problem.stride)
    lead = (0,) * (3 - problem.axes)
    return live, [(*lead, *problem.taps.offsets[t]) for t in live]  # type: ignore[misc]


@lru_cache(maxsize=4096)
def geometry(problem: Problem, rows: int, tile_kib: int) -> Geometry:
    """Lay a problem (FORWARD or GRAD_WEIGHT) out for the kernel."""
    missing = 3 - problem.axes
    live, offsets = flattened(problem)
    size, out = (1,) * missing + problem.spatial, (1,) * missing + problem.out_spatial
    stride = (1,) * missing + problem.stride
    before = (0,) * missing + tuple(first for first, _ in problem.padding)
    least = [min((o[axis] for o in offsets), default=0) for axis in range(3)]
    window = [max((o[axis] for o in offsets), default=0) - least[axis] + 1 for axis in range(3)]
    before = tuple(zeros - origin for zeros, origin in zip(before, least, strict=True))
    offsets = [(z - least[0], y - least[1], x - least[2]) for z, y, x in offsets]

    forward = problem.direction is Direction.FORWARD
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    step, together = 1, abreast(problem)
    if forward:
        rows = max(1, rows // together)
        step = best_step(offsets, rows, stride[1], out[1], problem.taps.density, together)[0]
        table = [
            [*place, *(live[t] if t >= 0 else -1 for t in taps for _ in range(together))]
            for place, taps in _places(offsets, rows, step * stride[1]).items()
        ]
        flat = [number for row in table for number in row]
        steps = len(table)
    else:
        step, runs = _runs(offsets, stride[1], out[1])
        chosen = [t for run in runs for t in run]
        order = chosen + sorted(set(range(len(offsets))) - set(chosen))
        flat = [number for t in order for number in offsets[t]] + [len(run) for run in runs]
        live = tuple(live[t] for t in order)
        steps = len(runs)
    item = 8 if problem.dtype == "float64" else 4
    tile, tiles = _tile(out, stride, window, ins * item, tile_kib << 10, problem)
    parts = 1 if forward else max(1, min(problem.batch * tiles, _JOBS // (problem.c_out // together)))
    count = len(problem.taps) if forward else len(live)
    spec = (
        0 if forward else 1, DTYPES[problem.torch_dtype], problem.batch, problem.groups, ins, outs,
        *size, *out, *stride, *before, *window, *tile, count, (rows if forward else 1) * together, step, steps, parts,
        together,
    )  # fmt: skip
    return Geometry(
        spec, (ctypes.c_int64 * len(flat))(*flat), None if live == tuple(range(len(problem.taps))) else live,
        problem.output_shape if forward else problem.weight_shape, (problem.c_out * ins, parts, len(live)),
    )  # fmt: skip


def _tile(
    out: Sequence[int], stride: Sequence[int], window: Sequence[int], place_bytes: int, bound: int, problem: Problem
) -> tuple[list[int], int]:
    """Extents of an output tile whose input fits the bound, and how many tiles there are."""
    tile = list(out)

    def input_bytes() -> int:
        extents = [(t - 1) * s + w for t, s, w in zip(tile, stride, window, strict=True)]
        return math.prod(extents) * place_bytes

    def count() -> int:
        return math.prod(math.ceil(o / t) for o, t in zip(out, tile, strict=True))

    def halved(least: tuple[int, int, int]) -> bool:
        for axis in range(3):
            if tile[axis] > least[axis]:
                half = math.ceil(tile[axis] / 2)
                tile[axis] = min(half if axis < 2 else math.ceil(half / 128) * 128, tile[axis] - 1)
                return True
        return False

    while input_bytes() > bound and halved((1, 4, 256)):
        pass
    pieces = problem.batch * problem.groups
    while pieces * count() < _JOBS and math.prod(tile) > 2 * _PIECE and halved((1, 8, 512)):
        pass
    return tile, count()
