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
UPRIGHT = 64  # output rows of an upright program, at least: what one product of four warps takes
SUMS_OF_THREAD = 128  # float32 sums that a thread can hold beside its addresses
SKEWED_OF_THREAD = 64  # and where it skews them in the end
ROWS_OF_WARP = 32  # of a forward product, whose addresses a warp keeps


@dataclass(frozen=True, slots=True)
class Window:
    """Where the live taps sit, on axes depth, height and width, the last one banded.

    Between dilated taps lie planes and rows that no tap reads. Such planes are passed over. As for rows, outputs
    ``phases`` rows apart read the same rows of the input, ``pace`` rows apart; the others never meet those. So each
    phase is an image of its own, of every ``phases``-th row, whose window has no empty rows.

    Attributes:
        size, out: extents of the convolution, axes exchanged if need be.
        stride: its steps; of the rows, in paces, between neighbours of a phase.
        first: the least offset of a live tap an axis.
        extent: positions of the window an axis, in paces.
        taps: of every live tap, its index and its place in the window, in paces.
        unit: elements in ``UNIT_BYTES``.
        pace: input planes and rows between two places of the window, and columns, which is 1.
        phases: images that the rows of one are parted into.
        phase_rows: input rows from one phase to the next.
    """

    size: tuple[int, int, int]
    out: tuple[int, int, int]
    stride: tuple[int, int, int]
    first: tuple[int, int, int]
    extent: tuple[int, int, int]
    taps: tuple[tuple[int, int, int, int], ...]
    unit: int
    pace: tuple[int, int, int]
    phases: int
    phase_rows: int

    @property
    def images(self) -> int:
        """Images that one sample is for the kernels: a plane of outputs and a phase each."""
        return self.out[0] * self.phases

    @property
    def high(self) -> int:
        """Output rows of a phase, of the one that has most."""
        return math.ceil(self.out[1] / self.phases)


