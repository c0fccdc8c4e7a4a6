"""factored: taps that share a footprint: smooth the input with the footprint once, then run the bare grid."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends import costs, halves
from adaptconv.backends.base import Backend, Config, Knob, Space, laid_out
from adaptconv.backends.gather import Gather
from adaptconv.backends.grid import grid_space, run_grid
from adaptconv.backends.weights import real_constant
from adaptconv.problem import Direction, Padding, Problem
from adaptconv.taps import TapPattern

_CHANNELS_LAST = "channels_last"
_GATHER = Gather()


class Factored(Backend):
    """conv(x, spread(w, s)) = conv(conv(x, s), w): one cheap depthwise smoothing and T taps, not a dense window.

    The input is padded before it is smoothed, so that borders are exact. The smoothed input of a weight
    gradient is made anew rather than kept.
    """

    name: ClassVar[str] = "factored"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "the footprint first, as a depthwise smoothing, then the bare grid of taps"

    def rejects(self, problem: Problem) -> str | None:
        """Declines taps without a footprint, and those whose core is not one grid."""
        if problem.taps.footprint is None:
            return "its taps carry no footprint"
        if problem.taps.core.single_grid() is None:
            return f"its {len(problem.taps)} taps are not one regular grid before they are spread"
        return None

    def space(self, problem: Problem) -> Space:
        """The knobs of the bare grid, and how the footprint is applied."""
        knobs = [knob for knob in grid_space(_core(problem)).knobs if knob.name != "pad"]
        if problem.direction is Direction.GRAD_WEIGHT and not _GATHER.rejects(_core(problem)):
            # Torch's dilated weight gradient rounds up to 5x worse than its dense one; a matrix product does not.
            core = "the bare grid by im2col and a matrix product, or through torch's backward"
            knobs.append(Knob("core", ("gather", "grid"), "gather", core))
        if problem.axes > 1:
            knobs.append(Knob("smooth", ("axes", "joint"), "joint", "the footprint axis by axis, or all axes at once"))
        return Space(tuple(knobs))

    def cost(self, problem: Problem, config: Config) -> float:
        """Each smoothing, and the bare grid."""
        if halves.is_wide(config):
            return costs.in_float32_us(self.cost, problem, config)
        call_us = costs.rates(problem.device).factored_call_us
        knobs = _knobs(config, smoothing=True)
        smoothing = sum(costs.grid_us(step, knobs, call_us) for step, _ in _smoothings(problem, config))
        core = _core(problem)
        if config.get("core") == "gather":
            return smoothing + _GATHER.cost(core, _GATHER.space(core).default)
        return smoothing + costs.grid_us(core, _knobs(config), call_us)

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Smooth and convolve, or the other way round for the input's gradient."""
        if halves.is_wide(config):
            return halves.in_float32(self.run, problem, config, a, b, bias)
        layout = _working_layout(problem, config)
        a = laid_out(a, _format(problem.axes, layout))
        core = replace(_core(problem), layout=layout)
        knobs = _knobs(config) if problem.axes == 1 else Config({**_knobs(config), "layout": "asis"})
        if problem.direction is Direction.GRAD_INPUT:
            result = _smoothed(problem, config, run_grid(core, knobs, a, b))
        else:
            x = _smoothed(problem, config, a)
            if config.get("core") == "gather":
                return _GATHER.run(core, _GATHER.space(core).default, x, b)
            if problem.direction is Direction.GRAD_WEIGHT:
                return run_grid(core, knobs, x, b)
            result = run_grid(core, knobs, x, b, bias)
        return laid_out(result, problem.memory_format)


def _knobs(config: Config, *, smoothing: bool = False) -> Config:
    """What a grid's run reads: it pads explicitly only where its padding is uneven."""
    dropped = ("smooth", "core", "route") if smoothing else ("smooth", "core")
    kept = {name: value for name, value in config.items() if name not in dropped}
    return Config({**kept, "pad": "implicit"})


