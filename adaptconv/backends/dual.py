"""dual: a pattern as a sum of regular grids, each through torch's own convolution."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from adaptconv.backends import costs, halves
from adaptconv.backends.base import Backend, Config, Space
from adaptconv.backends.grid import grid_space, run_grid
from adaptconv.backends.weights import picked
from adaptconv.grids import Grid
from adaptconv.problem import Direction, Problem
from adaptconv.taps import TapPattern

MAX_GRIDS = 4


@lru_cache(maxsize=4096)
def _parts(problem: Problem) -> tuple[tuple[Grid, Problem], ...]:
    """Each grid of the cover with the problem it makes alone; the first carries the bias."""
    parts = []
    for i, grid in enumerate(problem.taps.grids(MAX_GRIDS) or ()):
        lattice = itertools.product(
            *(range(o, o + s * d, d) for o, s, d in zip(grid.origin, grid.size, grid.dilation, strict=True))
        )
        taps = TapPattern(tuple(lattice), problem.taps.window)
        parts.append((grid, replace(problem, taps=taps, bias=problem.bias and i == 0)))
    return tuple(parts)


class Dual(Backend):
    """The dual-conv sum, for any number of grids up to four."""

    name: ClassVar[str] = "dual"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = f"a sum of 2 to {MAX_GRIDS} regular grids, each through torch's convolution"

    def rejects(self, problem: Problem) -> str | None:
        """Declines single grids, spread taps and patterns that need many."""
        if not len(problem.taps):
            return "the pattern has no taps"
        if problem.taps.footprint is not None:
            return "its taps carry a footprint"
        if problem.taps.single_grid() is not None:
            return "its taps are one regular grid, which native runs in one call"
        if problem.taps.grids(MAX_GRIDS) is None:
            return f"its {len(problem.taps)} taps need more than {MAX_GRIDS} regular grids"
        return None

    def space(self, problem: Problem) -> Space:
        """The knobs of one grid, the same for all."""
        return grid_space(problem)

    def cost(self, problem: Problem, config: Config) -> float:
        """The sum of its parts and of adding them up."""
        if halves.is_wide(config):
            return costs.in_float32_us(self.cost, problem, config)
        parts = _parts(problem)
        adds = (len(parts) - 1) * 3 * problem.bytes // 2
        call_us = costs.rates(problem.device).dual_call_us
        return sum(costs.grid_us(part, config, call_us) for _, part in parts) + costs.traffic_us(problem.device, adds)

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run every grid and add; low precision adds more than two parts in float32."""
        if halves.is_wide(config):
            return halves.in_float32(self.run, problem, config, a, b, bias)
        parts = _parts(problem)
        if problem.direction is Direction.GRAD_WEIGHT:
            return self._grad_weight(problem, config, a, b)
        results = [
            run_grid(part, config, a, picked(b, grid.taps), bias if i == 0 else None)
            for i, (grid, part) in enumerate(parts)
        ]
        wide = len(results) > 2 and problem.torch_dtype.itemsize < 4
        total = results[0].to(torch.float32) if wide else results[0]
        for result in results[1:]:
            total = total + result
        return total.to(problem.torch_dtype)

    @staticmethod
    def _grad_weight(problem: Problem, config: Config, x: Tensor, dy: Tensor) -> Tensor:
        parts = _parts(problem)
        columns = torch.cat([run_grid(part, config, x, dy) for _, part in parts], dim=2)
        owners = [t for grid, _ in parts for t in grid.taps]
        where = {t: column for column, t in enumerate(owners) if t >= 0}
        return picked(columns, tuple(where[t] for t in range(len(where))))
