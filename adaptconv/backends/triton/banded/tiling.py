"""A depthwise problem cut into blocks of outputs, as the banded kernels take it, and what that costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from adaptconv.backends.base import Config
from adaptconv.backends.triton.geometry import Geometry, geometry
from adaptconv.problem import Direction, Problem

UNIT_BYTES = 16  # the widest load of a thread, and what rows of the input are aligned to
STEP_BYTES = 128  # of a row of either operand in one step over K
CORRELATED = 64  # pairs (block, image) in one step of the weight gradient
SUMS_OF_THREAD = 128  # float32 sums that a thread can hold beside its addresses
SKEWED_OF_THREAD = 64  # and where it skews them in the end
ROWS_OF_WARP = 32  # of a forward product, whose addresses a warp keeps


@dataclass(frozen=True, slots=True)
class Window:
    """Where the live taps sit, on axes depth, height and width, the last one banded.

    Attributes:
        size, out, stride: extents and steps of the convolution, axes exchanged if need be.
        first: the least offset of a live tap an axis.
        extent: positions of the window an axis.
        taps: of every live tap, its index and its place in the window.
        unit: elements in ``UNIT_BYTES``.
    """

    size: tuple[int, int, int]
    out: tuple[int, int, int]
    stride: tuple[int, int, int]
    first: tuple[int, int, int]
    extent: tuple[int, int, int]
    taps: tuple[tuple[int, int, int, int], ...]
    unit: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A window's convolution in blocks of ``high`` x ``wide`` outputs; units and blocks as in the kernels.

    Attributes:
        blocks_h, blocks_w: blocks of an image plane.
        step_h, step_units: from block to block, in rows and units of the input.
        before_h, before_units: from a block's corner back to its first row and unit.
        rows, units: that the window of a block spans, those that no block has inside the input left out.
        skipped_rows, skipped_units: those left out in front.
        shift: columns between a block's corner, nothing left out, and its first output's first tap; below ``unit``.
        lead_rows, lead_columns, table_rows, table_grains: of the table of bands, a grain being half a unit.
    """

    high: int
    wide: int
    blocks_h: int
    blocks_w: int
    step_h: int
    step_units: int
    before_h: int
    before_units: int
    rows: int
    units: int
    skipped_rows: int
    skipped_units: int
    shift: int
    lead_rows: int
    lead_columns: int
    table_rows: int
    table_grains: int


@dataclass(frozen=True, slots=True)
class Spread:
    """The weight gradient's product in tiles of the window.

    Attributes:
        rows, columns: of a tile; powers of two.
        tile_columns: weight columns that a tile answers for.
        skipped_units: of the window, left out in front of the first tile.
        tiles_r, tiles_u: tiles over rows and columns.
        turns: times ``columns`` that it answers.
    """

    rows: int
    columns: int
    tile_columns: int
    skipped_units: int
    tiles_r: int
    tiles_u: int
    turns: int


def forward_of(problem: Problem) -> Problem | None:
    """The problem whose forward convolution is computed or differentiated; None where there is none."""
    return problem.adjoint() if problem.direction is Direction.GRAD_INPUT else problem


def exchanged(config: Config) -> bool:
    """Whether the band runs along the last axis but one."""
    return config.get("axis", "last") == "before"


def tile_of(config: Config) -> tuple[int, int, int]:
    """Pairs (block, image) of a program, 0 in the weight gradient, and height and width of a block."""
    *rows, high, wide = map(int, str(config["tile"]).split("x"))
    return (rows or [0])[0], high, wide


