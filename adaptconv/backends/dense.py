"""dense: write the taps into their dense window and convolve without dilation. Accepts every pattern."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

from torch import Tensor

from adaptconv.backends import costs
from adaptconv.backends.base import Backend, Config, Space
from adaptconv.backends.grid import grid_space, run_grid
from adaptconv.backends.weights import gathered_gradient, picked, spread_weight
from adaptconv.problem import Direction, Problem
from adaptconv.taps import TapPattern


@lru_cache(maxsize=4096)
def _filled(problem: Problem) -> Problem:
    """The same problem with a tap at every position of the window."""
    return replace(problem, taps=TapPattern.grid(problem.taps.window))


@lru_cache(maxsize=4096)
def _expansion(taps: TapPattern) -> tuple[int, ...]:
    """For every position of the window, the tap that stands there, or -1."""
    index = {offset: t for t, offset in enumerate(taps.offsets)}
    return tuple(index.get(p, -1) for p in itertools.product(*map(range, taps.window)))


@lru_cache(maxsize=4096)
def _positions(taps: TapPattern) -> tuple[int, ...]:
    """For every tap, its row-major position in the window."""
    return tuple(position for position, t in enumerate(_expansion(taps)) if t >= 0)


class Dense(Backend):
    """Dense-construct: FLOPs grow with the window, but every pattern, stride and direction is served."""

    name: ClassVar[str] = "dense"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "the taps written into a dense window, then torch's convolution; accepts every pattern"

    def rejects(self, problem: Problem) -> str | None:
        """Never: it is the fallback."""
        return None

    def space(self, problem: Problem) -> Space:
        """The knobs of the dense convolution."""
        return grid_space(_filled(problem))

    def cost(self, problem: Problem, config: Config) -> float:
        """The dense convolution's, plus writing the window."""
        filled = _filled(problem)
        written = 8 * filled.c_out * (filled.c_in // filled.groups) * filled.taps.window_taps
        call_us = costs.rates(filled.device).dense_call_us
        return costs.grid_us(filled, config, call_us) + costs.traffic_us(filled.device, written)

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Expand the weight, or pick the taps out of the dense weight's gradient."""
        filled = _filled(problem)
        if problem.direction is Direction.GRAD_WEIGHT:
            dw = run_grid(filled, config, a, b)
            plain, _ = problem.taps.spread()
            return gathered_gradient(picked(dw, _positions(plain)), problem.taps)
        weight, plain = spread_weight(b, problem.taps)
        return run_grid(filled, config, a, picked(weight, _expansion(plain)), bias)
