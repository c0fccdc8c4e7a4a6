"""What launches the banded kernels: layouts, tables, second sums."""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from adaptconv.backends.base import Config, laid_out
from adaptconv.backends.triton.banded import kernels
from adaptconv.backends.triton.banded.tiling import (
    CORRELATED,
    STEP_BYTES,
    UNIT_BYTES,
    Cut,
    Spread,
    Window,
    columns_of,
    cut,
    exchanged,
    forward_of,
    parts_of,
    spread,
    tile_of,
    warps_of,
    whole_rows,
    window,
)
from adaptconv.backends.triton.geometry import on_device
from adaptconv.problem import Direction, Problem

_TABLE_BLOCK = 1024
_TAPS_BLOCK = 64


def compute(problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """What ``Backend.run`` promises, by the banded kernels."""
    here = forward_of(problem)
    assert here is not None, "declined before"
    swap = exchanged(config)
    win = window(here, swap)
    with _device_of(a):
        if problem.direction is Direction.GRAD_WEIGHT:
            if win is None:
                return a.new_zeros(problem.weight_shape)
            return _weight_gradient(problem, config, win, swap, a, b)
        if win is None:
            return _constant(here, problem, a, bias)
        return laid_out(_product(here, problem, config, win, swap, a, b, bias), problem.memory_format)


def _device_of(t: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


def _constant(here: Problem, problem: Problem, a: Tensor, bias: Tensor | None) -> Tensor:
    """The answer where no tap reads the input."""
    y = torch.zeros(here.output_shape, dtype=a.dtype, device=a.device)
    if bias is not None:
        y += bias.reshape(-1, *(1,) * here.axes)
    return laid_out(y, problem.memory_format)


def _rows(t: Tensor, swap: bool, parts: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """``[N, C, *spatial]`` as rows of whole parts, how many elements a part has and how many parts a row has.

    Itself where rows are made of one of ``parts`` already, else padded with zeros to the first of them.
    """
    extents = t.shape[2:]
    height, width = (1, *extents)[-2:]
    if swap:
        height, width = width, height
    if not t.is_contiguous():
        t = t.contiguous()
    if not swap and t.data_ptr() % UNIT_BYTES == 0:
        for part in parts:
            if width % part == 0:
                return t, part, width // part
    unit = parts[0]
    units = -(-width // unit)
    out = torch.empty((t.numel() // (height * width), height, units * unit), dtype=t.dtype, device=t.device)
    _lay(t, out, swap, height, width)
    return out, unit, units


def _exchanged(t: Tensor) -> Tensor:
    """A contiguous tensor with its last two axes exchanged, written out."""
    out = torch.empty((*t.shape[:-2], t.shape[-1], t.shape[-2]), dtype=t.dtype, device=t.device)
    _lay(t, out, True, t.shape[-1], t.shape[-2])
    return out


def _lay(t: Tensor, out: Tensor, swap: bool, height: int, width: int) -> None:
    """Fill rows of ``out [..., height, pitch]`` from a contiguous tensor, its last two axes exchanged if asked."""
    pitch = out.shape[-1]
    planes = out.numel() // (height * pitch)
    if not swap:  # rows of all planes follow each other
        planes, height = 1, planes * height
    strides = (height * width, 1, height) if swap else (height * width, width, 1)
    wide = min(max(1 << (pitch - 1).bit_length(), 16), 64 if swap else 256)
    high = 64 if swap else max(4096 // wide, 1)
    grid = (planes * -(-height // high) * -(-pitch // wide),)
    kernels.lay_rows[grid](t, out, *strides, height, width, pitch, BY=high, BX=wide, num_warps=4)


@lru_cache(maxsize=1024)
def _window_map(win: Window, backwards: int) -> tuple[tuple[int, ...], ...]:
    """For each place of the window its tap, -1 for none; counted from the last if ``backwards`` is their number."""
    tap = {(z, y, x): backwards - 1 - t if backwards else t for t, z, y, x in win.taps}
    depth, high, wide = map(range, win.extent)
    return (tuple(tap.get(place, -1) for place in itertools.product(depth, high, wide)),)


@lru_cache(maxsize=1024)
def _tap_places(win: Window, skipped_rows: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Depth, row and column of each of ``count`` taps in the window; depth -1 for one that reads nothing."""
    place = {t: (z, y - skipped_rows, x) for t, z, y, x in win.taps}
    return tuple(zip(*(place.get(t, (-1, 0, 0)) for t in range(count)), strict=True))


def _product(
    here: Problem, problem: Problem, config: Config, win: Window, swap: bool, x: Tensor, w: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    unit = win.unit
    pairs, high, wide = tile_of(config)
    made: Cut = cut(win, high, wide)
    x, part, width_parts = _rows(x, swap, parts_of(unit, x.element_size()))
    grain = unit // 2
    table = torch.empty(
        (here.c_out, grain, win.extent[0], made.table_rows, made.table_grains * grain), dtype=x.dtype, device=x.device
    )
    backwards = len(problem.taps) if problem.direction is Direction.GRAD_INPUT else 0
    size = table[0].numel()
    kernels.lay_bands[(here.c_out * -(-size // _TABLE_BLOCK),)](
        w, on_device(_window_map(win, backwards), x.device), table, w.stride(0), w.stride(2), *win.extent,
        made.table_rows, made.table_grains * grain, made.lead_rows, made.lead_columns, GRAIN=grain, BLOCK=_TABLE_BLOCK,
        num_warps=4,
    )  # fmt: skip
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
        PHASED=win.phases > 1, HAS_BIAS=bias is not None, PRECISION=_precision(problem), num_warps=warps_of(config),
        num_stages=int(config["stages"]),
    )  # fmt: skip
    return (_exchanged(y) if swap else y).reshape(here.output_shape)


def _precision(problem: Problem) -> str:
    return "tf32" if "conv-tf32" in problem.fp32_precision else "ieee"


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
    x, _, width_units = _rows(x, swap, (unit,))
    dy, _, out_units = _rows(dy, swap, (unit,))
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
        PHASED=win.phases > 1, PRECISION=_precision(problem), num_warps=warps_of(config), num_stages=int(config["stages"]),
    )  # fmt: skip
    dw = torch.empty(problem.weight_shape, dtype=x.dtype, device=x.device)
    taps = len(problem.taps)
    places = on_device(_tap_places(win, made.skipped_rows, taps), x.device)
    kernels.collect[(problem.c_out * -(-taps // _TAPS_BLOCK),)](
        partial, places, dw, splits, problem.c_out, win.extent[0], over.tiles_u, over.turns, area, taps, made.rows,
        win.stride[1], over.columns, over.tile_columns, BH=made.high, BLOCK=_TAPS_BLOCK, num_warps=4,
    )  # fmt: skip
    return dw
