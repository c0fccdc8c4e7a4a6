"""banded: large depthwise kernels as Toeplitz tiles on the tensor cores, in Triton."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

from adaptconv.backends.base import Config, Knob, Space
from adaptconv.backends.triton.banded import costs
from adaptconv.backends.triton.banded.positions import HALF
from adaptconv.backends.triton.banded.tiling import (
    STEP_BYTES,
    UNIT_BYTES,
    columns_of,
    forward_of,
    spread,
    sums_of,
    tile_of,
    whole_rows,
    window,
)
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.backends.triton.hardware import card
from adaptconv.problem import Direction, Problem

_DTYPES = ("bfloat16", "float16", "float32")
_LONG = 9  # taps along an axis from which a band is worth its zeros
_MANY = 35  # or taps altogether
_SPARSE = 32  # positions of the window to one tap, beyond which multiplying zeros cannot pay
_KEPT = 6  # tiles declared, the best predicted ones
_NEAR = 1.25  # times the best prediction, within which another way is worth the tuner's time
_SMALL = 1 << 26  # floating-point operations below which a launch costs more than any knob can save
_ROWS = (64, 128, 256)
_WIDTHS = (8, 16, 32, 64)
_BLOCKS = tuple((high, wide) for high in (1, 2, 4, 8, 16) for wide in _WIDTHS if 16 <= high * wide <= 256)
_SUMS = 128 * 256  # float32 sums of a program
_LEAST_LEFT = 64  # outputs of a block in the weight gradient: what one product of four warps takes
_MOST_LEFT = 128  # outputs of a block in the weight gradient, whose product is skewed in shared memory
_PLACES = (64, 128, 256)
_AXIS_HELP = "the axis along which the band runs: the last; the one before, exchanged with it or upright, as it lies"
_COPIED_BYTES = 4  # the least that a GPU copies into shared memory by itself
_TILE_HELP = (
    "pairs (block, image) of a program, then height x width of a block of outputs", "height x width of a block of dY"
)  # fmt: skip


class Banded(TritonBackend):
    """Depthwise convolution as one matrix product a channel, its weights laid out as bands.

    A block of outputs of one image is a row of a product with a Toeplitz matrix, so that the tensor cores do the
    multiply-adds, zeros in the band included: at k >= 9 a third to two thirds are not. For finite inputs that changes
    nothing; an infinity reaches every output of the blocks that read it, as NaN. Rows of a dilated kernel are parted
    into phases without empty rows; a high and narrow kernel has its band along the rows, with the input as it lies.
    """

    name: ClassVar[str] = "banded"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "large depthwise kernels as Toeplitz tiles on the tensor cores, in Triton"

    def unsuited(self, problem: Problem) -> str | None:
        """Declines what is not depthwise, small kernels, and precisions without a tensor core."""
        if problem.dtype not in _DTYPES:
            return f"it has no kernel for {problem.dtype}"
        if problem.dtype == "float32" and "conv-tf32" not in problem.fp32_precision:
            return "float32 needs the tensor cores' tf32, which torch's flags do not allow"
        if not problem.groups == problem.c_in == problem.c_out:
            return "it takes depthwise problems only: one input and one output channel a group"
        if problem.taps.footprint is not None:
            return "its taps carry a footprint"
        here = forward_of(problem)
        if here is None:
            return "the gradient of the input under a stride is no forward convolution"
        win = window(here, False)
        if win is not None:
            if max(win.extent) < _LONG and len(win.taps) <= _MANY:
                return f"its kernel is small: fewer than {_LONG} positions along each axis and at most {_MANY} taps"
            if math.prod(win.extent) > _SPARSE * len(win.taps):
                return f"its window has more than {_SPARSE} positions to a live tap"
        if math.prod(problem.spatial) >= 1 << 30 or math.prod(problem.out_spatial) >= 1 << 30:
            return "an image plane is too large for 32-bit offsets"
        if not any(_candidates(problem, axis) for axis in _axes(problem)):
            return "its strides are too long for any block of outputs"
        return None

    def space(self, problem: Problem) -> Space:
        """The axis of the band, the tile of a program, and how it is compiled."""
        return _space(problem)

    def predicted_us(self, problem: Problem, config: Config) -> float:
        """The slowest of tensor cores, caches, memory and issued instructions, and the passes before and after."""
        return costs.predicted_us(problem, config)


@lru_cache(maxsize=4096)
def _space(problem: Problem) -> Space:
    gradient = problem.direction is Direction.GRAD_WEIGHT
    axes = _axes(problem)
    if "upright" in axes and not _stands(problem):
        axes = axes[:2]
    ranked = sorted(
        (costs.predicted_us(problem, config), str(config["tile"]), axis, config)
        for axis in axes
        for config in _candidates(problem, axis)
        if _serves(problem, axes, config)
    )
    if not ranked:
        return Space()
    small = problem.flops < _SMALL
    _, _, axis, best = ranked[0]
    kept = [tile for _, tile, its, _ in ranked if its == axis][: 1 if small else _KEPT]
    kept += [tile for _, tile, its, _ in ranked if its != axis][: 0 if small else 2]
    tiles = tuple(dict.fromkeys(kept))
    knobs = [Knob("tile", tiles, tiles[0], _TILE_HELP[gradient])]
    if len(axes) > 1:
        knobs.append(Knob("axis", axes, axis, _AXIS_HELP))
    if gradient:
        places = tuple(p for p in _PLACES if all(_fits(problem, a, tile, p) for a in axes for tile in tiles))
        knobs.append(Knob("places", places, int(best["places"]), "places of the window to a program"))
        places = (int(best["places"]),) if small else places
        parts = (1,) if small else tuple(sorted({1, 2, 4, 8, int(best["splits"])}))
        knobs.append(Knob("splits", parts, 1 if small else int(best["splits"]), "parts of the sum, added up later"))
    least, _ = _limits(problem)
    warps = (least,) if small or least == 8 else (4, 8)
    knobs.append(Knob("warps", warps, least, "warps of a program, at least"))
    stages = _stages(problem, tiles, 3 if "upright" in axes else 4)  # whose fourth step does not fit in registers
    usual = 3 if 3 in stages else 2
    knobs.append(Knob("stages", (usual,) if small else stages, usual, "steps over K in flight"))
    return Space(tuple(knobs))


@lru_cache(maxsize=4096)
def _axes(problem: Problem) -> tuple[str, ...]:
    if problem.axes == 1:
        return ("last",)
    here = forward_of(problem)
    halved = problem.torch_dtype.itemsize * HALF == _COPIED_BYTES
    upright = problem.direction is not Direction.GRAD_WEIGHT and problem.axes == 2 and halved
    if upright and here is not None and here.stride[-1] == 1:
        return ("last", "before", "upright")
    return ("last", "before")


@lru_cache(maxsize=4096)
def _candidates(problem: Problem, axis: str) -> tuple[Config, ...]:
    """Configurations to rank: every useful tile, other knobs at what they would default to."""
    here = forward_of(problem)
    win = None if here is None else window(here, axis != "last")
    high, wide = (1, 1) if win is None else (win.high, win.out[2])
    if axis == "upright":
        high = 1
    useful = [(h, w) for h, w in _BLOCKS if h < 2 * high and (w < 2 * wide or w == _WIDTHS[0])]
    useful = useful or [(2, 8)]
    if problem.direction is not Direction.GRAD_WEIGHT:
        if wide <= _WIDTHS[-1] and (win is None or win.phases == 1 or axis == "upright"):  # whole rows, as many as fit
            useful += [(min(n // wide, high), wide) for n in (64, 128, 256) if n >= wide]
        warps, most = _limits(problem)
        tiles = [Config(tile=f"{rows}x{h}x{w}", axis=axis, warps=warps, stages=3) for rows in _ROWS for h, w in useful]
        return tuple(dict.fromkeys(t for t in tiles if sums_of(t) <= most))
    found = []
    tall = [(h, w) for h, w in useful if _LEAST_LEFT <= h * w <= _MOST_LEFT]
    for h, w in tall or [(h, w) for h, w in useful if h * w < _LEAST_LEFT]:
        if all(_fits(problem, a, f"{h}x{w}", _PLACES[1]) for a in _axes(problem)):
            base = Config(tile=f"{h}x{w}", axis=axis, places=_PLACES[1], splits=1, warps=4, stages=3)
            parts = 1 if win is None else costs.splits(problem, win, base)
            found.append(Config(base, splits=parts))
    return tuple(found)


def _stands(problem: Problem) -> bool:
    """Whether upright tiles, made for kernels much higher than wide, are predicted to come near the others."""
    best = {
        axis: min((costs.predicted_us(problem, config) for config in _candidates(problem, axis)), default=math.inf)
        for axis in _axes(problem)
    }
    return best["upright"] < _NEAR * min(best.values())


def _serves(problem: Problem, axes: tuple[str, ...], config: Config) -> bool:
    """Whether a tile is one on every axis of the band, as tile and axis are chosen apart: of a width that blocks may
    have, or whole rows; and of no more sums than fit.
    """
    if problem.direction is Direction.GRAD_WEIGHT:
        return True
    here = forward_of(problem)
    if any(sums_of(Config(config, axis=axis)) > _limits(problem)[1] for axis in axes):
        return False
    wins = [window(here, axis != "last") for axis in axes] if here is not None else []
    wide = int(str(config["tile"]).split("x")[-1])
    return wide in _WIDTHS or all(win is None or whole_rows(win, wide) for win in wins)


def _limits(problem: Problem) -> tuple[int, int]:
    """Least warps of a forward program and most sums in it, at which everything stays in registers.

    Addresses take more of them where rows of the input are read in parts of a unit, over three axes, and in phases;
    stores, where rows of the output are odd. Hopper's products read both operands from shared memory, others from
    registers.
    """
    here = forward_of(problem)
    if here is None or problem.direction is Direction.GRAD_WEIGHT:
        return 4, _SUMS // 2
    crowded = here.axes == 3 or here.spatial[-1] % (UNIT_BYTES // here.torch_dtype.itemsize) != 0
    wins = [window(here, axis != "last") for axis in _axes(problem)]
    phased = any(win is not None and win.phases > 1 for win in wins)
    shifts = crowded + phased + (here.out_spatial[-1] % 2) + (card(problem.device).family not in ("sm90", "sm100"))
    return (8 if shifts else 4), _SUMS >> min(shifts, 2)


def _fits(problem: Problem, axis: str, tile: str, places: int) -> bool:
    """Whether a tile of so many places holds, for some weight column, what every output column of a block reads."""
    here = forward_of(problem)
    win = None if here is None else window(here, axis != "last")
    if win is None:
        return True
    high, wide = map(int, tile.split("x"))
    if high * wide * places > _SUMS // 2:
        return False
    return spread(win, high, wide, places).tile_columns > 0


def _stages(problem: Problem, tiles: tuple[str, ...], most: int) -> tuple[int, ...]:
    """Depths of the pipeline whose buffers fit in shared memory, for every tile declared."""
    room = card(problem.device).shared_bytes
    widest = max(
        STEP_BYTES * (columns_of(config) + (tile_of(config)[0] or _PLACES[-1]))
        for config in (Config(tile=tile, axis=axis) for tile in tiles for axis in _axes(problem))
    )
    return tuple(s for s in range(2, most + 1) if s * widest <= room) or (2,)
