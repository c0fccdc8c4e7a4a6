"""Unfolded columns that are not multiplied by one weight, or no longer what was unfolded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.lookalikes.base import lookalike

UNFOLDED: dict[str, Any] = {"w": (6, 36)}


@lookalike("unfold", w=(2, 6, 36))
def unfolded_with_a_weight_for_each_image(m: Any, x: Tensor) -> Any:
    return torch.bmm(m.w, F.unfold(x, 3, padding=1)).view(2, 6, 9, 9)


@lookalike("unfold", w=(49, 6))
def unfolded_and_contracted_over_places(m: Any, x: Tensor) -> Any:
    return torch.einsum("nkl,lo->nko", F.unfold(x, 3), m.w)


@lookalike("unfold", w=(49, 36))
def unfolded_with_a_weight_for_each_place(m: Any, x: Tensor) -> Any:
    """A locally connected layer."""
    return torch.einsum("nkl,lk->nl", F.unfold(x, 3), m.w)


@lookalike("unfold", w=(4, 9))
def unfolded_and_weighted_by_the_input(m: Any, x: Tensor) -> Any:
    """An involution: the kernel of each place comes from the place."""
    kernel = torch.einsum("nchw,ck->nkhw", x, m.w).view(2, 1, 9, 81)
    return (F.unfold(x, 3, padding=1).view(2, 4, 9, 81) * kernel).sum(2).view(2, 4, 9, 9)


@lookalike("unfold")
def unfolded_and_its_largest_taken(m: Any, x: Tensor) -> Any:
    return F.unfold(x, 3, padding=1).view(2, 4, 9, 81).amax(2) * m.w.sum()


@lookalike("unfold")
def unfolded_against_itself(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3)
    return columns.transpose(1, 2) @ columns * m.w.mean()


@lookalike("unfold", **UNFOLDED)
def unfolded_and_changed_in_place(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3, padding=1)
    columns[:, 4] = 1.0
    return (m.w @ columns).view(2, 6, 9, 9)


@lookalike("unfold", **UNFOLDED)
def unfolded_and_changed_through_a_view(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3, padding=1)
    columns.view(2, 4, 9, 81)[:, :, 4].mul_(2.0)
    return (m.w @ columns).view(2, 6, 9, 9)


@lookalike("unfold", **UNFOLDED)
def unfolded_and_rectified(m: Any, x: Tensor) -> Any:
    return (m.w @ F.unfold(x, 3, padding=1).relu()).view(2, 6, 9, 9)


@lookalike("unfold", **UNFOLDED)
def unfolded_and_dropped_out(m: Any, x: Tensor) -> Any:
    return (m.w @ F.dropout(F.unfold(x, 3, padding=1), 0.5)).view(2, 6, 9, 9)


@lookalike("unfold", **UNFOLDED)
def input_changed_after_it_was_unfolded(m: Any, x: Tensor) -> Any:
    x = x * 1
    columns = F.unfold(x, 3, padding=1)
    x.mul_(2)
    return (m.w @ columns).view(2, 6, 9, 9) + x.mean()


@lookalike("unfold", **UNFOLDED)
def unfolded_without_gradients(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        columns = F.unfold(x, 3, padding=1)
    return (m.w @ columns).view(2, 6, 9, 9)


@lookalike("", **UNFOLDED)
def input_changed_after_the_product(m: Any, x: Tensor) -> Any:
    x = x * 1
    y = (m.w @ F.unfold(x, 3, padding=1)).view(2, 6, 9, 9)
    F.relu_(x)
    return y + x.mean()


@lookalike("", **UNFOLDED)
def unfolded_and_used_elsewhere(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3, padding=1)
    return (m.w @ columns).view(2, 6, 9, 9), columns.sin()


@lookalike("", **UNFOLDED)
def unfolded_with_taps_before_channels(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3, padding=1).view(2, 4, 9, 81).transpose(1, 2).reshape(2, 36, 81)
    return (m.w @ columns).view(2, 6, 9, 9)


@lookalike("", w=(3, 6, 36))
def unfolded_with_three_weights(m: Any, x: Tensor) -> Any:
    return m.w[:, None] @ F.unfold(x, 3, padding=1)


@lookalike("", **UNFOLDED)
def unfolded_and_seen_in_another_shape(m: Any, x: Tensor) -> Any:
    return (m.w @ F.unfold(x, 3, padding=1)).view(2, 9, 6, 9)


@lookalike("", **UNFOLDED)
def unfolded_and_folded_with_overlap(m: Any, x: Tensor) -> Any:
    return F.fold((m.w[:4] @ F.unfold(x, 3, stride=2)), (7, 7), (2, 2), dilation=2, stride=2, padding=1)[..., :5]


@lookalike("", **UNFOLDED, tolerance=2e-2)
def unfolded_under_autocast(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        return m.w @ columns


@lookalike("", w=(6, 36), b=(6,), shape=(2, 4, 3, 2))
def a_row_of_places_added_like_a_bias(m: Any, x: Tensor) -> Any:
    """As many places as output channels: the six numbers go along the places."""
    return (m.w @ F.unfold(x, 3, padding=1) + m.b).view(2, 6, 3, 2)


@lookalike("", w=(6, 36), b=(6, 1, 1), shape=(6, 4, 5, 5))
def an_image_each_added_like_a_bias(m: Any, x: Tensor) -> Any:
    return m.w @ F.unfold(x, 3, padding=1) + m.b


@lookalike("", **UNFOLDED)
def unfolded_and_summed_over_places(m: Any, x: Tensor) -> Any:
    return torch.einsum("ok,nkl->no", m.w, F.unfold(x, 3, padding=1))


@lookalike("", **UNFOLDED)
def unfolded_with_places_first(m: Any, x: Tensor) -> Any:
    return torch.einsum("ok,nkl->lno", m.w, F.unfold(x, 3, padding=1))


@lookalike("", **UNFOLDED)
def unfolded_with_dots_in_its_letters(m: Any, x: Tensor) -> Any:
    return torch.einsum("ok,...kl->...ol", m.w, F.unfold(x, 3, padding=1))


@lookalike("", **UNFOLDED)
def unfolded_with_channels_last(m: Any, x: Tensor) -> Any:
    return F.unfold(x, 3, padding=1).transpose(1, 2) @ m.w.t()


@lookalike("", **UNFOLDED, shape=(4, 9, 9))
def unfolded_without_a_batch(m: Any, x: Tensor) -> Any:
    return m.w @ F.unfold(x, 3, padding=1)


@lookalike("", **UNFOLDED)
def unfolded_and_convolved(m: Any, x: Tensor) -> Any:
    return F.conv1d(F.unfold(x, 3, padding=1), m.w[:, :, None], padding=1)


@lookalike("", **UNFOLDED, v=(6, 36))
def unfolded_twice_and_added(m: Any, x: Tensor) -> Any:
    return m.w @ F.unfold(x, 3, padding=1) + m.v @ F.unfold(x, 3, padding=2, dilation=2)


@lookalike("", w=(2, 3, 18))
def unfolded_in_groups(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3, padding=1).view(2, 2, 18, 81)
    return (m.w @ columns).view(2, 6, 9, 9)


@lookalike("", **UNFOLDED)
def unfolded_with_the_batch_among_places(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3, padding=1).permute(1, 0, 2).reshape(36, -1)
    return (m.w @ columns).view(6, 2, 9, 9).transpose(0, 1)


@lookalike("", **UNFOLDED)
def unfolded_and_detached(m: Any, x: Tensor) -> Any:
    return (m.w @ F.unfold(x, 3, padding=1).detach()).view(2, 6, 9, 9)
