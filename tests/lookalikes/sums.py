"""Sums of convolutions that are not one convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.lookalikes.base import lookalike, spread

FIVE: dict[str, Any] = {"v": (6, 4, 5, 5)}


@lookalike("sum", **FIVE)
def different_inputs(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + F.conv2d(x.flip(3), m.v, padding=2)


@lookalike("sum", **FIVE)
def one_input_detached(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + F.conv2d(x.detach(), m.v, padding=2)


@lookalike("sum", **FIVE, train=False)
def input_changed_between(m: Any, x: Tensor) -> Any:
    x = x * 1
    y = F.conv2d(x, m.w, padding=1)
    x.mul_(2)
    return y + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE, train=False)
def input_changed_through_a_view(m: Any, x: Tensor) -> Any:
    x = x * 1
    part = x[:, :2]
    y = F.conv2d(x, m.w, padding=1)
    part.zero_()
    return y + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE, train=False)
def weight_changed_between(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, padding=1)
    m.w.mul_(0.5)
    return y + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE)
def different_strides(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1, stride=2) + F.conv2d(x, m.v[..., :1, :1], padding=0)[..., ::2, ::2]


@lookalike("sum", v=(6, 2, 3, 3))
def different_groups(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + F.conv2d(x, m.v, padding=1, groups=2)


@lookalike("sum", v=(6, 4, 2, 2))
def misaligned_and_cropped(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + F.conv2d(x, m.v, padding=1)[..., :-1, :-1]


@lookalike("sum", v=(6, 4, 9, 9))
def broadcast_in_space(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + F.conv2d(x, m.v)


@lookalike("sum", v=(1, 4, 5, 5))
def broadcast_over_channels(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE, shape=(1, 4, 9, 9))
def broadcast_over_the_batch(m: Any, x: Tensor) -> Any:
    both = torch.cat([x, 2 * x])
    return F.conv2d(both, m.w, padding=1) + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE)
def one_output_used_elsewhere(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, padding=1)
    return (y + F.conv2d(x, m.v, padding=2)) * y.sigmoid()


@lookalike("sum", **FIVE)
def one_output_returned(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, padding=1)
    return y, y + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE)
def added_in_place_to_what_a_view_shows(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, padding=1)
    seen = y[:, :3]
    y += F.conv2d(x, m.v, padding=2)
    return y, seen * 2


@lookalike("sum", **FIVE)
def added_in_place_and_read_by_its_first_name(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, padding=1)
    total = y.add_(F.conv2d(x, m.v, padding=2))
    return 2 * y, 3 * total


@lookalike("sum", **FIVE)
def one_output_changed_in_place(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, padding=1)
    F.relu_(y)
    return y + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE)
def scaled_while_added(m: Any, x: Tensor) -> Any:
    return torch.add(F.conv2d(x, m.w, padding=1), F.conv2d(x, m.v, padding=2), alpha=2)


@lookalike("sum", **FIVE)
def subtracted(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) - F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE)
def multiplied(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) * F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE)
def added_into_out(m: Any, x: Tensor) -> Any:
    a, b = F.conv2d(x.detach(), m.w.detach(), padding=1), F.conv2d(x.detach(), m.v.detach(), padding=2)
    total = torch.empty_like(a)
    torch.add(a, b, out=total)
    return total + m.w.sum()


@lookalike("sum", **FIVE)
def added_to_itself(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, padding=1)
    return y + y + F.conv2d(x, m.v, padding=2).relu()


@lookalike("sum", v=lambda: nn.Parameter(torch.randn(6, 4, 5, 5, dtype=torch.float64)))
def different_dtypes(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + F.conv2d(x.double(), m.v, padding=2)


@lookalike("sum", v=lambda: nn.Parameter(torch.randn(6, 4, 5, 5, dtype=torch.bfloat16)), tolerance=2e-2)
def half_precision_beside_single(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + F.conv2d(x.bfloat16(), m.v, padding=2)


@lookalike("sum", **FIVE, tolerance=2e-2)
def one_under_autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        y = F.conv2d(x, m.w, padding=1)
    return y + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE)
def one_without_gradients(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = F.conv2d(x, m.w, padding=1)
    return y + F.conv2d(x, m.v, padding=2)


@lookalike("sum", **FIVE)
def added_without_gradients(m: Any, x: Tensor) -> Any:
    a, b = F.conv2d(x, m.w, padding=1), F.conv2d(x, m.v, padding=2)
    with torch.no_grad():
        total = a + b
    return total + m.w.sum()


@lookalike(
    "sum", a=lambda: nn.Conv2d(4, 6, 3, padding=1), b=lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")
)
def zeros_and_circles(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@lookalike("sum", a=lambda: nn.Conv2d(4, 6, 3, padding=1), b=lambda: nn.ConvTranspose2d(4, 6, 3, padding=1))
def one_of_them_transposed(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@lookalike("sum", a=lambda: nn.Conv2d(4, 6, 3, padding=1), b=lambda: nn.Conv2d(4, 6, 1))
def one_of_them_checkpointed(m: Any, x: Tensor) -> Any:
    return m.a(x) + checkpoint(m.b, x, use_reentrant=False)


@lookalike("sum", **FIVE)
def one_outside_autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            y = F.conv2d(x, m.w, padding=1)
        return y + F.conv2d(x, m.v, padding=2).float() * 0


@lookalike("sum", v=(6, 4, 3, 3), b=(6,), train=False)
def bias_changed_between(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, m.b, padding=1)
    m.b.add_(1)
    return y + F.conv2d(x, m.v, padding=2, dilation=2)


@lookalike("sum", v=(6, 4, 3, 3))
def zeros_and_reflections(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), m.w) + F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), m.v)


@lookalike("sum", v=(6, 4, 3, 3), train=False)
def padded_before_and_after_a_change(m: Any, x: Tensor) -> Any:
    x = x * 1
    p = F.pad(x, (1, 1, 1, 1))
    x.mul_(2)
    return F.conv2d(p, m.w) + F.conv2d(F.pad(x, (1, 1, 1, 1)), m.v)


@lookalike("", **FIVE)
def one_with_holes_made(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.w), padding=2) + F.conv2d(x, m.v, padding=2)


@lookalike("", v=(6, 36))
def one_unfolded(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1) + (m.v @ F.unfold(x, 3, padding=1)).view(2, 6, 9, 9)


@lookalike("", shape=(2, 4, 9, 6), b=(6,))
def a_row_added_like_a_bias(m: Any, x: Tensor) -> Any:
    """As long as there are output channels, and added along the columns."""
    return F.conv2d(x, m.w, padding=1) + m.b + F.conv2d(x, m.w.flip(2), padding=1)
