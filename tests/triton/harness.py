"""Where the Triton tests run: interpreted on the CPU, or on a GPU; and the check of one problem against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from adaptconv.backends import Backend, Config
from adaptconv.backends.triton import runtime
from adaptconv.problem import Direction, Problem
from adaptconv.reference import reference, relative_error

INTERPRETED = runtime.interpreting()
DEVICE = torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
RUNS = pytest.mark.skipif(
    not INTERPRETED and DEVICE.type == "cpu", reason="no GPU; TRITON_INTERPRET=1 runs the kernels on the CPU"
)


cudnn_flags = partial(torch.backends.cudnn.flags, enabled=True)  # torch's own tests forbid to set flags otherwise


def operands(problem: Problem, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random operands of unit size in the problem's dtype and layout, on ``DEVICE``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...], form: torch.memory_format = torch.contiguous_format) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(problem.torch_dtype).to(DEVICE).contiguous(memory_format=form)

    form = problem.memory_format
    x, w = normal(problem.input_shape, form), normal(problem.weight_shape)
    dy = normal(problem.output_shape, form)
    bias = normal((problem.c_out,)) if problem.bias else None
    pairs = {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}
    return *pairs[problem.direction], bias


def error_of(backend: Backend, problem: Problem, config: Config, seed: int = 0) -> float:
    """Relative L2 error of a backend's result against float64; its dtype, shape and format are checked.

    What runs asks torch's flags on a GPU, so they are set as the problem says.
    """
    a, b, bias = operands(problem, seed)
    with cudnn_flags(allow_tf32="conv-tf32" in problem.fp32_precision):
        result = backend.run(problem, config, a, b, bias)
    exact = reference(problem, a.cpu(), b.cpu(), None if bias is None else bias.cpu())
    assert result.dtype is problem.torch_dtype
    assert result.device.type == DEVICE.type
    if problem.direction is not Direction.GRAD_WEIGHT:
        assert result.is_contiguous(memory_format=problem.memory_format)
    return relative_error(result.cpu(), exact)
