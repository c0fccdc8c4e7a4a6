"""native: torch's own convolution, with the knobs under which it is fastest."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from adaptconv.backends import costs
from adaptconv.backends.base import Backend, Choice, Config, Space
from adaptconv.backends.geometry import geometry
from adaptconv.backends.grid import grid_space, run_grid
from adaptconv.backends.halves import is_unsound
from adaptconv.problem import Problem


class Native(Backend):
    """One regular grid of taps, through ``torch.conv*d`` and ``aten.convolution_backward``."""

    name: ClassVar[str] = "native"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "torch's own convolution, with layout and padding knobs; one regular grid of taps"

    def rejects(self, problem: Problem) -> str | None:
        """Declines tap patterns that are not one regular grid."""
        if not len(problem.taps):
            return "the pattern has no taps"
        if problem.taps.footprint is not None:
            return "its taps carry a footprint"
        if geometry(problem) is None:
            return f"its {len(problem.taps)} taps are not one regular grid"
        return None

    def space(self, problem: Problem) -> Space:
        """Layout, padding, the route a gradient takes, and the dtype of half-precision arithmetic."""
        return grid_space(problem)

    def cost(self, problem: Problem, config: Config) -> float:
        """From the layout and dilation rules of torch's CPU kernels."""
        return costs.grid_us(problem, config)

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """One torch convolution, forward or backward."""
        return run_grid(problem, config, a, b, bias)


def is_plain(problem: Problem, choice: Choice) -> bool:
    """Whether a choice is exactly the torch call that adaptconv stands in for."""
    if choice.backend != Native.name or choice.config != grid_space(problem).default:
        return False
    if is_unsound(problem):  # in any layout: a compiler may choose another
        return False
    grid = geometry(problem)
    # Uneven padding has no such call: torch itself pads first, as native does.
    return grid is not None and grid.symmetric is not None and grid.padding == problem.padding
