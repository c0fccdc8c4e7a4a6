"""Weights whose holes depend on values: their own, another tensor's, or chance.

Most spread a 3x3 kernel to 5x5 first and then do what makes it another kernel, so that what is left is the trap.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lookalikes.base import of_holes, spread

CORNER = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
ROWS = torch.eye(5)[:, ::2].contiguous()

# ---- values decide ----------------------------------------------------------------------------------


@of_holes()
def thresholded(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return torch.where(dense.abs() > 0.5, dense, 0.0)


@of_holes()
def thresholded_far_out(m: Any, x: Tensor) -> Any:
    """The threshold is where no probe of ordinary values goes."""
    dense = spread(m.w)
    return torch.where(dense.abs() < 1e6, dense, 0.0)


@of_holes()
def masked_by_magnitude(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return dense * (dense.abs() > 0.5)


@of_holes()
def top_half_kept(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    kept = dense.flatten(1).abs().topk(18, dim=1).indices
    mask = torch.zeros_like(dense).flatten(1).scatter(1, kept, 1.0)
    return dense * mask.view_as(dense)


@of_holes()
def rectified(m: Any, x: Tensor) -> Any:
    """The identity on positive probes."""
    return spread(m.w).relu()


@of_holes()
def shrunk(m: Any, x: Tensor) -> Any:
    return F.hardshrink(spread(m.w), 0.3)


@of_holes()
def clamped(m: Any, x: Tensor) -> Any:
    return spread(m.w).clamp(-1e4, 1e4)


@of_holes()
def rounded(m: Any, x: Tensor) -> Any:
    """The identity on probes of whole numbers."""
    return spread(4 * m.w).round()


@of_holes()
def through_integers(m: Any, x: Tensor) -> Any:
    return spread(4 * m.w).int().float()


@of_holes()
def stored_as_integers(m: Any, x: Tensor) -> Any:
    holes = torch.zeros(6, 4, 5, 5, dtype=torch.int64)
    holes[:, :, ::2, ::2] = (4 * m.w.detach()).to(torch.int64)
    return holes.float().abs()


@of_holes()
def fake_quantised(m: Any, x: Tensor) -> Any:
    return torch.fake_quantize_per_tensor_affine(spread(m.w), 0.1, 0, -128, 127)


@of_holes()
def divided_by_its_norm(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return dense / dense.norm()


@of_holes()
def standardised(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return (dense - dense.mean((1, 2, 3), keepdim=True)) / (dense.std((1, 2, 3), keepdim=True) + 1e-5)


@of_holes()
def softmax_over_taps(m: Any, x: Tensor) -> Any:
    return spread(m.w).flatten(2).softmax(-1).view(6, 4, 5, 5)


@of_holes()
def sorted_taps(m: Any, x: Tensor) -> Any:
    return spread(m.w).sort(-1).values


@of_holes()
def squared(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return dense * dense


@of_holes()
def with_a_condition_on_its_sum(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return torch.where(m.w.sum() > 1e9, torch.ones_like(dense), dense)


@of_holes()
def not_a_number_taken_out(m: Any, x: Tensor) -> Any:
    return spread(m.w).nan_to_num(0.0)


@of_holes()
def the_larger_of_two(m: Any, x: Tensor) -> Any:
    return torch.maximum(spread(m.w), torch.full((6, 4, 5, 5), -1e3))


@of_holes()
def the_largest_of_each_neighbourhood(m: Any, x: Tensor) -> Any:
    return F.max_pool2d(spread(m.w), 3, stride=1, padding=1)


@of_holes()
def scattered_by_the_larger(m: Any, x: Tensor) -> Any:
    """Zero or the weight, whichever is larger: on positive probes a plain scatter."""
    places = torch.tensor([0, 2, 4, 10, 12, 14, 20, 22, 24]).expand(6, 4, 9)
    return torch.zeros(6, 4, 25).scatter_reduce(2, places, m.w.flatten(2), "amax").view(6, 4, 5, 5)


@of_holes()
def scattered_into_products(m: Any, x: Tensor) -> Any:
    places = torch.tensor([0, 2, 4, 10, 12, 14, 20, 22, 24]).expand(6, 4, 9)
    return torch.ones(6, 4, 25).scatter_reduce(2, places, m.w.flatten(2), "prod").view(6, 4, 5, 5)


@of_holes()
def binarised(m: Any, x: Tensor) -> Any:
    return spread(m.w).sign()


@of_holes(slope=(1,))
def leaking(m: Any, x: Tensor) -> Any:
    return F.prelu(spread(m.w), m.slope)


@of_holes()
def rectified_in_place(m: Any, x: Tensor) -> Any:
    return F.relu(spread(m.w), inplace=True)


# ---- other tensors decide ---------------------------------------------------------------------------


@of_holes(mask=(torch.arange(25).reshape(5, 5) % 2).float())
def masked_by_a_buffer(m: Any, x: Tensor) -> Any:
    return spread(m.w) * m.mask


@of_holes(corner=CORNER)
def kron_with_a_buffer(m: Any, x: Tensor) -> Any:
    return torch.kron(m.w, m.corner)[..., :-1, :-1]


@of_holes(rows=ROWS)
def rows_of_a_buffer(m: Any, x: Tensor) -> Any:
    return m.rows @ m.w @ m.rows.T


@of_holes(corner=lambda: torch.nn.Parameter(CORNER.clone()))
def kron_with_a_parameter(m: Any, x: Tensor) -> Any:
    return torch.kron(m.w, m.corner)[..., :-1, :-1]


@of_holes(hat=torch.tensor([0.5, 1.0, 0.5]))
def interpolated_by_a_buffer(m: Any, x: Tensor) -> Any:
    footprint = (m.hat[:, None] * m.hat).view(1, 1, 3, 3)
    wide = F.conv_transpose2d(m.w.reshape(24, 1, 3, 3), footprint, stride=2)
    return wide.reshape(6, 4, 7, 7)[..., 1:-1, 1:-1]


@of_holes(one=lambda: torch.nn.Parameter(torch.ones(1, 1, 1, 1)))
def spread_by_a_parameter(m: Any, x: Tensor) -> Any:
    return F.conv_transpose2d(m.w.reshape(24, 1, 3, 3), m.one, stride=2).reshape(6, 4, 5, 5)


@of_holes(gate=(6, 4, 1, 1))
def gated_by_a_parameter(m: Any, x: Tensor) -> Any:
    return spread(m.w) * m.gate.sigmoid()


@of_holes(scale=(1,))
def scaled_by_a_parameter(m: Any, x: Tensor) -> Any:
    """Zeros times a scale that may be infinite are no zeros."""
    return spread(m.w) * m.scale


@of_holes(places=torch.tensor([0, 2, 4]))
def placed_by_a_buffer(m: Any, x: Tensor) -> Any:
    dense = torch.zeros(6, 4, 5, 5)
    dense[:, :, m.places[:, None], m.places[None]] = m.w
    return dense


@of_holes(places=torch.tensor([0, 1, 2, 5, 6, 7, 10, 11, 12]))
def scattered_by_a_buffer(m: Any, x: Tensor) -> Any:
    index = m.places.expand(6, 4, 9)
    return torch.zeros(6, 4, 25).scatter(2, index, m.w.flatten(2)).view(6, 4, 5, 5)


@of_holes(factor=(1,))
def shifted_by_a_parameter_set_in_a_hole(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense[0, 0, 1, 1] = m.factor[0]
    return dense * 1.0 + m.factor


@of_holes()
def of_the_input(m: Any, x: Tensor) -> Any:
    return spread(m.w) * x.mean()


@of_holes()
def turned_on_by_the_input(m: Any, x: Tensor) -> Any:
    return torch.where(x.mean() > 1e6, 0.0, spread(m.w))


# ---- chance decides -----------------------------------------------------------------------------------


@of_holes()
def dropped_out(m: Any, x: Tensor) -> Any:
    return F.dropout(spread(m.w), 0.5, training=True)


@of_holes()
def masked_at_random(m: Any, x: Tensor) -> Any:
    return spread(m.w) * torch.bernoulli(torch.full((5, 5), 0.5))


@of_holes()
def placed_at_random(m: Any, x: Tensor) -> Any:
    places = torch.randperm(5)[:3]
    dense = torch.zeros(6, 4, 5, 5)
    dense[:, :, places[:, None], places] = m.w
    return dense


@of_holes()
def turned_at_random(m: Any, x: Tensor) -> Any:
    return spread(m.w)[..., torch.randperm(5)]
