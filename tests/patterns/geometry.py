"""Single convolutions in torch's own words: modules and functions, every geometry, every padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.base import grid, layer, pattern

G1, G2, G3 = grid((3,)), grid((3, 3)), grid((3, 3, 3))

# ---- modules -----------------------------------------------------------------------------------------

layer(partial(nn.Conv1d, 4, 6, 3, padding=1), G1, name="conv1d")
layer(partial(nn.Conv2d, 4, 6, 3, padding=1), G2, name="conv2d")
layer(partial(nn.Conv3d, 4, 6, 3, padding=1), G3, name="conv3d")
layer(partial(nn.Conv1d, 4, 6, 3, padding=4, dilation=4), grid((3,), (4,)), name="conv1d_dilated")
layer(partial(nn.Conv2d, 4, 6, 3, padding=(2, 3), dilation=(2, 3)), grid((3, 3), (2, 3)), name="conv2d_dilated")
layer(partial(nn.Conv3d, 4, 6, 3, padding=2, dilation=2), grid((3, 3, 3), 2), name="conv3d_dilated")
layer(partial(nn.Conv1d, 4, 6, 5, stride=2, padding=2), grid((5,)), name="conv1d_strided")
layer(partial(nn.Conv2d, 4, 6, 3, stride=(2, 1), padding=1), G2, name="conv2d_strided")
layer(partial(nn.Conv3d, 4, 6, 2, stride=2), grid((2, 2, 2)), 0, name="conv3d_strided")
layer(partial(nn.Conv2d, 4, 6, 3, padding=1, groups=2), G2, name="conv2d_grouped")
layer(partial(nn.Conv1d, 4, 4, 7, padding=3, groups=4), grid((7,)), name="conv1d_depthwise")
layer(partial(nn.Conv2d, 4, 4, 5, padding=4, dilation=2, groups=4), grid((5, 5), 2), name="conv2d_depthwise_dilated")
layer(partial(nn.Conv3d, 4, 8, 3, padding=1, groups=4), G3, name="conv3d_depthwise_multiplied")
layer(partial(nn.Conv2d, 4, 6, (1, 5), padding=(0, 2), bias=False), grid((1, 5)), name="conv2d_one_row")
layer(partial(nn.Conv2d, 4, 6, 3, padding="same", dilation=2), grid((3, 3), 2), name="conv2d_same")
layer(partial(nn.Conv1d, 4, 6, 4, padding="same"), grid((4,)), name="conv1d_same_even")
layer(partial(nn.Conv2d, 4, 6, (4, 3), padding="same"), grid((4, 3)), name="conv2d_same_even")
layer(partial(nn.Conv3d, 4, 6, 3, padding="same", dilation=(1, 2, 1)), grid((3, 3, 3), (1, 2, 1)), name="conv3d_same")
layer(partial(nn.Conv2d, 4, 6, 3, padding="valid", dilation=2), grid((3, 3), 2), 0, name="conv2d_valid")

for _mode in ("circular", "reflect", "replicate"):
    layer(partial(nn.Conv1d, 4, 6, 5, padding=2, padding_mode=_mode), grid((5,)), 0, name=f"conv1d_{_mode}")
    layer(
        partial(nn.Conv2d, 4, 6, 3, padding=2, dilation=2, padding_mode=_mode),
        grid((3, 3), 2),
        0,
        name=f"conv2d_{_mode}",
    )
    layer(partial(nn.Conv3d, 4, 6, 3, padding=1, padding_mode=_mode), G3, 0, name=f"conv3d_{_mode}")
layer(partial(nn.Conv2d, 4, 6, 3, padding="same", padding_mode="circular"), G2, 0, name="conv2d_same_circular")

# ---- functions ----------------------------------------------------------------------------------------


@pattern(grid((3,), (2,)), 2, w=(6, 4, 3), b=(6,))
def functional_by_position(m: Any, x: Tensor) -> Any:
    return F.conv1d(x, m.w, m.b, 1, 2, 2, 1)


@pattern(grid((3, 3), 2), 2, w=(6, 2, 3, 3), b=(6,))
def functional_by_name(m: Any, x: Tensor) -> Any:
    return F.conv2d(weight=m.w, input=x, groups=2, dilation=2, padding=(2, 2), bias=m.b)


@pattern(G3, 1, w=(6, 4, 3, 3, 3))
def functional_in_torch(m: Any, x: Tensor) -> Any:
    return torch.conv3d(x, m.w, padding=[1, 1, 1])


@pattern(grid((4, 4)), w=(6, 4, 4, 4))
def functional_same_even(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding="same")


@pattern(grid((3,), 3), 0, w=(6, 4, 3))
def functional_valid(m: Any, x: Tensor) -> Any:
    return F.conv1d(x, m.w, padding="valid", dilation=3)


# ---- padding beforehand, which is no part of a convolution --------------------------------------------


@pattern(G2, 0, w=(6, 4, 3, 3))
def padded_in_circles(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), m.w)


@pattern(G2, 0, w=(6, 4, 3, 3), pad=lambda: nn.ReflectionPad2d(1))
def padded_by_reflection(m: Any, x: Tensor) -> Any:
    return F.conv2d(m.pad(x), m.w)


@pattern(G3, 0, w=(6, 4, 3, 3, 3))
def padded_by_replication(m: Any, x: Tensor) -> Any:
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate"), m.w)


# ---- padding with zeros, which is ------------------------------------------------------------------------


@pattern(G2, 1, w=(6, 4, 3, 3), b=(6,))
def padded_with_zeros(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), m.w, m.b)


@pattern(grid((2,), (4,)), [(4, 0)], conv=partial(nn.Conv1d, 4, 6, 2, dilation=4))
def padded_causally(m: Any, x: Tensor) -> Any:
    return m.conv(F.pad(x, (4, 0)))


@pattern(G2, [(0, 1), (0, 1)], conv=partial(nn.Conv2d, 4, 6, 3, stride=2))
def padded_as_tensorflow_does(m: Any, x: Tensor) -> Any:
    return m.conv(F.pad(x, [0, 1, 0, 1], "constant", 0))


@pattern(G2, [(1, 1), (4, 2)], conv=partial(nn.Conv2d, 4, 6, 3, padding=1))
def padded_on_top_of_padding(m: Any, x: Tensor) -> Any:
    return m.conv(F.pad(x, (3, 1)))


@pattern(G2, [(2, 2), (1, 1)], pad=partial(nn.ZeroPad2d, (1, 1, 2, 2)), conv=partial(nn.Conv2d, 4, 6, 3))
def padded_by_a_module(m: Any, x: Tensor) -> Any:
    return m.conv(m.pad(x))


@pattern(
    grid((3,), 2),
    [(4, 0)],
    pad=partial(nn.ConstantPad1d, (4, 0), 0.0),
    conv=partial(nn.Conv1d, 4, 4, 3, dilation=2, groups=4),
)
def padded_by_a_module_with_a_constant(m: Any, x: Tensor) -> Any:
    return m.conv(m.pad(x))


@pattern(G3, 1, pad=partial(nn.ConstantPad3d, 1, 0.0), conv=partial(nn.Conv3d, 4, 6, 3))
def padded_by_a_module_in_space(m: Any, x: Tensor) -> Any:
    return m.conv(m.pad(x))


@pattern(G1, [(2, 1)], w=(6, 4, 3))
def padded_by_the_operator(m: Any, x: Tensor) -> Any:
    return F.conv1d(torch.constant_pad_nd(x, [2, 1]), m.w)


@pattern(G2, [(1, 0), (2, 3)], w=(6, 4, 3, 3))
def padded_in_two_steps(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(F.pad(x, (2, 3)), (0, 0, 1, 0)), m.w)


@pattern(
    grid((3, 3), 2),
    2,
    conv=lambda: nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(4, 6, 3, dilation=2), nn.ReLU(inplace=True)),
)
def padded_in_a_sequence(m: Any, x: Tensor) -> Any:
    return m.conv(x)