@lru_cache(maxsize=4096)
def window(here: Problem, swap: bool) -> Window | None:
    """The window of a problem's live taps; None if there are none. ``swap`` exchanges its last two axes."""
    laid: Geometry = geometry(here)
    if not laid.live:
        return None
    z, y, x = (0, 2, 1) if swap else (0, 1, 2)
    rows = [(o[z], o[y], o[x]) for o in laid.offsets]
    first = (min(r[0] for r in rows), min(r[1] for r in rows), min(r[2] for r in rows))
    extent = tuple(max(r[axis] for r in rows) - first[axis] + 1 for axis in range(3))
    taps = tuple(
        (t, r[0] - first[0], r[1] - first[1], r[2] - first[2]) for t, r in zip(laid.live, rows, strict=True)
    )  # fmt: skip
    return Window(
        (laid.size[z], laid.size[y], laid.size[x]), (laid.out[z], laid.out[y], laid.out[x]),
        (laid.stride[z], laid.stride[y], laid.stride[x]), first, (extent[0], extent[1], extent[2]), taps,
        UNIT_BYTES // here.torch_dtype.itemsize,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def cut(win: Window, high: int, wide: int) -> Cut:
    """Cut a window's convolution into blocks of ``high`` x ``wide`` outputs.

    ``wide`` is a multiple of the unit, or as wide as the output.
    """
    unit = win.unit
    blocks_h, blocks_w = math.ceil(win.out[1] / high), math.ceil(win.out[2] / wide)
    step_h, step_units = high * win.stride[1], wide * win.stride[2] // unit
    before_h = -win.first[1]
    before_units = math.ceil(-win.first[2] / unit)
    shift = before_units * unit + win.first[2]
    last = (wide - 1) * win.stride[2] + shift
    rows, units = (high - 1) * win.stride[1] + win.extent[1], math.ceil((last + win.extent[2]) / unit)
    r_low = max(0, before_h - (blocks_h - 1) * step_h)
    r_high = min(rows, win.size[1] + before_h)
    u_low = max(0, before_units - (blocks_w - 1) * step_units)
    u_high = min(units, math.ceil(win.size[2] / unit) + before_units)
    lead = (high - 1) * win.stride[1]
    grain = unit // 2
    ahead = last // grain
    return Cut(
        high, wide, blocks_h, blocks_w, step_h, step_units, before_h - r_low, before_units - u_low, r_high - r_low,
        u_high - u_low, r_low, u_low, shift, lead - r_low, ahead * grain - u_low * unit, lead + r_high - r_low,
        ahead + 2 * (u_high - u_low),
    )  # fmt: skip


@lru_cache(maxsize=4096)
def spread(win: Window, high: int, wide: int, places: int) -> Spread:
    """Tiles of at most ``places`` places of the window, and of at least 16."""
    here = cut(win, high, wide)
    used = max(_power(here.units * win.unit), 16)
    if used <= places:
        columns, tile_columns, skipped, tiles_u = used, 1 << 30, here.skipped_units, 1
        turns = math.ceil(win.extent[2] / columns)
    else:  # several tiles, each answering for the weight columns that it holds for every output column
        columns, skipped, turns = places, 0, 1
        tile_columns = (columns - (wide - 1) * win.stride[2] - here.shift) // win.unit * win.unit
        tiles_u = math.ceil(win.extent[2] / max(tile_columns, 1))
    rows = max(1, min(places // columns, _power(here.rows)))
    return Spread(rows, columns, tile_columns, skipped, math.ceil(here.rows / rows), tiles_u, turns)


def _power(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def columns_of(config: Config) -> int:
    """Columns of the product: the outputs of a block, filled up to a power of two."""
    _, high, wide = tile_of(config)
    return max(_power(high * wide), 16)


def parts_of(unit: int, element_bytes: int) -> tuple[int, ...]:
    """Elements of a row that the forward product may read at a time: a unit, or its half or quarter of 4 bytes."""
    return tuple(unit // k for k in (1, 2, 4) if unit // k * element_bytes >= 4)


def warps_of(config: Config) -> int:
    """Warps of a program: as many as asked for, and enough for its sums and addresses to fit in registers."""
    rows = tile_of(config)[0]
    sums = columns_of(config) * (rows or int(config["places"]))
    most = SUMS_OF_THREAD if rows else SKEWED_OF_THREAD
    return max(int(config["warps"]), sums // (32 * most), rows // ROWS_OF_WARP)


def run_of(win: Window, config: Config) -> int:
    """Outputs of a block that follow each other in memory."""
    _, high, wide = tile_of(config)
    return high * wide if wide == win.out[2] else wide
