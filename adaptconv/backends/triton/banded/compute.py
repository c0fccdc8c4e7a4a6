"""What launches the banded kernels: layouts, tables, second sums."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from adaptconv.backends.base import Config, laid_out
from adaptconv.backends.triton.banded import kernels, pass_kernels, upright
from adaptconv.backends.triton.banded.passes import bands, exchanged_copy, precision, rows_of
from adaptconv.backends.triton.banded.tiling import (
    CORRELATED,
    STEP_BYTES,
    Cut,
    Spread,
    Window,
    along_rows,
    columns_of,
    cut,
    exchanged,
    forward_of,
    parts_of,
    spread,
    stands_upright,
    tile_of,
    warps_of,
    whole_rows,
    window,
)
from adaptconv.backends.triton.geometry import on_device
from adaptconv.problem import Direction, Problem

_TAPS_BLOCK = 64


def compute(problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """What ``Backend.run`` promises, by the banded kernels."""
    here = forward_of(problem)
    assert here is not None, "declined before"
    swap = along_rows(config)
    win = window(here, swap)
    with _device_of(a):
        if problem.direction is Direction.GRAD_WEIGHT:
            if win is None:
                return a.new_zeros(problem.weight_shape)
            return _weight_gradient(problem, config, win, swap, a, b)
        if win is None:
            return _constant(here, problem, a, bias)
        product = upright.product if stands_upright(config) else _product
        return laid_out(product(here, problem, config, win, a, b, bias), problem.memory_format)


def _device_of(t: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


def _constant(here: Problem, problem: Problem, a: Tensor, bias: Tensor | None) -> Tensor:
    """The answer where no tap reads the input."""
    y = torch.zeros(here.output_shape, dtype=a.dtype, device=a.device)
    if bias is not None:
        y += bias.reshape(-1, *(1,) * here.axes)
    return laid_out(y, problem.memory_format)


@lru_cache(maxsize=1024)
def _tap_places(win: Window, skipped_rows: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Depth, row and column of each of ``count`` taps in the window; depth -1 for one that reads nothing."""
    place = {t: (z, y - skipped_rows, x) for t, z, y, x in win.taps}
    return tuple(zip(*(place.get(t, (-1, 0, 0)) for t in range(count)), strict=True))


def _product(
    here: Problem, problem: Problem, config: Config, win: Window, x: Tensor, w: Tensor, bias: Tensor | None
) -> Tensor:
    unit, swap = win.unit, exchanged(config)
    pairs, high, wide = tile_of(config)
    made: Cut = cut(win, high, wide)
    x, part, width_parts = rows_of(x, swap, parts_of(unit, x.element_size()))
    table = bands(win, made, w, problem.direction is Direction.GRAD_INPUT)
    y = torch.empty((here.batch, here.c_out, *win.out), dtype=x.dtype, device=x.device)
    row = win.out[2]
    full = whole_rows(win, wide)
    plane, block = win.out[1] * win.out[2], made.high * made.wide
    y_unit = math.gcd(plane, block, unit) if full else math.gcd(row, unit)
    images = here.batch * win.images
    tiles = -(-made.blocks_h * made.blocks_w * images // pairs)
    kernels.multiply[(tiles * here.c_out,)](
        x, table, y, bias, images, here.batch, here.c_out, win.size[0], win.size[1], width_parts, *win.out,
        row // y_unit, plane // y_unit, block // y_unit, made.blocks_h, made.blocks_w, tiles, made.step_h,
        made.step_units, win.first[0], made.first_row, made.low_h, made.high_h, made.before_units, win.extent[0],
        made.rows, made.units, made.table_rows, made.table_grains, *win.stride, *win.pace[:2], win.phases,
        win.phase_rows, made.shift, made.high, made.wide, UNIT=unit, PART=part, BM=pairs, BN=columns_of(config),
        BW=16 if full else wide, BK=STEP_BYTES // x.element_size(), Y_UNIT=y_unit, FULL=full, DEEP=here.axes == 3,
        PHASED=win.phases > 1, HAS_BIAS=bias is not None, PRECISION=precision(problem), num_warps=warps_of(config),
        num_stages=int(config["stages"]),
    )  # fmt: skip
    return (exchanged_copy(y) if swap else y).reshape(here.output_shape)


def _magic(divisor: int) -> tuple[int, int]:
    """Multiplier, as a signed 32-bit integer, and shift of ``kernels.divided``."""
    bits = max((divisor - 1).bit_length(), 1)
    multiplier = (1 << (31 + bits)) // divisor + 1
    multiplier &= (1 << 32) - 1
    return multiplier - (1 << 32) if multiplier >> 31 else multiplier, bits - 1


def _weight_gradient(problem: Problem, config: Config, win: Window, swap: bool, x: Tensor, dy: Tensor) -> Tensor:
    unit = win.unit
    made: Cut = cut(win, *tile_of(config)[1:])
    over: Spread = spread(win, made.high, made.wide, int(config["places"]))
    x, _, width_units = rows_of(x, swap, (unit,))
    dy, _, out_units = rows_of(dy, swap, (unit,))
    images = problem.batch * win.images
    splits = int(config["splits"])
    area = over.tiles_r * over.rows * over.columns
    partial = torch.empty(
        (splits, problem.c_out, win.extent[0], over.tiles_u, over.turns, made.high, area),
        dtype=torch.float32, device=x.device,
    )  # fmt: skip
    before_units = made.before_units + made.skipped_units - over.skipped_units
    shift = made.shift - over.skipped_units * unit
    programs = splits * over.tiles_r * over.tiles_u * win.extent[0] * problem.c_out
    kernels.correlate[(programs,)](
        x, dy, partial, images, problem.batch, problem.c_out, win.size[0], win.size[1], width_units, win.out[0],
        win.out[1], out_units, made.blocks_h, made.blocks_w, made.step_h, made.step_units, win.first[0],
        made.first_row, made.low_h, made.high_h, before_units, win.extent[0], made.rows, over.tiles_r, over.tiles_u,
        min(over.tile_columns, 1 << 20), splits, win.stride[0], win.stride[2], *win.pace[:2], win.phases,
        win.phase_rows, shift, *_magic(images), *_magic(made.blocks_w), *_magic(problem.batch * win.out[0]),
        *_magic(problem.batch), UNIT=unit, BH=made.high, BW=made.wide, ROWS=over.rows,
        COLUMNS=over.columns, TURNS=over.turns, BK=CORRELATED * 2 // x.element_size(), DEEP=problem.axes == 3,
        PHASED=win.phases > 1, PRECISION=precision(problem), num_warps=warps_of(config),
        num_stages=int(config["stages"]),
    )  # fmt: skip
    dw = torch.empty(problem.weight_shape, dtype=x.dtype, device=x.device)
    taps = len(problem.taps)
    places = on_device(_tap_places(win, made.skipped_rows, taps), x.device)
    pass_kernels.collect[(problem.c_out * -(-taps // _TAPS_BLOCK),)](
        partial, places, dw, splits, problem.c_out, win.extent[0], over.tiles_u, over.turns, area, taps, made.rows,
        win.stride[1], over.columns, over.tile_columns, BH=made.high, BLOCK=_TAPS_BLOCK, num_warps=4,
    )  # fmt: skip
    return dw
