"""A process that compiles Triton kernels for a GPU it never touches: ``python -m`` this, requests in, replies out.

Started by ``ahead``. Requests and replies are pickles on standard input and output: first the target, then either
problems with configurations, answered by the kernels that running them would compile, or such a kernel, answered once
it lies in Triton's cache on disk.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptconv.backends import Choice
from adaptconv.backends.triton import op
from adaptconv.problem import Direction, Problem


@dataclass(frozen=True, slots=True)
class Target:
    """What ``GPUTarget`` says of a GPU, without Triton: backend ("cuda", "hip"), architecture, threads of a warp."""

    backend: str
    arch: int | str
    warp_size: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """One specialisation of one ``@triton.jit`` function.

    Attributes:
        module, name: where the function is.
        specialization: types, constants and options, as Triton writes them down.
    """

    module: str
    name: str
    specialization: str


class Driver:
    """Stands where Triton expects a GPU's driver, and only says what to compile for."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Never used."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where tensors are: nowhere."""
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """A launcher's types; there is no launcher."""
        return ty


def use(target: Target) -> None:
    """Have Triton compile for a target in this process, whatever GPU is or is not here, and launch nothing."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compiled
    driver.set_active(Driver(target))


def kernels_of(pairs: Sequence[tuple[Problem, Choice]]) -> list[Kernel]:
    """The kernels that problems would compile, each once, in the order of their launches; nothing is compiled."""
    from triton import knobs

    found: dict[Kernel, None] = {}

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found[Kernel(fn.module, fn.name, compile["specialization_data"])] = None
        return True  # goes no further

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        for problem, choice in pairs:
            with contextlib.suppress(Exception):  # the GPU's process will meet it again, and say what it is
                op.compute_of(choice.backend)(problem, choice.config, *nowhere(problem))
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found)


def nowhere(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands with shapes and no memory."""

    def empty(shape: Sequence[int], form: torch.memory_format = torch.contiguous_format) -> Tensor:
        return torch.empty(shape, dtype=problem.torch_dtype, device="meta", memory_format=form)

    form = problem.memory_format
    x, w, dy = empty(problem.input_shape, form), empty(problem.weight_shape), empty(problem.output_shape, form)
    bias = empty((problem.c_out,)) if problem.bias else None
    pairs = {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}
    return *pairs[problem.direction], bias


def compile_kernel(kernel: Kernel) -> None:
    """Compile one kernel into Triton's cache on disk.

    Raises:
        Exception: whatever the compiler raises.
    """
    getattr(importlib.import_module(kernel.module), kernel.name).preload(kernel.specialization)


def main() -> None:
    """Answer requests until there are no more."""
    requests = sys.stdin.buffer
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a compiler prints is no reply
    use(pickle.load(requests))
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            reply: object = None
            if isinstance(request, Kernel):
                compile_kernel(request)
            else:
                reply = kernels_of(request)
        except Exception as failure:  # noqa: BLE001 - compilers fail in many ways; the GPU's process will meet it again
            reply = f"{type(failure).__name__}: {failure}"
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    from adaptconv.backends.triton import compiler_process  # under its own name, by which the pickles go

    compiler_process.main()
