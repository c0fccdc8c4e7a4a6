"""Weights that are linear in what they are made from, and that are easily taken for a little more than that."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tests.lookalikes.base import lookalike, of_holes, spread

# ---- rounded on the way ---------------------------------------------------------------------------------


@of_holes(seems="")
def held_in_half_precision(m: Any, x: Tensor) -> Any:
    dense = torch.zeros(6, 4, 5, 5, dtype=torch.bfloat16)
    dense[:, :, ::2, ::2] = m.w
    return dense.float()


@of_holes(seems="")
def rounded_to_half_precision_at_last(m: Any, x: Tensor) -> Any:
    return spread(m.w).half().float()


@of_holes(seems="", w=lambda: nn.Parameter(torch.randn(6, 4, 3, 3, dtype=torch.float64)))
def kept_in_double_precision(m: Any, x: Tensor) -> Any:
    return spread(m.w).float()


@of_holes(seems="")
def rounded_by_autocast(m: Any, x: Tensor) -> Any:
    """The products that place the taps are made in half precision, and round them."""
    rows = torch.eye(5)[:, ::2]
    with torch.autocast("cpu", torch.bfloat16):
        dense = rows @ m.w @ rows.T
    return dense.float()


@of_holes(seems="")
def rounded_by_autocast_in_a_transposed_convolution(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        dense = F.conv_transpose2d(m.w.reshape(24, 1, 3, 3), torch.ones(1, 1, 1, 1), stride=2)
    return dense.reshape(6, 4, 5, 5).float()


@of_holes(seems="", train=False)
def written_into_integers(m: Any, x: Tensor) -> Any:
    dense = torch.zeros(6, 4, 5, 5, dtype=torch.int64)
    dense[:, :, ::2, ::2] = 4 * m.w
    return dense.float()


@lookalike(w=lambda: nn.Parameter(torch.randn(6, 4, 3, 3, dtype=torch.float64)), dtype=torch.float64)
def single_precision_in_between(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.w.float()).double(), padding=2)


@lookalike(dtype=torch.complex64, w=lambda: nn.Parameter(torch.randn(6, 4, 3, 3, dtype=torch.complex64)))
def complex_numbers(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.w), padding=2)


@of_holes(seems="", w=lambda: nn.Parameter(torch.randn(6, 4, 3, 3, dtype=torch.complex64)))
def the_real_part_of_complex_numbers(m: Any, x: Tensor) -> Any:
    return spread(m.w).real * 1.0


@lookalike(dtype=torch.int64, train=False, w=torch.arange(-108, 108).reshape(6, 4, 3, 3))
def whole_numbers(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.w), padding=2)


# ---- linear, but no scatter ------------------------------------------------------------------------------


@of_holes(seems="")
def kron_with_two_different_weights(m: Any, x: Tensor) -> Any:
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    return torch.kron(m.w, mask)[..., :-1, :-1]


@of_holes(seems="")
def kron_with_a_corner_of_two(m: Any, x: Tensor) -> Any:
    mask = torch.zeros(2, 2)
    mask[0, 0] = 2.0
    return torch.kron(m.w, mask)[..., :-1, :-1]


@of_holes(seems="")
def negated(m: Any, x: Tensor) -> Any:
    return -spread(m.w)


@of_holes(seems="")
def every_tap_twice(m: Any, x: Tensor) -> Any:
    return m.w.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :5, :5]


@of_holes(seems="")
def one_tap_everywhere(m: Any, x: Tensor) -> Any:
    return m.w[:, :, :1, :1].expand(6, 4, 5, 5)


@of_holes(seems="")
def nearest_neighbours(m: Any, x: Tensor) -> Any:
    return F.interpolate(m.w, size=(5, 5), mode="nearest")


@of_holes(seems="")
def bilinear(m: Any, x: Tensor) -> Any:
    return F.interpolate(m.w, size=(5, 5), mode="bilinear", align_corners=True)


@of_holes(seems="")
def symmetric(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return dense + dense.flip(2, 3)


@of_holes(seems="")
def symmetric_and_averaged(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return (dense + dense.transpose(2, 3)) / 2


@of_holes(seems="")
def summed_up(m: Any, x: Tensor) -> Any:
    return spread(m.w).cumsum(-1)


@of_holes(seems="")
def mean_free(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return dense - dense.mean()


@of_holes(seems="", v=(6, 4, 3, 3))
def difference_of_two(m: Any, x: Tensor) -> Any:
    return spread(m.w) - spread(m.v)


@of_holes(seems="")
def one_leaf_in_two_places(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    dense[:, :, 1, 1] = m.w[:, :, 0, 0]
    return dense


@of_holes(seems="")
def holes_of_each_channel_its_own(m: Any, x: Tensor) -> Any:
    dense = m.w.new_zeros(6, 4, 5, 5)
    for i in range(6):
        dense[i, :, i % 3 : i % 3 + 3, ::2] = m.w[i]
    return dense


@of_holes(seems="")
def channels_exchanged(m: Any, x: Tensor) -> Any:
    return spread(m.w[[5, 3, 1, 0, 2, 4]][:, [3, 2, 1, 0]])


@of_holes(seems="", w=(4, 6, 3, 3))
def output_and_input_exchanged(m: Any, x: Tensor) -> Any:
    return spread(m.w.transpose(0, 1))


@of_holes(seems="")
def all_of_it_zero(m: Any, x: Tensor) -> Any:
    return m.w.new_zeros(6, 4, 5, 5)


@of_holes(seems="")
def only_one_channel_left(m: Any, x: Tensor) -> Any:
    dense = m.w.new_zeros(6, 4, 5, 5)
    dense[2:3, 1:2, ::2, ::2] = m.w[:1, :1]
    return dense


@of_holes(seems="")
def places_that_repeat(m: Any, x: Tensor) -> Any:
    places = torch.tensor([0, 2, 2])
    return torch.zeros(6, 4, 5, 3).index_add(2, places, m.w).repeat_interleave(2, 3)[..., :5]


@of_holes(seems="")
def places_that_accumulate(m: Any, x: Tensor) -> Any:
    dense = torch.zeros(5, 5, 6, 4)
    dense.index_put_((torch.tensor([0, 0, 4]), torch.tensor([2, 2, 0])), m.w.permute(2, 3, 0, 1)[0], accumulate=True)
    return dense.permute(2, 3, 0, 1)


@of_holes(seems="")
def one_kernel_for_all_inputs(m: Any, x: Tensor) -> Any:
    return spread(m.w[:, :1].expand(6, 4, 3, 3))


@of_holes(seems="")
def one_kernel_repeated(m: Any, x: Tensor) -> Any:
    return spread(m.w[:2].repeat(3, 1, 1, 1))


@of_holes(seems="")
def no_parameter_at_all(m: Any, x: Tensor) -> Any:
    blur = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
    return spread(blur.expand(6, 4, 3, 3))


@of_holes(seems="")
def a_footprint_that_is_no_product_of_axes(m: Any, x: Tensor) -> Any:
    footprint = torch.tensor([[[[0.0, 1.0, 0.0], [1.0, 4.0, 1.0], [0.0, 1.0, 0.0]]]])
    wide = F.conv_transpose2d(m.w.reshape(24, 1, 3, 3), footprint, stride=2)
    return wide.reshape(6, 4, 7, 7)[..., 1:-1, 1:-1]


@of_holes(seems="")
def a_footprint_that_is_cut_off(m: Any, x: Tensor) -> Any:
    footprint = torch.tensor([[[[0.25, 0.5, 0.25], [0.5, 1.0, 0.5], [0.25, 0.5, 0.25]]]])
    return F.conv_transpose2d(m.w.reshape(24, 1, 3, 3), footprint, stride=2, padding=1).reshape(6, 4, 5, 5)


# ---- not a parameter of its own ---------------------------------------------------------------------------


@lookalike(bank=(3, 6, 4, 3, 3))
def one_of_a_bank(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.bank[1]), padding=2) + F.conv2d(x, spread(m.bank[2]), padding=2)


@lookalike()
def made_inside_a_checkpoint(m: Any, x: Tensor) -> Any:
    return checkpoint(lambda x, w: F.conv2d(x, spread(w), padding=2), x, m.w, use_reentrant=False)


@lookalike()
def made_outside_a_checkpoint(m: Any, x: Tensor) -> Any:
    dense = spread(m.w)
    return checkpoint(lambda x: F.conv2d(x, dense, padding=2).relu(), x, use_reentrant=False)


@lookalike(bank=(3, 6, 4, 3, 3))
def mapped_over_a_bank(m: Any, x: Tensor) -> Any:
    return torch.vmap(lambda w: F.conv2d(x, F.pad(w, (1, 1, 1, 1)).flip(3), padding=2))(m.bank)


@lookalike(train=False)
def inside_inference_mode(m: Any, x: Tensor) -> Any:
    with torch.inference_mode():
        y = F.conv2d(x, spread(m.w), padding=2)
    return y


@lookalike(net=lambda: nn.Linear(4, 6 * 4 * 9))
def made_by_a_hypernetwork(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.net(x.mean((0, 2, 3))).view(6, 4, 3, 3)), padding=2)


@lookalike(conv=lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, padding=1)))
def weight_norm_of_torch(m: Any, x: Tensor) -> Any:
    return m.conv(x)


@lookalike(conv=lambda: parametrizations.spectral_norm(nn.Conv2d(4, 6, 3, padding=1)))
def spectral_norm_of_torch(m: Any, x: Tensor) -> Any:
    return m.conv(x)


class Checkered(nn.Module):
    """A parametrization: every second tap of a weight, by a mask that is a buffer."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(9).reshape(3, 3) % 2).float())

    def forward(self, w: Tensor) -> Tensor:
        """Mask."""
        return w * self.mask


def checkered() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", Checkered())
    return conv


@lookalike("holes", conv=checkered)
def a_parametrization_with_a_buffer(m: Any, x: Tensor) -> Any:
    return m.conv(x)


@lookalike("holes", conv=lambda: prune.l1_unstructured(nn.Conv2d(4, 6, 3, padding=1), "weight", 0.5))
def pruned_by_torch(m: Any, x: Tensor) -> Any:
    """Torch keeps the weight and its mask, a buffer, and multiplies them in a hook before each call."""
    return m.conv(x)
