"""Predicted times of the banded kernels: steps of their products, counted, over a GPU's rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from adaptconv.backends.base import Config
from adaptconv.backends.triton.banded.positions import HALF, positions
from adaptconv.backends.triton.banded.positions import steps as steps_of_tile
from adaptconv.backends.triton.banded.tiling import (
    CORRELATED,
    STEP_BYTES,
    Cut,
    Window,
    along_rows,
    columns_of,
    cut,
    exchanged,
    forward_of,
    parts_of,
    run_of,
    spread,
    stands_upright,
    tile_of,
    warps_of,
    window,
)
from adaptconv.backends.triton.hardware import Card, card
from adaptconv.problem import Direction, Problem

_LAUNCH_US = 1.5  # a kernel that follows another
_TENSOR_SHARE = 0.7  # of the tensor cores' rate that a Triton loop reaches at its best
_L2_BYTES_A_CLOCK = 28.0  # a multiprocessor: what its loads past the first-level cache reach
_L1_BYTES_A_CLOCK = 64.0
_TABLE_MISSES = 0.15
_UNIT_INSTRUCTIONS = 10.0  # of a thread, counted in the machine code, a 16-byte copy with its address and bounds
_TABLE_INSTRUCTIONS = 8.0  # in two copies, without bounds
_HALF_INSTRUCTIONS = 18.0  # in four copies of 4 bytes, whose bounds and addresses are shared
_PLACED_INSTRUCTIONS = 35.0  # whose address follows from a pair (block, image) by division
_STEP_INSTRUCTIONS = 60.0  # a warp, of a step: counters, barriers, the product itself
_PROGRAM_CYCLES = 2500.0  # before the first step and after the last, of one of the programs that run at a time
_SECTOR_BYTES = 32  # what a cache writes at least
_SAMPLES = 24  # tiles looked at


@dataclass(frozen=True, slots=True)
class Work:
    """What the product of a problem does on a GPU.

    Attributes:
        programs: programs of the main kernel.
        steps: steps over K, of all programs together.
        rows, columns: of the two operands in a step, ``STEP_BYTES`` each.
        far: shares of either that come from past the first-level cache.
        instructions: of a thread, for 16 bytes of either.
        written: bytes of the result as the second-level cache takes them, in sectors.
    """

    programs: int
    steps: float
    rows: int
    columns: int
    far: tuple[float, float]
    instructions: tuple[float, float]
    written: float


def predicted_us(problem: Problem, config: Config) -> float:
    """Microseconds of all kernels of one call."""
    here = forward_of(problem)
    win = None if here is None else window(here, along_rows(config))
    facts = card(problem.device)
    moved = problem.bytes / facts.bandwidth_gb_s * 1e-3
    if here is None or win is None:
        return 2 * _LAUNCH_US + moved
    made = cut(win, *tile_of(config)[1:])
    if problem.direction is Direction.GRAD_WEIGHT:
        work = _correlated(problem, win, made, config)
    else:
        work = (_upright if stands_upright(config) else _multiplied)(here, win, made, config)
    time = _LAUNCH_US * (3 + 2 * exchanged(config)) + max(_busy_us(work, config, facts), moved)
    return time + _passes_bytes(problem, win, made, config) / facts.bandwidth_gb_s * 1e-3


def _busy_us(work: Work, config: Config, facts: Card) -> float:
    """The longest of what the multiprocessors do at the same time, and the start and end of programs."""
    warps = warps_of(config)
    hertz = facts.processors * facts.clock_ghz * 1e3  # cycles of all multiprocessors in a microsecond
    left, right = work.rows * STEP_BYTES, work.columns * STEP_BYTES
    tensor = work.steps * work.rows * work.columns * STEP_BYTES / (facts.tensor_tflop_s * _TENSOR_SHARE * 1e6)
    fetched = work.steps * (left * work.far[0] + right * work.far[1])
    far = (fetched + work.written) / (_L2_BYTES_A_CLOCK * hertz)
    near = work.steps * (left + right) / (_L1_BYTES_A_CLOCK * hertz)
    loads = left * work.instructions[0] + right * work.instructions[1]
    issue = work.steps * (loads / (16 * 32) + _STEP_INSTRUCTIONS * warps) / (4 * hertz)
    resident = max(1, 16 // warps)
    waves = math.ceil(work.programs / (facts.processors * resident))
    ends = waves * _PROGRAM_CYCLES / (facts.clock_ghz * 1e3)
    filled = work.programs / (waves * facts.processors * resident)  # of the last wave, some stand idle
    return max(tensor, far, near, issue) / max(filled, 0.5) + ends


@lru_cache(maxsize=4096)
def steps_of_tiles(win: Window, made: Cut, images: int, rows: int, unit_step: int) -> float:
    """Steps over K of all tiles of ``rows`` pairs (block, image) of one channel, from a sample of them."""
    count = made.blocks_h * made.blocks_w * images
    tiles = math.ceil(count / rows)
    width_units = math.ceil(win.size[2] / win.unit)
    stride = max(1, tiles // _SAMPLES)
    total, line = 0, made.blocks_w * images
    sampled = range(0, tiles, stride)
    for tile in sampled:
        first, last = tile * rows, min(tile * rows + rows, count) - 1
        top, bottom = first // line, last // line
        left, right = (first % line // images, last % line // images) if top == bottom else (0, made.blocks_w - 1)
        high = min(made.high_h - top * made.step_h, made.rows)
        high -= max(made.low_h - bottom * made.step_h, 0)
        wide = min(width_units + made.before_units - left * made.step_units, made.units)
        wide -= max(made.before_units - right * made.step_units, 0)
        total += math.ceil(max(high, 0) * max(wide, 0) / unit_step)
    return total * tiles / len(sampled)


def _multiplied(here: Problem, win: Window, made: Cut, config: Config) -> Work:
    rows = tile_of(config)[0]
    images = here.batch * win.images
    steps = steps_of_tiles(win, made, images, rows, STEP_BYTES // 16) * here.c_out * win.extent[0]
    programs = math.ceil(made.blocks_h * made.blocks_w * images / rows) * here.c_out
    piece = max(1, _SECTOR_BYTES // (run_of(win, config) * here.torch_dtype.itemsize))
    written = float(piece * math.prod(here.output_shape) * here.torch_dtype.itemsize)
    # Copies of 16 bytes pass the first-level cache by; those of 8, from the table, find nearly all in it.
    each = (_UNIT_INSTRUCTIONS, _TABLE_INSTRUCTIONS)
    return Work(programs, steps, rows, columns_of(config), (1.0, _TABLE_MISSES), each, written)


def _upright(here: Problem, win: Window, made: Cut, config: Config) -> Work:
    many, line = tile_of(config)[0], positions(win, made)
    tiles = math.ceil(here.batch * line.image_halves / line.kept(many)) * here.c_out
    size = here.torch_dtype.itemsize
    steps = tiles * steps_of_tile(made, line, win.size[2], win.unit, STEP_BYTES // size)
    again = 1 / (line.even_columns + line.odd_columns) + _TABLE_MISSES  # copies of 4 bytes go through the cache as well
    each = (_HALF_INSTRUCTIONS, _TABLE_INSTRUCTIONS)
    written = float(math.prod(here.output_shape) * size)
    return Work(
        tiles * made.blocks_w, steps, many, columns_of(config), (min(again, 1.0), _TABLE_MISSES), each, written
    )  # fmt: skip


def _correlated(problem: Problem, win: Window, made: Cut, config: Config) -> Work:
    programs, steps = _shares(problem, win, made, config)
    places = spread(win, made.high, made.wide, int(config["places"]))
    return Work(
        programs * int(config["splits"]), steps, made.high * made.wide, places.rows * places.columns, (1.0, 1.0),
        (_PLACED_INSTRUCTIONS, _PLACED_INSTRUCTIONS), 0.0,
    )  # fmt: skip


def _shares(problem: Problem, win: Window, made: Cut, config: Config) -> tuple[int, float]:
    """Programs of the weight gradient before the sum is split, and steps over K of all of them."""
    over = spread(win, made.high, made.wide, int(config["places"]))
    line = made.blocks_w * problem.batch * win.images
    steps = 0
    for tile in range(over.tiles_r):
        first = tile * over.rows
        low = math.ceil(max(made.low_h - first - over.rows + 1, 0) / made.step_h)
        high = min((made.high_h - 1 - first) // made.step_h + 1, made.blocks_h)
        steps += math.ceil(max(high - low, 0) * line * problem.torch_dtype.itemsize / (2 * CORRELATED))
    copies = over.tiles_u * win.extent[0] * problem.c_out
    return over.tiles_r * copies, steps * copies


def splits(problem: Problem, win: Window, config: Config) -> int:
    """Parts of the weight gradient's sum that fill the GPU, each of at least four steps."""
    made = cut(win, *tile_of(config)[1:])
    programs, steps = _shares(problem, win, made, config)
    wanted = 2 * card(problem.device).processors / programs
    longest = steps / programs / 4
    return 1 << max(0, math.floor(math.log2(max(min(wanted, longest), 1))))


