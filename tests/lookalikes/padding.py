"""Padding that is no zero padding of the convolution that follows, or no longer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalikes.base import lookalike


@lookalike("padding")
def padded_with_a_one(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), m.w)


@lookalike("padding")
def padded_with_next_to_nothing(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1e-30), m.w)


@lookalike("padding")
def padded_with_minus_infinity(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), value=float("-inf")), m.w)


@lookalike("padding", pad=lambda: nn.ConstantPad2d(1, 0.5))
def padded_by_a_module_with_a_half(m: Any, x: Tensor) -> Any:
    return F.conv2d(m.pad(x), m.w)


@lookalike("padding")
def cropped_by_negative_padding(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (-1, -2, -1, 0)), m.w)


@lookalike("padding")
def padded_here_and_cropped_there(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (2, -1, 1, 1)), m.w)


@lookalike("padding", w=(6, 6, 3, 3))
def channels_padded(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1, 1, 1)), m.w)


@lookalike("padding")
def batch_padded(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1, 0, 0, 1, 0)), m.w)


@lookalike("padding")
def reflected(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), m.w)


@lookalike("padding")
def padded_then_changed_in_place(m: Any, x: Tensor) -> Any:
    p = F.pad(x, (1, 1, 1, 1))
    p[..., 0] = 1.0
    return F.conv2d(p, m.w)


@lookalike("padding")
def padded_then_shifted_in_place(m: Any, x: Tensor) -> Any:
    p = F.pad(x, (1, 1, 1, 1))
    p.add_(0.5)
    return F.conv2d(p, m.w)


@lookalike("padding")
def padded_then_written_through_a_view(m: Any, x: Tensor) -> Any:
    p = F.pad(x, (1, 1, 1, 1))
    edge = p[:, :, 0]
    edge += 1.0
    return F.conv2d(p, m.w)


@lookalike("padding")
def padded_then_shifted(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1)) + 0.5, m.w)


@lookalike("padding")
def padded_then_normalised(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.layer_norm(F.pad(x, (1, 1, 1, 1)), (11, 11)), m.w)


@lookalike("padding")
def input_changed_after_it_was_padded(m: Any, x: Tensor) -> Any:
    """The padded copy holds what the input was."""
    x = x * 1
    p = F.pad(x, (1, 1, 1, 1))
    x.mul_(3)
    return F.conv2d(p, m.w) + x.mean()


@lookalike("padding")
def input_changed_through_a_view_after_it_was_padded(m: Any, x: Tensor) -> Any:
    x = x * 1
    some = x[:, 1:3]
    p = F.pad(x, (1, 1, 1, 1))
    some.neg_()
    return F.conv2d(p, m.w) + x.mean()


@lookalike("padding")
def padded_then_rectified_in_place(m: Any, x: Tensor) -> Any:
    p = F.pad(x, (1, 1, 1, 1))
    F.relu(p, inplace=True)
    return F.conv2d(p, m.w)


@lookalike("padding", act=lambda: nn.LeakyReLU(0.1, inplace=True))
def input_rectified_by_a_module_after_it_was_padded(m: Any, x: Tensor) -> Any:
    x = x * 1
    p = F.pad(x, (1, 1, 1, 1))
    m.act(x)
    return F.conv2d(p, m.w) + x.mean()


@lookalike("padding")
def input_set_after_it_was_padded(m: Any, x: Tensor) -> Any:
    x = x * 1
    p = F.pad(x, (1, 1, 1, 1))
    x[:, 0] = 1.0
    return F.conv2d(p, m.w) + x.mean()


@lookalike("padding", train=False)
def input_written_over_by_out_after_it_was_padded(m: Any, x: Tensor) -> Any:
    x = x * 1
    p = F.pad(x, (1, 1, 1, 1))
    torch.neg(x, out=x)
    return F.conv2d(p, m.w) + x.mean()


@lookalike("")
def input_changed_after_the_convolution(m: Any, x: Tensor) -> Any:
    """The padded copy is what the weight's gradient needs, and it does not change."""
    x = x * 1
    y = F.conv2d(F.pad(x, (1, 1, 1, 1)), m.w)
    F.relu_(x)
    return y + x.mean()


@lookalike("padding")
def padded_without_gradients(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        p = F.pad(x, (1, 1, 1, 1))
    return F.conv2d(p, m.w)


@lookalike("")
def padded_and_detached(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1)).detach(), m.w)


@lookalike("")
def padded_and_used_elsewhere(m: Any, x: Tensor) -> Any:
    p = F.pad(x, (1, 1, 1, 1))
    return F.conv2d(p, m.w), p.cos()


@lookalike("")
def padded_wider_than_the_kernel(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (5, 1, 0, 4)), m.w, padding=1)


@lookalike("")
def padded_twice(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(F.pad(x, (1, 0, 0, 0)), (0, 1, 2, 0)), m.w)


@lookalike("")
def padded_with_zeros_around_ones(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(F.pad(x, (1, 1, 1, 1), value=1.0), (1, 1, 1, 1)), m.w)


@lookalike("", tolerance=2e-2)
def padded_outside_autocast(m: Any, x: Tensor) -> Any:
    p = F.pad(x, (1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        return F.conv2d(p, m.w)


@lookalike("", shape=(4, 9, 9))
def unbatched_and_padded(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), m.w)
