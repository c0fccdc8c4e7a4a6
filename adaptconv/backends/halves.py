"""Half precision on a CPU: where torch has kernels for it, where those go wrong, and computing in float32 instead.

Most processors have no instructions for float16, many none for bfloat16, and torch then convolves in loops that
convert every number by itself: 6 to 50 times slower than to convert the operands, convolve in float32 and convert the
result. Where there are instructions, gradients may still lack kernels: float16 weight gradients, by 20 to 370 times.
Sums are float32 either way, and the result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache

import torch
from torch import Tensor

from adaptconv.backends.base import Config, Knob
from adaptconv.backends.geometry import geometry
from adaptconv.problem import Direction, Problem

HALVES = ("float16", "bfloat16")
_CHANNELS, _WIDTH = 16, 15  # of a depthwise forward on which oneDNN never returns: at most, and at least
Run = Callable[[Problem, Config, Tensor, Tensor, Tensor | None], Tensor]


def is_half(problem: Problem) -> bool:
    """Whether a problem is in half precision on a CPU."""
    return problem.dtype in HALVES and problem.device.kind == "cpu"


@cache
def has_kernels(dtype: str) -> bool:
    """Whether oneDNN, as torch was built and on this processor, computes in a half-precision dtype at all."""
    if not torch.backends.mkldnn.is_available():  # its operators are not there either
        return False
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_fp16_supported() if dtype == "float16" else ops._is_mkldnn_bf16_supported())


# ---- computing in float32 -----------------------------------------------------------------------------------


def knobs(problem: Problem) -> tuple[Knob, ...]:
    """The knob of the dtype to compute in; none where there is nothing to choose, or float32 is set to be less."""
    if not is_half(problem) or problem.fp32_precision != "ieee":
        return ()
    text = "the operands' dtype, or float32 with operands and result converted"
    return (Knob("compute", ("asis", "float32"), "asis", text),)


def is_wide(config: Config) -> bool:
    """Whether a configuration says to compute in float32."""
    return config.get("compute") == "float32"


@lru_cache(maxsize=4096)
def widened(problem: Problem, config: Config) -> tuple[Problem, Config]:
    """The problem in float32, and the configuration without the knob that asked for it."""
    kept = {name: value for name, value in config.items() if name != "compute"}
    return replace(problem, dtype="float32"), Config(kept)


def in_float32(run: Run, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run a half-precision problem in float32; operands and result as in ``Backend.run``."""
    wide, knobs = widened(problem, config)
    result = run(wide, knobs, a.float(), b.float(), None if bias is None else bias.float())
    return result.to(problem.torch_dtype)


def converted_bytes(problem: Problem) -> int:
    """Bytes that converting the operands and the result moves: two read and four written an element, or back."""
    return 3 * problem.bytes


# ---- what torch has no kernel for ---------------------------------------------------------------------------


def share_of_loops(problem: Problem, route: str = "native") -> float | None:
    """Speed of torch's loops for a half-precision problem, as a share of its float32 reference loop; None where torch
    has a vectorised kernel.
    """
    if not is_half(problem):
        return None
    if not has_kernels(problem.dtype):
        return 1.0
    if problem.dtype == "bfloat16" or problem.direction is Direction.FORWARD or route != "native":
        return None
    if problem.direction is Direction.GRAD_INPUT:
        return 1.0 if problem.is_depthwise else None
    return 0.06


# ---- what torch gets wrong ----------------------------------------------------------------------------------


def is_unsound(
    problem: Problem, memory_format: torch.memory_format | None = None, config: Config | None = None
) -> bool:
    """Whether torch's own call for a half-precision problem does not come back, or comes back wrong.

    Args:
        problem: a single grid.
        memory_format: of the operands; None asks whether there is one in which it is so.
        config: knobs of the grid; by default torch's own way.
    """
    if not is_half(problem):
        return False
    last = memory_format is not torch.contiguous_format
    return never_returns(problem, memory_format, config) or (last and _misreads(problem, config))


def _misreads(problem: Problem, config: Config | None) -> bool:
    """What oneDNN's bfloat16 channels_last weight gradient of grouped kernels (torch 2.11 to 2.15, AVX-512) takes from
    memory that nothing wrote: where rows of taps lie apart and an output row is 29 or longer, at a stride of 1; and
    in volumes thinner than the kernel. Without groups, in any other layout and in float16 it is sound.
    """
    if problem.direction is not Direction.GRAD_WEIGHT or problem.groups == 1 or problem.dtype != "bfloat16":
        return False
    if config is not None and config.get("route") == "grouped":
        return False
    grid = geometry(problem)
    return grid is not None and (problem.axes == 3 or (problem.axes == 2 and grid.dilation[0] > 1))


def never_returns(
    problem: Problem, memory_format: torch.memory_format | None = None, config: Config | None = None
) -> bool:
    """Whether torch's own call for a problem would not come back; arguments as of ``is_unsound``.

    A depthwise forward in oneDNN's product kernel (seen in torch 2.11 to 2.15 on AVX-512 with half-precision
    instructions) never finishes generating its code for at most 16 channels under an undilated kernel 15 or more wide.
    float16 goes there in any format, bfloat16 in channels_last and with three axes.
    """
    if not is_half(problem) or not problem.is_depthwise:
        return False
    if problem.dtype == "float16":
        if not has_kernels("float16"):
            return False
    elif memory_format is torch.contiguous_format and problem.axes < 3:
        return False
    grid = geometry(problem)
    if grid is None:
        return False
    channels, width, dilation = problem.c_in, grid.size[-1], grid.dilation[-1]
    if problem.direction is Direction.GRAD_WEIGHT:  # one forward of x by dy, a group an image and channel
        if config is None or config.get("route") != "grouped":
            return False
        channels, width, dilation = problem.batch * problem.c_in, problem.out_spatial[-1], problem.stride[-1]
    elif problem.direction is Direction.GRAD_INPUT:
        return False
    return channels <= _CHANNELS and width >= _WIDTH and dilation == 1
