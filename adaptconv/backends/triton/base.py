"""What the Triton backends have in common: where they run, and the one op that runs them."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from adaptconv.backends.base import Backend, Choice, Config
from adaptconv.backends.triton import op as op  # defines the op
from adaptconv.backends.triton import runtime
from adaptconv.problem import Problem

_NEVER_US = 1e12  # interpreted kernels are for checking: no prediction may choose one


class TritonBackend(Backend):
    """A backend whose kernels are in ``adaptconv.backends.triton.<name>.compute``, imported when first run.

    ``compute(problem, config, a, b, bias)`` there gives what ``run`` promises. It may raise: the op then answers by
    dense-construct, warns once, and the problem is planned anew.
    """

    def rejects(self, problem: Problem) -> str | None:
        """Declines what its kernels cannot do, and devices that cannot run them."""
        return self.unsuited(problem) or runtime.rejection(problem.device)

    def failure(self, problem: Problem, config: Config) -> str | None:
        """Why the kernel of this configuration did not run when it was tried."""
        return runtime.failure_of(str(Choice(self.name, self.version, config)), problem)

    @abstractmethod
    def unsuited(self, problem: Problem) -> str | None:
        """Why the kernels cannot do a problem, whatever the device, in words; None if they can."""

    @abstractmethod
    def predicted_us(self, problem: Problem, config: Config) -> float:
        """Microseconds on the problem's GPU, from counted bytes and instructions."""

    def cost(self, problem: Problem, config: Config) -> float:
        """Predicted time on a GPU; on a CPU, whose only use is checking, no time at which it would be chosen."""
        return self.predicted_us(problem, config) if problem.device.kind != "cpu" else _NEVER_US

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """One opaque op."""
        pads = [zeros for pair in problem.padding for zeros in pair]
        result: Tensor = torch.ops.adaptconv.triton_taps(
            str(Choice(self.name, self.version, config)), str(problem.direction), a, b, bias, problem.taps.text,
            problem.spatial, problem.stride, pads, problem.groups, problem.layout,
        )  # fmt: skip
        return result
