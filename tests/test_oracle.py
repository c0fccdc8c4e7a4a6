"""The oracle itself against torch's convolution and autograd in float64, wherever torch can say the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.problem import Direction
from adaptconv.reference import reference, relative_error
from tests.cases import CASES, Case

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TIGHT = 1e-13  # float64 against float64: only the order of additions differs


def by_torch(case: Case, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """The case with its taps as zeros in a dense window, written without any of adaptconv's own helpers."""
    problem = case.problem(Direction.FORWARD)
    dense = torch.zeros(*w.shape[:2], *problem.taps.window, dtype=w.dtype, requires_grad=True).clone()
    for t, offset in enumerate(problem.taps.offsets):
        values = problem.taps.footprint or ((1.0,),) * problem.axes
        spread = torch.ones((), dtype=w.dtype)
        for axis_values in values:
            spread = spread[..., None] * torch.tensor(axis_values, dtype=w.dtype)
        place = tuple(slice(o, o + extent) for o, extent in zip(offset, spread.shape, strict=True))
        dense[(..., *place)] += w[..., t].reshape(*w.shape[:2], *(1,) * spread.dim()) * spread
    padded = F.pad(x, [zeros for pair in reversed(case.padding) for zeros in pair])
    return CONV[len(case.spatial)](padded, dense, bias, case.stride, 0, 1, case.groups)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_direction_is_torchs_value_and_gradient(case: Case) -> None:
    problem = case.problem(Direction.FORWARD)
    x = torch.randn(problem.input_shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(problem.weight_shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(case.c_out, dtype=torch.float64) if case.bias else None
    y = by_torch(case, x, w, bias)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy, materialize_grads=True)  # no taps: w is not read
    assert tuple(y.shape) == problem.output_shape
    found = {
        "y": (reference(problem, x, w, bias), y),
        "dx": (reference(problem.facing(Direction.GRAD_INPUT), dy, w), dx),
        "dw": (reference(problem.facing(Direction.GRAD_WEIGHT), x, dy), dw),
    }
    for name, (ours, theirs) in found.items():
        assert ours.shape == theirs.shape, name
        assert ours.dtype is torch.float64
        assert relative_error(ours, theirs.detach()) < TIGHT, name


@pytest.mark.parametrize("dilation", [1, (2, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, (2, 1), 3])
def test_a_dilated_grid_is_torchs_own_dilation(dilation: int | tuple[int, int], groups: int, stride: int) -> None:
    d = (dilation,) * 2 if isinstance(dilation, int) else dilation
    s = (stride,) * 2 if isinstance(stride, int) else stride
    case = Case("x", 2, 4, 8, groups, (13, 14), f"3x2d{d[0]}x{d[1]}", s, ((2, 2), (1, 1)), bias=True)
    problem = case.problem(Direction.FORWARD)
    x = torch.randn(problem.input_shape, dtype=torch.float64)
    w = torch.randn(8, 4 // groups, 3, 2, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    theirs = F.conv2d(x, w, bias, s, (2, 1), d, groups)
    assert relative_error(reference(problem, x, w.flatten(2), bias), theirs) < TIGHT


def test_operands_of_any_dtype_are_widened_before_anything_is_multiplied() -> None:
    problem = CASES[0].problem(Direction.FORWARD, torch.bfloat16)
    x = torch.randn(problem.input_shape).bfloat16()
    w = torch.randn(problem.weight_shape).bfloat16()
    assert torch.equal(reference(problem, x, w), reference(problem, x.double(), w.double()))


def test_a_relative_error_is_zero_only_for_the_exact_answer() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(exact.clone(), exact) == 0.0
    assert relative_error(exact + torch.tensor([0.5, 0.0]), exact) == pytest.approx(0.1)
    assert relative_error(torch.full_like(exact, float("nan")), exact) == float("inf")
    assert relative_error(torch.full_like(exact, 1e-9), torch.zeros_like(exact)) > 1.0
    assert relative_error(torch.empty(0), torch.empty(0, dtype=torch.float64)) == 0.0
