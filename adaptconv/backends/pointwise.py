"""A convolution of one tap that reads the whole input in place: a matrix product, nothing gathered and nothing moved.

What gather does for 1x1 convolutions. In a contiguous layout an image's channels are the rows of a matrix, in
channels_last all pixels of the batch are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends.base import Call, laid_out
from adaptconv.problem import Direction, Problem


def is_pointwise(problem: Problem) -> bool:
    """Whether a problem is one product over the channels: a single tap and group, no step, no padding."""
    return (
        len(problem.taps) == 1
        and problem.groups == 1
        and problem.taps.footprint is None
        and all(extent == 1 for extent in problem.taps.window)
        and all(step == 1 for step in problem.stride)
        and not any(map(any, problem.padding))
    )


def product(problem: Problem) -> Call:
    """The call of a pointwise problem; operands and result as in ``Backend.run``."""
    turned = problem.memory_format is not torch.contiguous_format
    if problem.direction is Direction.FORWARD:
        return _by_pixel(problem) if turned else _by_image(problem)
    if problem.direction is Direction.GRAD_INPUT:
        back = _by_pixel(problem) if turned else _by_image(problem)

        def into_input(dy: Tensor, w: Tensor, _: Tensor | None) -> Tensor:
            return back(dy, w.transpose(0, 1), None)

        return into_input
    return _weight_by_pixel if turned else _weight_by_image(problem)


def _by_image(problem: Problem) -> Call:
    """``y[n] = w @ x[n]``, images as ``[C, pixels]``."""
    n, spatial = problem.batch, problem.spatial

    def call(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        images = x.reshape(n, x.shape[1], -1)
        matrices = w.squeeze(2).expand(n, -1, -1)
        if bias is None:
            y = torch.bmm(matrices, images)
        elif torch.compiler.is_compiling():  # Inductor adds it with whatever comes next
            y = torch.bmm(matrices, images) + bias.unsqueeze(1)
        else:
            y = torch.baddbmm(bias.unsqueeze(1), matrices, images)
        return y.view(n, -1, *spatial)

    return call


def _by_pixel(problem: Problem) -> Call:
    """``y[p] = w @ x[p] + bias``, pixels as rows of channels."""
    axes = problem.axes
    last, first = (0, *range(2, axes + 2), 1), (0, axes + 1, *range(1, axes + 1))
    memory_format = problem.memory_format

    def call(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return laid_out(F.linear(x.permute(last), w.squeeze(2), bias).permute(first), memory_format)

    return call


def _weight_by_image(problem: Problem) -> Call:
    """``dw = sum over n of dy[n] @ x[n]^T``; summed in float32 at least."""
    dtype = problem.torch_dtype
    wide = torch.float32 if dtype.itemsize < 4 else dtype

    def call(x: Tensor, dy: Tensor, _: Tensor | None) -> Tensor:
        each = torch.bmm(dy.flatten(2), x.flatten(2).transpose(1, 2))
        return (each.sum(0, dtype=wide).to(dtype) if len(each) > 1 else each[0]).unsqueeze(2)

    return call


def _weight_by_pixel(x: Tensor, dy: Tensor, _: Tensor | None) -> Tensor:
    """``dw = dy^T @ x`` over all pixels at once."""
    rows, grads = (t.movedim(1, -1).reshape(-1, t.shape[1]) for t in (x, dy))
    return torch.mm(grads.t(), rows).unsqueeze(2)
