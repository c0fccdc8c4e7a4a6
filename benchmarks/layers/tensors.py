"""A layer's operands, the same values in every layout, and the check of results against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from adaptconv.problem import Direction, Problem
from adaptconv.reference import reference, relative_error
from adaptconv.tuner.slices import affordable_slice
from benchmarks.suites import Layer

DIRECTIONS = {"forward": Direction.FORWARD, "dx": Direction.GRAD_INPUT, "dw": Direction.GRAD_WEIGHT}
ORACLE_S = 0.5  # roughly what float64 may take for one layer and direction; larger ones are checked on a slice


def layouts_of(layer: Layer) -> tuple[str, ...]:
    """The layouts a layer has; 1-D has only one."""
    return ("contiguous",) if len(layer.spatial) == 1 else ("contiguous", "channels_last")


def problems_of(layer: Layer, direction: Direction, device: torch.device) -> dict[str, Problem]:
    """The layer's problem by layout."""
    return {layout: layer.problem(direction, layout, device) for layout in layouts_of(layer)}


@dataclass(frozen=True, slots=True)
class Tensors:
    """Operands of one layer in one layout.

    Attributes:
        x: input ``[N, C_in, *spatial]``.
        w: compact weight ``[C_out, C_in/groups, T]``; where the taps are one grid, a view of a weight in the layout,
            as the parameters of a model in that format are.
        dy: gradient of the output ``[N, C_out, *out_spatial]``.
    """

    x: Tensor
    w: Tensor
    dy: Tensor

    def operands(self, direction: Direction) -> tuple[Tensor, Tensor]:
        """The two that a direction takes, in ``Backend.run``'s order."""
        pairs = {
            Direction.FORWARD: (self.x, self.w),
            Direction.GRAD_INPUT: (self.dy, self.w),
            Direction.GRAD_WEIGHT: (self.x, self.dy),
        }
        return pairs[direction]


def tensors_of(layer: Layer, layout: str, device: torch.device, seed: int = 0) -> Tensors:
    """Random operands in the layer's dtype; all but ``layer.holes`` weights of each channel pair exactly zero."""
    problem = layer.problem(Direction.FORWARD, layout, device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def finished(t: Tensor) -> Tensor:
        return t.to(problem.torch_dtype).contiguous(memory_format=problem.memory_format)

    live = layer.holes or len(problem.taps)
    x, dy = normal(problem.input_shape), normal(problem.output_shape)
    w = normal(problem.weight_shape).mul_(max(problem.weight_shape[1] * live, 1) ** -0.5)
    if layer.holes:
        ranks = torch.rand(w.shape, generator=generator, device=device).argsort(-1).argsort(-1)
        w = w * (ranks < layer.holes)
    grid = problem.taps.single_grid()
    if grid is None:
        return Tensors(finished(x), w.to(problem.torch_dtype), finished(dy))
    return Tensors(finished(x), finished(w.reshape(*w.shape[:2], *grid.size)).flatten(2), finished(dy))


class Truth:
    """What one layer's direction should give, in float64, on a slice of it where all would take too long."""

    def __init__(self, problem: Problem, tensors: Tensors) -> None:
        self.problem = replace(problem, layout="contiguous")
        self._operands = tensors.operands(problem.direction)
        self._slice = affordable_slice(self.problem, ORACLE_S)

    @cached_property
    def _exact(self) -> Tensor:
        a, b = self._slice.operands(self.problem, *self._operands)
        return reference(self._slice.of(self.problem), a, b)

    def error(self, result: Tensor) -> float:
        """Relative L2 error of a result, its weight gradient compact; infinite where it is not finite."""
        return relative_error(self._slice.result(self.problem, result), self._exact)
