"""``adaptconv::cpp_taps``: one opaque op around the kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from adaptconv.backends.base import one_by_one
from adaptconv.backends.cpp import build
from adaptconv.backends.cpp.layout import DTYPES, Geometry, geometry
from adaptconv.backends.dense import Dense
from adaptconv.errors import ConvArgumentError
from adaptconv.problem import Device, Direction, Problem
from adaptconv.taps import TapPattern

_DENSE = Dense()

_LIBRARY = torch.library.Library("adaptconv", "FRAGMENT")
_LIBRARY.define(
    "cpp_taps(str direction, Tensor a, Tensor b, Tensor? bias, str taps, int[] stride, int[] padding, int groups,"
    " int rows, int tile_kib) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@lru_cache(maxsize=4096)
def _problem(
    direction: str, a_shape: tuple[int, ...], channels: int, dtype: torch.dtype, taps: str, stride: tuple[int, ...],
    padding: tuple[int, ...], groups: int, bias: bool, threads: int,
) -> Problem:  # fmt: skip
    pairs = tuple((padding[i], padding[i + 1]) for i in range(0, len(padding), 2))
    return Problem(
        Direction(direction), a_shape[0], a_shape[1], channels, groups, a_shape[2:], TapPattern.parse(taps), stride,
        pairs, str(dtype).removeprefix("torch."), "contiguous", Device("cpu", "", threads), bias,
    )  # fmt: skip


def _problem_of(
    direction: str, a: Tensor, b: Tensor, bias: Tensor | None, taps: str, stride: Sequence[int],
    padding: Sequence[int], groups: int, threads: int,
) -> Problem:  # fmt: skip
    channels = b.shape[1] if direction == "grad_weight" else b.shape[0]
    return _problem(
        direction, tuple(a.shape), channels, a.dtype, taps, tuple(stride), tuple(padding), groups, bias is not None,
        threads,
    )  # fmt: skip


def _taps(
    direction: str, a: Tensor, b: Tensor, bias: Tensor | None, taps: str, stride: Sequence[int],
    padding: Sequence[int], groups: int, rows: int, tile_kib: int,
) -> Tensor:  # fmt: skip
    threads = torch.get_num_threads()
    problem = _problem_of(direction, a, b, bias, taps, stride, padding, groups, threads)
    _check(problem, rows, tile_kib, a, b, bias)
    try:
        return _computed(build.library(), geometry(problem, rows, tile_kib), threads, a, b, bias)
    except build.BuildFailed:  # said once, when it happened
        return _DENSE.run(problem, _DENSE.space(problem).default, a, b, bias)


def _check(problem: Problem, rows: int, tile_kib: int, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """What the kernel takes on trust; the op can be called by anybody."""
    forward = problem.direction is Direction.FORWARD
    extents = (problem.stride, problem.padding, problem.taps.window)
    sound = (
        a.dtype in DTYPES
        and b.dtype is a.dtype
        and b.device.type == "cpu"
        and problem.direction is not Direction.GRAD_INPUT
        and problem.groups > 0
        and problem.c_in % problem.groups == 0 == problem.c_out % problem.groups
        and all(len(each) == problem.axes for each in extents)
        and min(problem.stride) > 0
        and problem.taps.footprint is None
        and min(problem.out_spatial) > 0
        and tuple(b.shape) == (problem.weight_shape if forward else problem.output_shape)
        and (bias is None or (bias.dtype is a.dtype and bias.device.type == "cpu" and bias.shape == b.shape[:1]))
        and rows in (1, 4)
        and tile_kib > 0
    )
    if not sound:
        raise ConvArgumentError(
            f"adaptconv::cpp_taps got operands {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype} that do not "
            f"belong to {problem}; it expects a FORWARD or GRAD_WEIGHT problem of one dtype on the CPU, and its extents"
        )


def _computed(
    library: build.Library, shape: Geometry, threads: int, a: Tensor, b: Tensor, bias: Tensor | None
) -> Tensor:
    a, b = a.detach().contiguous(), b.detach().contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    forward = shape.spec[0] == 0
    result = a.new_empty(shape.shape) if forward else a.new_empty(shape.partial, dtype=torch.float64)
    spec = (ctypes.c_int64 * (len(shape.spec) + 1))(*shape.spec, threads)
    failed = library.taps(
        spec, shape.steps, a.data_ptr(), b.data_ptr(), None if bias is None else bias.data_ptr(),
        result.data_ptr(), library.parallel,
    )  # fmt: skip
    if failed:
        raise MemoryError("the C++ tap kernel found no memory for its buffers")
    if forward:
        return result
    total = result[:, 0]
    for part in range(1, shape.partial[1]):
        total = total + result[:, part]
    if shape.live is not None:
        full = total.new_zeros(total.shape[0], shape.shape[2])
        full[:, list(shape.live)] = total
        total = full
    return total.to(a.dtype).reshape(shape.shape).contiguous()


def _taps_fake(
    direction: str, a: Tensor, b: Tensor, bias: Tensor | None, taps: str, stride: Sequence[int],
    padding: Sequence[int], groups: int, rows: int, tile_kib: int,
) -> Tensor:  # fmt: skip
    problem = _problem_of(direction, a, b, bias, taps, stride, padding, groups, 1)
    return a.new_empty(problem.output_shape if direction == "forward" else problem.weight_shape)


_LIBRARY.impl("cpp_taps", _taps, "CPU")
torch.library.register_fake("adaptconv::cpp_taps", _taps_fake, lib=_LIBRARY)
torch.library.register_vmap("adaptconv::cpp_taps", one_by_one(torch.ops.adaptconv.cpp_taps), lib=_LIBRARY)
