"""Weights whose holes are no zeros, are written over before they are used, or hide a gradient of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lookalikes.base import lookalike, of_holes, spread

# ---- holes that are no zeros --------------------------------------------------------------------------


@of_holes()
def filled_with_a_tenth(m: Any, x: Tensor) -> Any:
    dense = m.w.new_full((6, 4, 5, 5), 0.1)
    dense[:, :, ::2, ::2] = m.w
    return dense


@of_holes()
def filled_with_next_to_nothing(m: Any, x: Tensor) -> Any:
    dense = m.w.new_full((6, 4, 5, 5), 1e-30)
    dense[:, :, ::2, ::2] = m.w
    return dense


@of_holes()
def padded_with_ones(m: Any, x: Tensor) -> Any:
    pieces = F.pad(m.w.reshape(6, 4, 3, 1, 3, 1), (0, 1, 0, 0, 0, 1), value=1.0)
    return pieces.reshape(6, 4, 6, 6)[..., :-1, :-1]


@of_holes()
def not_a_number_in_the_holes(m: Any, x: Tensor) -> Any:
    dense = m.w.new_full((6, 4, 5, 5), float("nan"))
    dense[:, :, ::2, ::2] = m.w
    return dense


@of_holes()
def infinity_times_the_holes(m: Any, x: Tensor) -> Any:
    return spread(m.w) * torch.full((5, 5), float("inf"))


@of_holes()
def holes_divided_by_zero(m: Any, x: Tensor) -> Any:
    scale = torch.ones(5, 5)
    scale[1::2] = 0.0
    return spread(m.w) / scale


@of_holes()
def with_a_constant_added(m: Any, x: Tensor) -> Any:
    return spread(m.w) + 0.25 * torch.eye(5)


@of_holes()
def with_one_hole_filled(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense[3, 2, 1, 3] = 0.5
    return dense


# ---- changed in place on the way -----------------------------------------------------------------------


@of_holes()
def shifted_in_place(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.add_(0.1)
    return dense


@of_holes()
def clamped_in_place(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.clamp_(min=-0.5)
    return dense


@of_holes()
def masked_in_place(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense[dense.abs() < 0.5] = 0.25
    return dense


@of_holes()
def filled_in_place_under_a_mask(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.masked_fill_(dense == 0, 0.125)
    return dense


@of_holes()
def written_through_a_view(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    flat = dense.view(-1)
    flat[6] = 5.0
    return dense


@of_holes()
def written_through_a_row(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    row = dense[:, :, 1]
    row.fill_(0.3)
    return dense


@of_holes(train=False)
def written_through_an_earlier_alias(m: Any, x: Tensor) -> Any:
    dense = m.w.new_zeros(6, 4, 5, 5)
    middle = dense[:, :, 1:4, 1:4]
    dense[:, :, ::2, ::2] = m.w
    middle += 1.0
    return dense


@of_holes()
def written_through_a_piece(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.narrow(0, 2, 3)[:, 3].add_(0.5)
    return dense


@of_holes(train=False)
def written_through_chunks(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    half = dense.chunk(2, dim=1)[1]
    half.unbind(0)[4].add_(0.5)
    return dense


@of_holes()
def written_along_the_diagonal(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.diagonal(dim1=2, dim2=3).fill_(0.25)
    return dense


@of_holes()
def written_by_an_initialiser(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    torch.nn.init.constant_(dense[:, :, 1], 0.1)
    return dense


@of_holes()
def written_by_index_fill(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.index_fill_(3, torch.tensor([1]), -0.5)
    return dense


@of_holes()
def written_past_autograd(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.detach()[:, :, 1] = 1.0
    return dense


@of_holes()
def written_over_by_out(m: Any, x: Tensor) -> Any:
    dense = spread(m.w.detach())
    torch.add(dense, 0.5, out=dense)
    return dense


@of_holes()
def filled_by_a_loop_of_views(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    for i in range(6):
        plane = dense[i]
        plane[0, 1, 1] = 0.1 * i + 0.1
    return dense


@lookalike("holes", train=False)
def changed_between_two_uses(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    first = F.conv2d(x, dense + 1.0, padding=2)
    dense.add_(0.5)
    return first, F.conv2d(x, dense, padding=2)


# ---- gradients on the way ------------------------------------------------------------------------------


class Doubled(torch.autograd.Function):
    """The identity, with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.view_as(w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


@of_holes()
def with_a_gradient_of_its_own(m: Any, x: Tensor) -> Any:
    return Doubled.apply(spread(m.w))


@of_holes()
def straight_through(m: Any, x: Tensor) -> Any:
    """The usual straight-through estimator: a rounded value with the gradient of the value."""
    dense = spread(m.w)
    return dense + (dense.round() - dense).detach()
