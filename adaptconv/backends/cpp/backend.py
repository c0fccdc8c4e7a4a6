"""cpp: depthwise and narrowly grouped convolution by taps, in C++."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from adaptconv.backends import costs
from adaptconv.backends.base import Backend, Config, Knob, Space, laid_out
from adaptconv.backends.cpp import build, layout
from adaptconv.backends.cpp import op as op  # defines the op
from adaptconv.backends.weights import adjoint_weight
from adaptconv.problem import Direction, Problem

_DTYPES = ("float32", "float64", "bfloat16", "float16")
_LANES = 16
_GROUP_LINE, _GROUP = 16, 4  # input channels a group on one axis and on more: above, torch's products are as fast


class Cpp(Backend):
    """Multiply-adds of the live taps alone, at any offsets, on rows kept in cache; one input channel a group, or few.

    Weights that are exactly zero are skipped, channel by channel, so that kernels of one window with different holes
    cost what each has. For finite inputs that changes nothing; where native would make NaN of zero times infinity,
    a skipped weight adds nothing.
    """

    name: ClassVar[str] = "cpp"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "few channels a group, by taps in C++, compiled at first use; zero weights are skipped"

    def rejects(self, problem: Problem) -> str | None:
        """Declines what its kernel has no loop for, and everything where it cannot be compiled."""
        return _unsuited(problem) or build.rejection()

    def space(self, problem: Problem) -> Space:
        """Size of a tile, and rows computed together."""
        knobs = [Knob("tile_kib", (64, 256, 1024), 256, "upper bound of the input a thread works on at a time, in KiB")]
        if _has_rows(problem) and layout.abreast(_kernel(problem)) < 4:  # four channels abreast are as many registers
            knobs.append(Knob("rows", (1, 4), _rows(problem), "output rows whose sums are in registers together"))
        return Space(tuple(knobs))

    def cost(self, problem: Problem, config: Config) -> float:
        """Loads and multiply-adds of the live taps, and the traffic of one pass."""
        here = _kernel(problem)
        live, offsets = layout.flattened(here)
        width = here.out_spatial[-1]
        filled = width / (math.ceil(width / _LANES) * _LANES)
        share = len(live) / max(len(problem.taps), 1) * here.taps.density
        if _has_rows(problem) and offsets:
            share *= _row_cost(here, int(config.get("rows", 1))) / (1.5 * len(offsets) * here.taps.density)
        lanes = 2 if problem.dtype == "float64" else 1
        known = costs.rates(problem.device)
        gflops = known.cpp_weight_gflops if problem.direction is Direction.GRAD_WEIGHT else known.cpp_gflops
        if problem.axes == 1:
            gflops = known.cpp_line_gflops
        if problem.c_in > problem.groups:
            gflops *= _group_share(problem, here)
        rate = gflops * max(problem.device.threads, 1) * filled / lanes
        time = known.cpp_call_us + problem.flops * share / rate * 1e-3
        time += costs.traffic_us(problem.device, 1.5 * problem.bytes)
        if problem.memory_format is not torch.contiguous_format:
            time += costs.relayout_us(problem.device, 3 * problem.bytes)
        return time + 1e-3 * int(config["tile_kib"] != 256)  # the default wins ties

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """One opaque op; the gradient of the input is a forward with flipped taps."""
        here = _kernel(problem)
        if problem.direction is Direction.GRAD_INPUT:
            b = adjoint_weight(b, problem.groups)
        pads = [zeros for pair in here.padding for zeros in pair]
        result: Tensor = torch.ops.adaptconv.cpp_taps(
            str(here.direction), a, b, bias, here.taps.text, here.stride, pads, here.groups,
            int(config.get("rows", 1)), int(config["tile_kib"]),
        )  # fmt: skip
        return result if problem.direction is Direction.GRAD_WEIGHT else laid_out(result, problem.memory_format)


def _unsuited(problem: Problem) -> str | None:
    if problem.device.kind != "cpu":
        return "its kernel is for CPUs"
    if problem.dtype not in _DTYPES:
        return f"it has no kernel for {problem.dtype}"
    ins, most = problem.c_in // problem.groups, _GROUP_LINE if problem.axes == 1 else _GROUP
    if ins > 1 and problem.groups == 1:
        return "of a single group it takes one input channel"
    if ins > most:
        return f"it takes at most {most} input channels a group here, not {ins}"
    if problem.taps.footprint is not None:
        return "its taps carry a footprint"
    if problem.direction is Direction.GRAD_INPUT and problem.adjoint() is None:
        return "the gradient of the input under a stride is no forward convolution"
    return None


def _has_rows(problem: Problem) -> bool:
    return problem.direction is not Direction.GRAD_WEIGHT and problem.axes > 1


def _group_share(problem: Problem, here: Problem) -> float:
    """What share of its rate on one input channel a group the kernel reaches on several, next to torch's."""
    if problem.direction is not Direction.GRAD_WEIGHT:
        return 0.55 if problem.dtype == "bfloat16" else 1.0  # where torch multiplies pairs in one instruction
    if problem.axes == 1:
        return 1.0
    vectors = math.ceil(here.out_spatial[-1] / _LANES)  # a row costs about one more than it has
    return vectors / (vectors + 1) * (1.0 if len({y for *_, y, _ in here.taps.offsets}) > 4 else 0.5)


@lru_cache(maxsize=4096)
def _kernel(problem: Problem) -> Problem:
    """What the kernel is asked: the problem, or its adjoint for the gradient of the input."""
    adjoint = problem.adjoint() if problem.direction is Direction.GRAD_INPUT else None
    return adjoint or problem


def _rows(problem: Problem) -> int:
    """Rows of a block at which an output row costs least."""
    here = _kernel(problem)
    return 4 if _row_cost(here, 4) <= 1.02 * _row_cost(here, 1) else 1


@lru_cache(maxsize=4096)
def _row_cost(here: Problem, rows: int) -> float:
    """What an output row costs in blocks of so many."""
    _, offsets = layout.flattened(here)
    channels = layout.abreast(here)
    rows, height, density = max(1, rows // channels), here.out_spatial[-2], here.taps.density
    return layout.best_step(offsets, rows, here.stride[-2], height, density, channels)[1]
