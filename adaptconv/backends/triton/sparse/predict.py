"""Predicted times: instructions, products and traffic of a program's loop, counted from what compilers made of it."""

from __future__ import annotations

import math

import torch

from adaptconv.backends.triton.hardware import Card
from adaptconv.backends.triton.sparse.schedule import jobs, sweep
from adaptconv.backends.triton.sparse.tables import planar_sums, planar_vector, sums
from adaptconv.backends.triton.sparse.tiles import Tile, depth_of, kind_of, vector_of
from adaptconv.problem import Direction, Problem

_LAUNCH_US = 3.0  # of one kernel, queue and tail included
_FRAME_CYCLES = 3000.0  # of a program outside of its loop: first loads, and what it stores
_L2_BYTES = 38.0  # a cycle and multiprocessor, from the second-level cache
_REACHED = {"half": 0.85, "tf32": 0.85, "ieee": 0.75}  # share of the rate of products that a loop sustains
_REGISTERS = 65536


def product_us(problem: Problem, card: Card, tile: Tile, split: int, cut: bool) -> float:
    """FORWARD or GRAD_INPUT: the loop's programs, packed weights, layouts, and the sum of parts."""
    s = sweep(problem)
    ins, outs = _sides(problem)
    size = problem.torch_dtype.itemsize
    vec = planar_vector(problem) if tile.planar else vector_of(problem)
    depth = ins if tile.planar else depth_of(ins, vec)
    pixels, channels = (tile.n, tile.m) if tile.planar else (tile.m, tile.n)
    blocks = -(-depth // tile.k)
    across = -(-outs // channels) * problem.groups
    instructions = 65 + 14 * _vectors(tile, pixels, vec) + 5 * _vectors(tile, channels, vector_of(problem))
    if tile.planar:  # one test for all rows of a column
        instructions = 80 + 4 * _vectors(tile, pixels, vec) + 5 * _vectors(tile, channels, vector_of(problem))
    cycles = _iteration(problem, card, tile, tile.m * tile.n, instructions, tile.m + tile.n)
    work = []
    for job in jobs(problem, pixels, cut):
        count = -(-job.size // pixels) * s.batch if tile.planar else -(-s.batch * job.size // pixels)
        work.append((count * across, len(job.taps) * blocks))
    total = sum(count * (_FRAME_CYCLES + steps * cycles) for count, steps in work)
    programs = split * sum(count for count, _ in work)
    longest = _FRAME_CYCLES + max(steps for _, steps in work) * cycles / split
    total += (split - 1) * sum(count for count, _ in work) * _FRAME_CYCLES
    loop = _rounds(card, tile, tile.m * tile.n, programs, total, longest)
    results = s.batch * s.targets * outs * problem.groups
    moved = (s.batch * s.sources * depth * problem.groups + results) * size
    time = _LAUNCH_US + max(loop, _moved_us(card, moved))
    if split > 1:
        time += _LAUNCH_US + _moved_us(card, 4 * split * results, 4 * split * results + size * results)
    time += _LAUNCH_US + _moved_us(card, 4 * math.prod(problem.weight_shape) * size)  # packed: far apart, so twice
    return time if tile.planar else time + _relaid_us(problem, card)


def weight_us(problem: Problem, card: Card, tile: Tile, split: int) -> float:
    """GRAD_WEIGHT: the loop's programs, layouts, and the sum of parts."""
    share = tile.taps
    table = planar_sums(problem) if tile.planar else sums(problem, share)
    s, size = table.sweep, problem.torch_dtype.itemsize
    vec = planar_vector(problem) if tile.planar else vector_of(problem)
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    across = -(-outs // tile.m) * -(-ins // tile.n) * problem.groups
    # A thread counts the places whose vectors it loads: both operands' are the same if tiles are square.
    of_dy, of_x = _vectors(tile, tile.m, vec), _vectors(tile, tile.n, vec)
    counted = of_x if tile.m == tile.n else of_x + of_dy
    instructions = 70 + 14 * counted + 7 * (of_dy + of_x) + 14 * (share - 1) * of_x
    if tile.planar:
        instructions = 85 + 4 * (of_dy + of_x)
    cycles = _iteration(problem, card, tile, share * tile.m * tile.n, instructions, tile.m + share * tile.n)
    if tile.planar:
        steps = [s.batch * -(-box[1] * vec // tile.k) for box in table.boxes]
    else:
        steps = [-(-s.batch * math.prod(box[:3]) // tile.k) for box in table.boxes]
    total = across * sum(step * cycles + split * _FRAME_CYCLES for step in steps)
    longest = _FRAME_CYCLES + max(steps, default=0) / split * cycles
    programs = across * split * len(steps)
    loop = _rounds(card, tile, share * tile.m * tile.n, programs, total, longest)
    parts = 4 * split * len(s.taps) * problem.c_out * ins
    moved = s.batch * (s.sources * problem.c_in + s.targets * problem.c_out) * size
    time = 2 * _LAUNCH_US + max(loop, _moved_us(card, moved))
    time += _moved_us(card, parts, parts + 2 * math.prod(problem.weight_shape) * size)
    return time if tile.planar else time + _relaid_us(problem, card)


def _sides(problem: Problem) -> tuple[int, int]:
    """Channels a group that are summed over, and that come out."""
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    return (outs, ins) if problem.direction is Direction.GRAD_INPUT else (ins, outs)


def _vectors(tile: Tile, extent: int, vec: int) -> float:
    """Loads of 16 bytes a thread makes for ``extent`` by ``k`` elements."""
    return extent * tile.k / vec / (32 * tile.warps)


def _iteration(problem: Problem, card: Card, tile: Tile, area: int, instructions: float, loaded: int) -> float:
    """Cycles of a multiprocessor for one pass of a program's loop: products, instructions, or loads."""
    kind = kind_of(problem)
    rate = {"half": card.tensor_tflop_s, "tf32": card.tensor_tflop_s / 2, "ieee": card.vector_tflop_s}[kind]
    a_cycle = rate * 1e3 / card.processors / card.clock_ghz * _REACHED[kind]
    issued = instructions * tile.warps / 4
    return max(
        2 * area * tile.k / a_cycle,
        issued if kind != "ieee" else 0.0,
        loaded * tile.k * problem.torch_dtype.itemsize / _L2_BYTES,
    )


def _rounds(card: Card, tile: Tile, area: int, programs: int, total: float, longest: float) -> float:
    """Microseconds of programs of unequal length, the longest first, on all multiprocessors."""
    registers = (area / (32 * tile.warps) * 1.1 + 72) * 32 * tile.warps
    beside = max(1, min(int(_REGISTERS / registers), 4))  # programs a multiprocessor overlaps
    even = total / card.processors
    if programs > beside * card.processors:
        even += longest / 2  # the last round is half empty
    alone = longest * min(beside, max(1.0, programs / card.processors))
    return max(even, min(alone, even + longest)) / (card.clock_ghz * 1e3)


def _moved_us(card: Card, *counts: float) -> float:
    """Bytes to or from memory; what stays in the second-level cache between kernels is four times as fast."""
    fast = card.bandwidth_gb_s * 4e3
    return sum(count / (fast if count < card.l2_bytes / 2 else card.bandwidth_gb_s * 1e3) for count in counts)


def _relaid_us(problem: Problem, card: Card) -> float:
    """Operands copied into channels innermost, and the result back, where the problem is laid out otherwise."""
    if problem.memory_format is not torch.contiguous_format:
        return 0.0
    count = math.prod(problem.input_shape) + math.prod(problem.output_shape)
    return 2 * _LAUNCH_US + 1.3 * _moved_us(card, 2 * count * problem.torch_dtype.itemsize)
