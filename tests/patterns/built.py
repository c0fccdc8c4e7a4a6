"""Kernels built in the forward pass: holes in other geometries, masks, wings, interpolated, turned ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from adaptconv.taps import TapPattern
from tests.patterns.base import grid, layer, pattern
from tests.patterns.holes import HOLES, corner, holes, spread

WINGS = TapPattern.partial(island=5, wing=4, dilation=2)

# ---- other geometries --------------------------------------------------------------------------------------


@pattern(grid((2,), 4), [(4, 0)], made=True, w=(6, 4, 2), b=(6,))
def holes_as_in_wavenet(m: Any, x: Tensor) -> Any:
    dense = m.w.new_zeros(6, 4, 5)
    dense[..., ::4] = m.w
    return F.conv1d(F.pad(x, (4, 0)), dense, m.b)


@holes(grid((3,), 3))
def holes_in_time_by_kron(m: Any, x: Tensor) -> Any:
    return torch.kron(m.w, torch.tensor([1.0, 0.0, 0.0]))[..., :-2]


@holes(grid((3, 3, 3), 2))
def holes_in_space(m: Any, x: Tensor) -> Any:
    dense = m.w.new_zeros(6, 4, 5, 5, 5)
    dense[..., ::2, ::2, ::2] = m.w
    return dense


@holes(grid((3, 3, 3), (1, 2, 2)))
def holes_in_space_by_kron(m: Any, x: Tensor) -> Any:
    return torch.kron(m.w, corner())[..., :-1, :-1]


@pattern(grid((3, 3), (6, 4)), [6, 4], made=True, w=(6, 2, 3, 3), b=(6,))
def holes_in_a_dilated_convolution(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.w), m.b, padding=(6, 4), dilation=(3, 2), groups=2)


@pattern(HOLES, 2, made=True, w=(4, 1, 3, 3))
def holes_in_a_depthwise_convolution(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.w), padding="same", groups=4)


@pattern(HOLES, 1, made=True, w=(6, 4, 3, 3))
def holes_in_a_strided_convolution(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, spread(m.w), stride=2, padding=1)


class ZeroHole(nn.Conv2d):
    """A convolution that writes the holes of its kernel as zeros."""

    def forward(self, x: Tensor) -> Any:
        """Convolve."""
        return self._conv_forward(x, spread(self.weight), self.bias)


layer(partial(ZeroHole, 4, 6, 3, padding=2), HOLES, 2, made=True, name="holes_in_a_layer_of_its_own")


class Spread(nn.Module):
    """A parametrization that writes holes as zeros."""

    def forward(self, w: Tensor) -> Tensor:
        """Spread."""
        return spread(w)


def spread_conv() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3, padding=2)
    parametrize.register_parametrization(conv, "weight", Spread(), unsafe=True)
    return conv


layer(spread_conv, HOLES, 2, made=True, name="holes_by_a_parametrization")

# ---- of a weight that is computed first --------------------------------------------------------------------


@holes()
def holes_in_a_rectified_weight(m: Any, x: Tensor) -> Any:
    return spread(m.w.relu())


@holes()
def holes_in_a_standardised_weight(m: Any, x: Tensor) -> Any:
    return spread((m.w - m.w.mean((1, 2, 3), keepdim=True)) / m.w.std((1, 2, 3), keepdim=True))


@holes(w=lambda: nn.Parameter(torch.randn(6, 4, 3, 3).double()))
def holes_in_a_cast_weight(m: Any, x: Tensor) -> Any:
    return spread(m.w.to(x.dtype))


@holes(conv=lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3, bias=False)), w=None)
def holes_in_a_normed_weight(m: Any, x: Tensor) -> Any:
    return spread(m.conv.weight)


@holes()
def holes_in_a_symmetric_weight(m: Any, x: Tensor) -> Any:
    return spread(m.w + m.w.flip(2, 3))


# ---- masks ----------------------------------------------------------------------------------------------------


@holes(TapPattern.parse("101/010/101"))
def masked_by_a_literal(m: Any, x: Tensor) -> Any:
    return m.w * torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


@holes(TapPattern.parse("100/010/001"))
def masked_by_the_identity(m: Any, x: Tensor) -> Any:
    return m.w * torch.eye(3)


@holes(TapPattern.parse("111/110/000"))
def masked_as_in_pixelcnn(m: Any, x: Tensor) -> Any:
    mask = torch.ones(3, 3)
    mask[1, 2:] = 0
    mask[2] = 0
    return mask * m.w


@holes(TapPattern.parse("111/100/000"))
def masked_in_place(m: Any, x: Tensor) -> Any:
    kernel = m.w.clone()
    kernel[:, :, 1, 1:] = 0
    kernel[:, :, 2] = 0
    return kernel


@holes(TapPattern.parse("100/110/111"))
def masked_to_a_triangle(m: Any, x: Tensor) -> Any:
    return m.w.tril()


@holes(TapPattern.parse("010/101/010"))
def masked_by_where(m: Any, x: Tensor) -> Any:
    return torch.where((torch.arange(9) % 2).bool().view(3, 3), m.w, 0.0)


@holes(TapPattern.parse("101/010/101"))
def masked_by_filling(m: Any, x: Tensor) -> Any:
    return m.w.masked_fill((torch.arange(9) % 2).bool().view(3, 3), 0.0)


# ---- partially dilated, interpolated -----------------------------------------------------------------------


@holes(WINGS, left=(6, 4, 4), island=(6, 4, 5), right=(6, 4, 4), w=None)
def wings_joined_to_an_island(m: Any, x: Tensor) -> Any:
    """Dilated wings on both sides of a dense island."""

    def wing(w: Tensor) -> Tensor:
        return torch.stack([w, torch.zeros_like(w)], -1).flatten(-2)

    left, right = wing(m.left), wing(m.right.flip(-1)).flip(-1)
    return torch.cat([left, m.island, right], dim=-1)


@holes(WINGS, far=(6, 4, 8), island=(6, 4, 5), w=None)
def wings_written_around_an_island(m: Any, x: Tensor) -> Any:
    dense = torch.zeros(6, 4, WINGS.window[0])
    dense[..., 0:8:2] = m.far[..., :4]
    dense[..., 8:13] = m.island
    dense[..., 14::2] = m.far[..., 4:]
    return dense


HAT = (0.5, 1.0, 0.5)
TWICE = (0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25)


def hat() -> Tensor:
    values = torch.tensor([0.5, 1.0, 0.5])
    return (values[:, None] * values).view(1, 1, 3, 3)


@holes(HOLES.spread_by((HAT, HAT)), pin="factored")
def interpolated(m: Any, x: Tensor) -> Any:
    return F.conv_transpose2d(m.w.reshape(24, 1, 3, 3), hat(), stride=2).reshape(6, 4, 7, 7)


@holes(grid((3, 3), 4).spread_by((TWICE, TWICE)), pin="factored")
def interpolated_twice(m: Any, x: Tensor) -> Any:
    w = m.w.reshape(24, 1, 3, 3)
    for _ in range(2):
        w = F.conv_transpose2d(w, hat(), stride=2)
    return w.reshape(6, 4, 15, 15)


@holes(grid((3,), 2).spread_by((HAT,)), pin="factored")
def interpolated_in_time(m: Any, x: Tensor) -> Any:
    footprint = torch.tensor([[[0.5, 1.0, 0.5]]])
    return F.conv_transpose1d(m.w.flatten(0, 1)[:, None], footprint, stride=2).view(6, 4, 7)


# ---- no holes: any plan for the taps as they are ------------------------------------------------------------


@holes(grid((3, 3)), made=None)
def flipped(m: Any, x: Tensor) -> Any:
    return m.w.flip(2, 3)


@holes(grid((3, 3)), made=None)
def flipped_by_index(m: Any, x: Tensor) -> Any:
    return m.w[:, :, [2, 1, 0]][..., torch.tensor([2, 1, 0])]


@holes(grid((3, 3)), made=None, w=(4, 6, 3, 3))
def stored_input_first(m: Any, x: Tensor) -> Any:
    return m.w.transpose(0, 1)


@holes(grid((3, 3)), made=None, w=(3, 3, 4, 6))
def stored_as_in_tensorflow(m: Any, x: Tensor) -> Any:
    return m.w.permute(3, 2, 0, 1)


@holes(grid((3, 3)), made=None)
def turned(m: Any, x: Tensor) -> Any:
    return torch.rot90(m.w, 1, (2, 3)).roll(1, 2)


@holes(made=True)
def flipped_with_holes(m: Any, x: Tensor) -> Any:
    return spread(m.w.flip(3)).flip(2)


@holes(grid((3, 3)), made=None, v=(2, 4, 3, 3))
def joined_over_channels(m: Any, x: Tensor) -> Any:
    return torch.cat([m.w[:4], m.v])


@holes(grid((3, 3)), made=None)
def symmetric(m: Any, x: Tensor) -> Any:
    return (m.w + m.w.flip(2, 3)) / 2