def _passes_bytes(problem: Problem, win: Window, made: Cut, config: Config) -> float:
    """Bytes moved by the passes before and after the product."""
    size = problem.torch_dtype.itemsize
    inputs, outputs = math.prod(problem.input_shape) * size, math.prod(problem.output_shape) * size
    gradient = problem.direction is Direction.GRAD_WEIGHT
    read = [(inputs, win.size[2])] if not gradient else [(inputs, win.size[2]), (outputs, win.out[2])]
    total = 0.0
    for count, width in read:
        if stands_upright(config):
            total += 2 * count * (win.size[1] % HALF > 0)
        elif exchanged(config) or width % (win.unit if gradient else parts_of(win.unit, size)[-1]):
            total += 2 * count
    if problem.layout != "contiguous" and problem.axes > 1:
        total += 3 * (inputs + outputs)
    if gradient:
        over = spread(win, made.high, made.wide, int(config["places"]))
        places = over.tiles_r * over.rows * over.columns * over.tiles_u * over.turns
        return total + 8.0 * places * made.high * win.extent[0] * problem.c_out * int(config["splits"])
    total += 2 * outputs * exchanged(config)
    table = win.unit // 2 * win.extent[0] * made.table_rows * made.table_grains * 8
    return total + table * problem.c_out
