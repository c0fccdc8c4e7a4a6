"""``adaptconv::triton_taps``: one opaque op around all Triton kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from adaptconv.backends.base import Choice, Config, laid_out, one_by_one
from adaptconv.backends.dense import Dense
from adaptconv.backends.triton import runtime
from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Direction, Problem
from adaptconv.taps import TapPattern

Compute = Callable[[Problem, Config, Tensor, Tensor, Tensor | None], Tensor]
_DENSE = Dense()

_LIBRARY = torch.library.Library("adaptconv", "FRAGMENT")
_LIBRARY.define(
    "triton_taps(str choice, str direction, Tensor a, Tensor b, Tensor? bias, str taps, SymInt[] spatial, int[] stride,"
    " int[] padding, int groups, str layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@cache
def compute_of(backend: str) -> Compute:
    """``compute`` of a backend: this imports Triton and, if it interprets, makes it exact for bfloat16."""
    if runtime.interpreting():
        importlib.import_module("adaptconv.backends.triton.interpreter").make_exact()
    module = importlib.import_module(f"adaptconv.backends.triton.{backend}.compute")
    compute: Compute = module.compute
    return compute


@lru_cache(maxsize=4096)
def _chosen(text: str) -> Choice:
    return Choice.parse(text)


@lru_cache(maxsize=4096)
def _problem(
    direction: str, batch: int, c_in: int, c_out: int, groups: int, spatial: tuple[int, ...], taps: str,
    stride: tuple[int, ...], padding: tuple[int, ...], dtype: torch.dtype, layout: str, device: Device, bias: bool,
    precision: str, deterministic: bool,
) -> Problem:  # fmt: skip
    pairs = tuple((padding[i], padding[i + 1]) for i in range(0, len(padding), 2))
    return Problem(
        Direction(direction), batch, c_in, c_out, groups, spatial, TapPattern.parse(taps), stride, pairs,
        str(dtype).removeprefix("torch."), layout, device, bias, precision, deterministic,
    )  # fmt: skip


def _problem_of(
    direction: str, a: Tensor, b: Tensor, bias: Tensor | None, taps: str, spatial: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], groups: int, layout: str,
) -> Problem:  # fmt: skip
    of_weight = direction == "grad_weight"
    c_in, c_out = (a.shape[1], b.shape[1]) if of_weight else (b.shape[1] * groups, b.shape[0])
    return _problem(
        direction, a.shape[0], c_in, c_out, groups, tuple(spatial), taps, tuple(stride), tuple(padding), a.dtype,
        layout, Device.of(a.device), bias is not None, fp32_precision(a.dtype, a.device),
        torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _taps(choice: str, direction: str, a: Tensor, b: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    problem = _problem_of(direction, a, b, bias, *geometry)
    chosen = _chosen(choice)
    a, b = a.detach(), b.detach()
    bias = None if bias is None else bias.detach().contiguous()  # kernels read it channel after channel
    if runtime.failure_of(choice, problem):  # said when it happened
        return _DENSE.run(problem, _DENSE.space(problem).default, a, b, bias)
    try:
        return compute_of(chosen.backend)(problem, chosen.config, a, b, bias)
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:
        if a.is_cuda and torch.cuda.is_current_stream_capturing():
            raise  # of a broken capture nothing can be saved, and it says nothing about the kernel
        runtime.remember_failure(choice, problem, failure)
        return _DENSE.run(problem, _DENSE.space(problem).default, a, b, bias)


def _taps_fake(choice: str, direction: str, a: Tensor, b: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    problem = _problem_of(direction, a, b, bias, *geometry)
    if problem.direction is Direction.GRAD_WEIGHT:
        return a.new_empty(problem.weight_shape)
    forward = problem.direction is Direction.FORWARD
    return laid_out(a.new_empty(problem.output_shape if forward else problem.input_shape), problem.memory_format)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("triton_taps", _taps, _key)
torch.library.register_fake("adaptconv::triton_taps", _taps_fake, lib=_LIBRARY)
torch.library.register_vmap("adaptconv::triton_taps", one_by_one(torch.ops.adaptconv.triton_taps), lib=_LIBRARY)