def _working_layout(problem: Problem, config: Config) -> str:
    """Layout of everything between the operands and the result; a 1-D grid changes its own by itself."""
    here = "contiguous" if problem.memory_format is torch.contiguous_format else _CHANNELS_LAST
    return here if problem.axes == 1 or config["layout"] == "asis" else str(config["layout"])


def _format(axes: int, layout: str) -> torch.memory_format:
    if layout == "contiguous" or axes == 1:
        return torch.contiguous_format
    return torch.channels_last if axes == 2 else torch.channels_last_3d


@lru_cache(maxsize=4096)
def _core(problem: Problem) -> Problem:
    """The bare grid on the padded and smoothed input."""
    taps = problem.taps
    assert taps.footprint is not None, "only spread taps come here"
    spatial = tuple(
        extent + sum(zeros) - len(values) + 1
        for extent, zeros, values in zip(problem.spatial, problem.padding, taps.footprint, strict=True)
    )
    return replace(problem, spatial=spatial, taps=taps.core, padding=((0, 0),) * problem.axes)


@lru_cache(maxsize=4096)
def _smoothings(problem: Problem, config: Config) -> tuple[tuple[Problem, tuple[float, ...]], ...]:
    """The smoothing as depthwise problems in order, each with its filter's values.

    Forward, the padded input shrinks by each filter's length less one. For the input's gradient the filters
    are mirrored and what is padded is the core's gradient, less what falls into the padding.
    """
    footprint = problem.taps.footprint
    assert footprint is not None, "only spread taps come here"
    pads: Padding = problem.padding
    spatial = problem.spatial
    if problem.direction is Direction.GRAD_INPUT:
        footprint = tuple(values[::-1] for values in footprint)
        pads = tuple(
            (len(values) - 1 - before, len(values) - 1 - after)
            for values, (before, after) in zip(footprint, problem.padding, strict=True)
        )
        spatial = _core(problem).spatial
    alone = replace(
        problem, direction=Direction.FORWARD, c_out=problem.c_in, groups=problem.c_in, stride=(1,) * problem.axes,
        bias=False, layout=_working_layout(problem, config),
    )  # fmt: skip
    if config.get("smooth") != "axes":
        values = _outer(footprint)
        taps = TapPattern.grid(tuple(map(len, footprint)))
        return ((replace(alone, spatial=spatial, taps=taps, padding=pads), values),)
    steps = []
    for axis, values in enumerate(footprint):
        size = tuple(len(values) if i == axis else 1 for i in range(problem.axes))
        padding = tuple(pads[axis] if i == axis else (0, 0) for i in range(problem.axes))
        steps.append((replace(alone, spatial=spatial, taps=TapPattern.grid(size), padding=padding), values))
        grown = spatial[axis] + sum(pads[axis]) - len(values) + 1
        spatial = (*spatial[:axis], grown, *spatial[axis + 1 :])
    return tuple(steps)


def _outer(footprint: tuple[tuple[float, ...], ...]) -> tuple[float, ...]:
    """Values of the separable filter over all its positions, row by row."""
    outer = [1.0]
    for values in footprint:
        outer = [so_far * value for so_far in outer for value in values]
    return tuple(outer)


def _smoothed(problem: Problem, config: Config, x: Tensor) -> Tensor:
    knobs = Config(layout="asis", pad="implicit")
    for step, values in _smoothings(problem, config):
        if any(zeros < 0 for pair in step.padding for zeros in pair):  # the padding's gradient is cropped away
            x = F.pad(x, [min(zeros, 0) for pair in reversed(step.padding) for zeros in pair])
            step = _cropped(step)
        taps = real_constant(values, x.dtype, x.device).expand(problem.c_in, 1, math.prod(step.taps.window))
        x = run_grid(step, knobs, x, taps)
    return x


@lru_cache(maxsize=4096)
def _cropped(step: Problem) -> Problem:
    """A smoothing whose negative padding has been cut off its input."""
    spatial = tuple(
        extent + sum(min(zeros, 0) for zeros in pair) for extent, pair in zip(step.spatial, step.padding, strict=True)
    )
    padding = tuple((max(before, 0), max(after, 0)) for before, after in step.padding)
    return replace(step, spatial=spatial, padding=padding)
