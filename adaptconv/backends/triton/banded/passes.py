"""Passes before and after the banded products: rows of whole units, axes exchanged, tables of bands."""

from __future__ import annotations

import itertools
from functools import lru_cache

import torch
from torch import Tensor

from adaptconv.backends.triton.banded import pass_kernels
from adaptconv.backends.triton.banded.tiling import UNIT_BYTES, Cut, Window
from adaptconv.backends.triton.geometry import on_device
from adaptconv.problem import Problem

_TABLE_BLOCK = 1024


def rows_of(t: Tensor, swap: bool, parts: tuple[int, ...]) -> tuple[Tensor, int, int]:
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


def exchanged_copy(t: Tensor) -> Tensor:
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
    pass_kernels.lay_rows[grid](t, out, *strides, height, width, pitch, BY=high, BX=wide, num_warps=4)


def bands(win: Window, made: Cut, w: Tensor, backwards: bool) -> Tensor:
    """The table that ``pass_kernels.lay_bands`` writes; ``backwards`` takes the taps from the last on."""
    channels, _, taps = w.shape
    grain = win.unit // 2
    shape = (channels, grain, win.extent[0], made.table_rows, made.table_grains * grain)
    table = torch.empty(shape, dtype=w.dtype, device=w.device)
    places = on_device(_window_map(win, taps if backwards else 0), w.device)
    pass_kernels.lay_bands[(channels * -(-table[0].numel() // _TABLE_BLOCK),)](
        w, places, table, w.stride(0), w.stride(2), *win.extent, made.table_rows, made.table_grains * grain,
        made.lead_rows, made.lead_columns, GRAIN=grain, BLOCK=_TABLE_BLOCK, num_warps=4,
    )  # fmt: skip
    return table


@lru_cache(maxsize=1024)
def _window_map(win: Window, backwards: int) -> tuple[tuple[int, ...], ...]:
    """For each place of the window its tap, -1 for none; counted from the last if ``backwards`` is their number."""
    tap = {(z, y, x): backwards - 1 - t if backwards else t for t, z, y, x in win.taps}
    depth, high, wide = map(range, win.extent)
    return (tuple(tap.get(place, -1) for place in itertools.product(depth, high, wide)),)


def precision(problem: Problem) -> str:
    """How ``tl.dot`` multiplies float32."""
    return "tf32" if "conv-tf32" in problem.fp32_precision else "ieee"
