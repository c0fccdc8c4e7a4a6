"""Kernels with holes that may be taken for what they are: their gradients stop, or their leaves change around them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalikes.base import lookalike, of_holes, spread
from tests.lookalikes.holes import Doubled

# ---- gradients that stop or change -----------------------------------------------------------------


@of_holes(seems="")
def made_of_the_detached_weight(m: Any, x: Tensor) -> Any:
    return spread(m.w.detach())


@of_holes(seems="")
def made_of_the_data(m: Any, x: Tensor) -> Any:
    return spread(m.w.data)


@of_holes(seems="")
def detached_once_made(m: Any, x: Tensor) -> Any:
    return spread(m.w).detach()


@of_holes(seems="")
def made_without_gradients(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        return spread(m.w)


@of_holes(seems="")
def written_without_gradients(m: Any, x: Tensor) -> Any:
    dense = m.w.new_zeros(6, 4, 5, 5)
    with torch.no_grad():
        dense[:, :, ::2, ::2] = m.w
    return dense


@of_holes(seems="")
def half_without_gradients(m: Any, x: Tensor) -> Any:
    return spread(torch.cat([m.w[:3], m.w[3:].detach()]))


@of_holes(seems="")
def twice_once_without_gradients(m: Any, x: Tensor) -> Any:
    holes = torch.zeros(6, 4, 3, 2)
    return F.pad(torch.cat([m.w.detach()[..., :1], holes, m.w[..., 2:]], -1)[..., :5], (0, 0, 1, 1))[..., :5]


@of_holes(seems="")
def a_gradient_of_its_own_before_the_holes(m: Any, x: Tensor) -> Any:
    return spread(Doubled.apply(m.w))


@of_holes(seems="", w=lambda: nn.Parameter(torch.randn(6, 4, 3, 3), requires_grad=False))
def a_weight_that_is_not_trained(m: Any, x: Tensor) -> Any:
    return spread(m.w)


@of_holes(seems="", v=lambda: nn.Parameter(torch.randn(6, 4, 2, 3), requires_grad=False))
def half_of_it_not_trained(m: Any, x: Tensor) -> Any:
    dense = m.w.new_zeros(6, 4, 5, 5)
    dense[:, :, ::2, ::2] = m.w
    dense[:, :, 1::2, ::2] = m.v
    return dense


@of_holes(seems="")
def asked_for_gradients_halfway(m: Any, x: Tensor) -> Any:
    leaf = m.w.detach().clone().requires_grad_()
    return spread(leaf)


def hooked() -> nn.Parameter:
    weight = nn.Parameter(torch.randn(6, 4, 3, 3))
    weight.register_hook(lambda g: g * 3)
    return weight


@of_holes(seems="", w=hooked)
def a_leaf_with_a_gradient_hook(m: Any, x: Tensor) -> Any:
    return spread(m.w)


# ---- changed before, between and after ----------------------------------------------------------------


@of_holes(seems="")
def scaled_in_place(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.mul_(2)
    return dense


@of_holes(seems="", v=(6, 4, 5, 2))
def holes_filled_by_another(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense[..., 1::2] = m.v
    return dense


@of_holes(seems="")
def written_twice(m: Any, x: Tensor) -> Any:
    """The second writing covers part of the first, whose gradient must not see it."""
    dense = spread(m.w)
    dense[:, :, 2:, ::2] = m.w[:, :, :2].repeat_interleave(2, 2)[:, :, 1:]
    return dense


@of_holes(seems="")
def added_onto(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense[:, :, 1:4, 1:4] += m.w
    return dense


@lookalike()
def leaf_changed_before_its_use(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    with torch.no_grad():
        m.w.mul_(2)
    return F.conv2d(x, dense, padding=2)


@lookalike()
def leaf_changed_past_autograd(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    m.w.detach().add_(0.5)
    return F.conv2d(x, dense, padding=2)


@lookalike()
def leaf_changed_after_its_use(m: Any, x: Tensor) -> Any:
    """Torch saves the kernel with its holes for the backward pass, not the leaf that is changed here."""
    y = F.conv2d(x, spread(m.w), padding=2)
    with torch.no_grad():
        m.w.mul_(0.5)
    return y


@lookalike()
def flipped_leaf_changed_after_its_use(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w.flip(2, 3), padding=1)
    with torch.no_grad():
        m.w.mul_(0.5)
    return y


@lookalike(kept=torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3)))
def buffer_changed_between(m: Any, x: Tensor) -> Any:
    dense = spread(m.kept)
    m.kept.mul_(0.9)
    return F.conv2d(x, dense, padding=2) * m.w.sum()


@lookalike(kept=torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3)))
def buffer_changed_after(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, spread(m.kept), padding=2)
    m.kept.add_(m.w.detach())
    return y


@lookalike(kept=torch.zeros(6, 4, 5, 5))
def written_into_a_buffer_that_stays(m: Any, x: Tensor) -> Any:
    """The buffer keeps what the last call wrote beside the taps of this one."""
    kept = m.kept.clone()
    m.kept[..., 1] += 1
    kept[:, :, ::2, ::2] = m.w
    return F.conv2d(x, kept, padding=2)


@lookalike()
def used_twice_with_a_change_between(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    first = F.conv2d(x, dense.clone(), padding=2)
    dense[:, :, ::2, ::2] = m.w.flip(3)
    return first, F.conv2d(x, dense, padding=2)


@of_holes(seems="")
def turned_in_place(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense.transpose_(2, 3)
    return dense


@lookalike(kept=torch.zeros(6, 4, 5, 5))
def copied_into_a_buffer_too(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    m.kept.copy_(dense.detach())
    return F.conv2d(x, dense, padding=2)


@lookalike(train=False)
def cleared_after_its_use(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    y = F.conv2d(x, dense, padding=2)
    dense.zero_()
    return y + dense.sum()


@lookalike()
def made_once_and_used_twice(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return F.conv2d(x, dense, padding=2), F.conv2d(2 * x, dense, stride=2), dense * 3
