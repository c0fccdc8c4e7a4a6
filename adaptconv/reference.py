"""The oracle: the three directions of a convolution in float64, tap by tap, with no cleverness."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.problem import Direction, Problem


def reference(problem: Problem, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute a problem in float64 on the operands' device.

    Operands and result as in ``Backend.run``, whatever the dtype of ``a`` and ``b``; returned in float64.
    """
    a, b = a.detach().double(), b.detach().double()
    if problem.taps.footprint is not None:
        return _spread_reference(problem, a, b, bias)
    if problem.direction is Direction.FORWARD:
        return _forward(problem, a, b, None if bias is None else bias.detach().double())
    if problem.direction is Direction.GRAD_INPUT:
        return _grad_input(problem, a, b)
    return _grad_weight(problem, a, b)


def _spread_reference(problem: Problem, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Spread taps written out as plain ones, each with the sum of its shares."""
    plain, entries = problem.taps.spread()
    flat = replace(problem, taps=plain)
    if problem.direction is Direction.GRAD_WEIGHT:
        wide = reference(flat, a, b)
        dw = wide.new_zeros(problem.weight_shape)
        for own, place, value in entries:
            dw[..., own] += value * wide[..., place]
        return dw
    weight = b.new_zeros(flat.weight_shape)
    for own, place, value in entries:
        weight[..., place] += value * b[..., own]
    return reference(flat, a, weight, bias)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """Relative L2 error of a result against the oracle; inf where it is not finite."""
    if exact.numel() == 0:
        return 0.0
    difference = (result.detach().double() - exact).norm()
    error = float(difference / exact.norm().clamp_min(torch.finfo(torch.float64).tiny))
    return error if error == error else float("inf")


def _pads(problem: Problem) -> list[int]:
    return [zeros for pair in reversed(problem.padding) for zeros in pair]


def _window(problem: Problem, padded: Tensor, offset: tuple[int, ...]) -> Tensor:
    """The strided view of a padded input that one tap reads: ``[N, C_in, *out_spatial]``."""
    view = padded
    for axis, (start, step, count) in enumerate(zip(offset, problem.stride, problem.out_spatial, strict=True)):
        view = view.narrow(2 + axis, start, (count - 1) * step + 1)[
            (slice(None),) * (2 + axis) + (slice(None, None, step),)
        ]
    return view


def _forward(problem: Problem, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    n, groups = problem.batch, problem.groups
    padded = F.pad(x, _pads(problem))
    y = x.new_zeros(n, groups, problem.c_out // groups, *problem.out_spatial)
    w = w.reshape(groups, problem.c_out // groups, problem.c_in // groups, -1)
    for t, offset in enumerate(problem.taps.offsets):
        seen = _window(problem, padded, offset).reshape(n, groups, problem.c_in // groups, *problem.out_spatial)
        y += torch.einsum("goi,ngi...->ngo...", w[..., t], seen)
    y = y.reshape(problem.output_shape)
    return y if bias is None else y + bias.reshape(-1, *(1,) * problem.axes)


def _grad_input(problem: Problem, dy: Tensor, w: Tensor) -> Tensor:
    n, groups = problem.batch, problem.groups
    padded = F.pad(dy.new_zeros(problem.input_shape), _pads(problem))
    w = w.reshape(groups, problem.c_out // groups, problem.c_in // groups, -1)
    dy = dy.reshape(n, groups, problem.c_out // groups, *problem.out_spatial)
    for t, offset in enumerate(problem.taps.offsets):
        target = _window(problem, padded, offset)
        target += torch.einsum("goi,ngo...->ngi...", w[..., t], dy).reshape(target.shape)
    return F.pad(padded, [-zeros for zeros in _pads(problem)])


def _grad_weight(problem: Problem, x: Tensor, dy: Tensor) -> Tensor:
    n, groups = problem.batch, problem.groups
    padded = F.pad(x, _pads(problem))
    dy = dy.reshape(n, groups, problem.c_out // groups, *problem.out_spatial).flatten(3)
    columns = []
    for offset in problem.taps.offsets:
        seen = _window(problem, padded, offset).reshape(n, groups, problem.c_in // groups, -1)
        columns.append(torch.einsum("ngop,ngip->goi", dy, seen).reshape(problem.c_out, -1))
    if not columns:
        return x.new_zeros(problem.weight_shape)
    return torch.stack(columns, dim=2)
