"""sparse: implicit matrix product over the live taps, in Triton, channels innermost."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

from adaptconv.backends.base import Config, Knob, Space
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.backends.triton.hardware import Card, card
from adaptconv.backends.triton.sparse import predict
from adaptconv.backends.triton.sparse.schedule import MOST_JOBS, jobs, phases, sweep
from adaptconv.backends.triton.sparse.tables import planar_vector
from adaptconv.backends.triton.sparse.tiles import Tile, depth_of, tiles_for, vector_of
from adaptconv.problem import Direction, Problem

_DTYPES = ("bfloat16", "float16", "float32")
_LEAST = 8  # channels a group on either side
_MOST = 1 << 31  # what a 32-bit count may reach
_SPLITS = (1, 2, 4, 8, 16, 32, 64)


class Sparse(TritonBackend):
    """Pixels times channels, tap after tap, with no columns written to memory: only taps that read the input cost.

    Results are cut into boxes with one list of taps each: where taps leave the input, and into the phases of a
    stride. The weight gradient sums each tap over just the pixels where it reads the input.
    """

    name: ClassVar[str] = "sparse"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "implicit matrix product over the live taps, in Triton, channels innermost"

    def unsuited(self, problem: Problem) -> str | None:
        """Declines thin groups, spread taps, float64 and what 32-bit counts cannot hold."""
        thinnest = min(problem.c_in, problem.c_out) // problem.groups
        if problem.dtype not in _DTYPES:
            return f"it has no kernel for {problem.dtype}"
        if problem.taps.footprint is not None:
            return "its taps carry a footprint"
        if thinnest < _LEAST:
            return f"{thinnest} channels a group are too thin for a matrix product: it takes {_LEAST} or more"
        if phases(problem) > MOST_JOBS:
            return f"the stride has {phases(problem)} phases: it takes up to {MOST_JOBS}"
        return _too_large(problem)

    def space(self, problem: Problem) -> Space:
        """Tiles that fit the problem and its GPU, and how far the sum is cut; the predicted best by default."""
        return _space(problem)

    def predicted_us(self, problem: Problem, config: Config) -> float:
        """The loop's instructions, products and loads, packed weights, layouts, and the sum of parts."""
        here, tile = card(problem.device), Tile.parse(str(config["tile"]))
        if problem.direction is Direction.GRAD_WEIGHT:
            return predict.weight_us(problem, here, tile, int(config["split"]))
        return predict.product_us(problem, here, tile, int(config["split"]), bool(config.get("cut", False)))


def _too_large(problem: Problem) -> str | None:
    s = sweep(problem)
    vec = vector_of(problem)
    ins, outs = (depth_of(c // problem.groups, vec) * problem.groups for c in (problem.c_in, problem.c_out))
    padded = math.prod(extent + sum(pair) for extent, pair in zip(problem.spatial, problem.padding, strict=True))
    if max(padded, math.prod(problem.out_spatial)) * max(ins, outs) >= _MOST:
        return "one image is larger than 2^31 elements"
    if s.batch * max(s.sources, s.targets) >= _MOST:
        return "there are more than 2^31 pixels"
    if ins * outs >= _MOST:
        return "the weight of one tap is larger than 2^31 elements"
    return None


@lru_cache(maxsize=1024)
def _space(problem: Problem) -> Space:
    here = card(problem.device)
    configs = _sums(problem, here) if problem.direction is Direction.GRAD_WEIGHT else _products(problem, here)
    backend = Sparse()
    best = min(configs, key=lambda config: backend.predicted_us(problem, config))
    return Space(tuple(Knob(k.name, k.values, best[k.name], k.help) for k in configs.knobs))


def _products(problem: Problem, here: Card) -> Space:
    s = sweep(problem)
    tiles = tiles_for(problem, s.batch * s.targets, planar_vector(problem))
    summed, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    if problem.direction is Direction.GRAD_INPUT:
        summed, outs = outs, summed
    shapes = [(t.n, t.m) if t.planar else (t.m, t.n) for t in tiles]
    fewest = min(-(-s.batch * s.targets // m) * -(-outs // n) * problem.groups for m, n in shapes)
    steps = max(1, len(s.taps)) * max(-(-summed // t.k) for t in tiles)
    knobs = [_tile_knob(tiles), _split_knob(here, fewest, steps)]
    if any(jobs(problem, m, True) != jobs(problem, m, False) for m in {t.n if t.planar else t.m for t in tiles}):
        knobs.append(Knob("cut", (False, True), True, "whether results are cut into boxes where taps leave the input"))
    return Space(tuple(knobs))


def _sums(problem: Problem, here: Card) -> Space:
    s = sweep(problem)
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    tiles = tiles_for(problem, s.batch * s.targets, planar_vector(problem))
    fewest = min(-(-len(s.taps) // t.taps) * -(-outs // t.m) * -(-ins // t.n) * problem.groups for t in tiles)
    steps = s.batch * s.targets // min(t.k for t in tiles)
    return Space((_tile_knob(tiles), _split_knob(here, fewest, steps)))


def _tile_knob(tiles: tuple[Tile, ...]) -> Knob:
    values = tuple(map(str, tiles))
    return Knob("tile", values, values[0], "what a program computes: rows, columns, depth, warps, stages (taps)")


def _split_knob(here: Card, programs: int, steps: int) -> Knob:
    """Parts of a sum: as many as leave each a step, while there is room for them on the GPU."""
    most = min(steps, 4 * here.processors // max(programs, 1))
    return Knob("split", tuple(n for n in _SPLITS if n <= max(most, 1)), 1, "parts of every sum, computed side by side")