@dataclass(frozen=True, slots=True)
class Cut:
    """A window's convolution in blocks of ``high`` x ``wide`` outputs; units and blocks as in the kernels.

    Rows are those of a phase, in paces.

    Attributes:
        blocks_h, blocks_w: blocks of an image.
        step_h, step_units: from block to block, in rows and units of the input.
        first_row: of the input, in true rows, that the first block of the first phase begins with.
        low_h, high_h: rows of the first block's window inside the input: from low_h, of the phase that has the most in
            front, up to high_h, of the one that has the most behind; unlimited by the window.
        before_units: from a block's corner back to its first unit.
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
    first_row: int
    low_h: int
    high_h: int
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


def along_rows(config: Config) -> bool:
    """Whether the band runs along the last axis but one."""
    return config.get("axis", "last") != "last"


def exchanged(config: Config) -> bool:
    """Whether the last two axes of the input and of the result are exchanged in memory for that."""
    return config.get("axis", "last") == "before"


def stands_upright(config: Config) -> bool:
    """Whether the band runs along the last axis but one with the input as it lies."""
    return config.get("axis", "last") == "upright"


def tile_of(config: Config) -> tuple[int, int, int]:
    """Pairs (block, image) of a program, 0 in the weight gradient, and height and width of a block.

    An upright program's pairs are positions, and its blocks are of one column, which is a height of 1.
    """
    *rows, high, wide = map(int, str(config["tile"]).split("x"))
    return (rows or [0])[0], 1 if stands_upright(config) else high, wide


@lru_cache(maxsize=4096)
def window(here: Problem, swap: bool) -> Window | None:
    """The window of a problem's live taps; None if there are none. ``swap`` exchanges its last two axes."""
    laid: Geometry = geometry(here)
    if not laid.live:
        return None
    z, y, x = (0, 2, 1) if swap else (0, 1, 2)
    places = [(o[z], o[y], o[x]) for o in laid.offsets]
    first = (min(p[0] for p in places), min(p[1] for p in places), min(p[2] for p in places))
    pace_z, pace_h = (math.gcd(*(p[axis] - first[axis] for p in places)) or 1 for axis in (0, 1))
    step = laid.stride[y]
    shared = math.gcd(step, pace_h)
    taps = tuple(
        (t, (p[0] - first[0]) // pace_z, (p[1] - first[1]) // pace_h, p[2] - first[2])
        for t, p in zip(laid.live, places, strict=True)
    )
    extent = tuple(max(tap[1 + axis] for tap in taps) + 1 for axis in range(3))
    return Window(
        (laid.size[z], laid.size[y], laid.size[x]), (laid.out[z], laid.out[y], laid.out[x]),
        (laid.stride[z], step // shared, laid.stride[x]), first, (extent[0], extent[1], extent[2]), taps,
        UNIT_BYTES // here.torch_dtype.itemsize, (pace_z, pace_h, 1), min(pace_h // shared, laid.out[y]), step,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def cut(win: Window, high: int, wide: int) -> Cut:
    """Cut a window's convolution into blocks of ``high`` x ``wide`` outputs.

    ``wide`` is a multiple of the unit, or as wide as the output.
    """
    unit, pace = win.unit, win.pace[1]
    blocks_h, blocks_w = math.ceil(win.high / high), math.ceil(win.out[2] / wide)
    step_h, step_units = high * win.stride[1], wide * win.stride[2] // unit
    before_units = math.ceil(-win.first[2] / unit)
    shift = before_units * unit + win.first[2]
    last = (wide - 1) * win.stride[2] + shift
    rows, units = (high - 1) * win.stride[1] + win.extent[1], math.ceil((last + win.extent[2]) / unit)
    last_phase = win.first[1] + (win.phases - 1) * win.phase_rows
    low_h, high_h = math.ceil(-last_phase / pace), math.ceil((win.size[1] - win.first[1]) / pace)
    r_low = max(0, low_h - (blocks_h - 1) * step_h)
    r_high = min(rows, high_h)
    u_low = max(0, before_units - (blocks_w - 1) * step_units)
    u_high = min(units, math.ceil(win.size[2] / unit) + before_units)
    lead = (high - 1) * win.stride[1]
    grain = unit // 2
    ahead = last // grain
    return Cut(
        high, wide, blocks_h, blocks_w, step_h, step_units, win.first[1] + r_low * pace, low_h - r_low, high_h - r_low,
        before_units - u_low, r_high - r_low, u_high - u_low, r_low, u_low, shift, lead - r_low,
        ahead * grain - u_low * unit, lead + r_high - r_low, ahead + 2 * (u_high - u_low),
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
    """Columns of the product: the outputs of a block, filled up to a power of two. Upright ones are its rows."""
    _, high, wide = tile_of(config)
    return max(_power(high * wide), UPRIGHT if stands_upright(config) else 16)


def sums_of(config: Config) -> int:
    """Float32 sums that a program of the weight gradient or of a forward product keeps at a time."""
    return columns_of(config) * (tile_of(config)[0] or int(config["places"])) * (2 if stands_upright(config) else 1)


def parts_of(unit: int, element_bytes: int) -> tuple[int, ...]:
    """Elements of a row that the forward product may read at a time: a unit, or its half or quarter of 4 bytes."""
    return tuple(unit // k for k in (1, 2, 4) if unit // k * element_bytes >= 4)


def warps_of(config: Config) -> int:
    """Warps of a program: as many as asked for, and enough for its sums and addresses to fit in registers."""
    rows = tile_of(config)[0]
    most = SUMS_OF_THREAD if rows else SKEWED_OF_THREAD
    return max(int(config["warps"]), sums_of(config) // (32 * most), rows // ROWS_OF_WARP)


def whole_rows(win: Window, wide: int) -> bool:
    """Whether the rows of a block follow each other in memory without a gap."""
    return wide == win.out[2] and win.phases == 1


def run_of(win: Window, config: Config) -> int:
    """Outputs of a block that follow each other in memory."""
    _, high, wide = tile_of(config)
    return high * wide if whole_rows(win, wide) else wide
