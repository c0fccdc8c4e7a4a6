"""Channel and spatial attention, and the depthwise separable block, for layers with kernels of any family."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.kernels.base import Family, per_axis
from adaptconv.kernels.grid import Grid
from adaptconv.modules import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d

_CONV: dict[int, type[AdaptiveConv1d] | type[AdaptiveConv2d] | type[AdaptiveConv3d]] = {
    1: AdaptiveConv1d,
    2: AdaptiveConv2d,
    3: AdaptiveConv3d,
}


class _Attention(nn.Module):
    """What the gates share: the rank of their input is in their name, so that a batch axis may be left out."""

    _axes: int

    def _check(self, x: Tensor, channels: int | None) -> None:
        name = type(self).__name__
        if not isinstance(x, Tensor):
            raise ConvTypeError(f"{name}: input must be a tensor, got {type(x).__name__}")
        if x.dim() not in (self._axes + 1, self._axes + 2):
            raise ConvArgumentError(
                f"{name}: expected [N, C, *spatial] or [C, *spatial] with {self._axes} spatial axes, "
                f"got shape {tuple(x.shape)}"
            )
        if channels is not None and x.shape[-self._axes - 1] != channels:
            raise ConvArgumentError(f"{name}: made for {channels} channels, got an input of shape {tuple(x.shape)}")


class _ChannelAttention(_Attention):
    def __init__(
        self, channels: int, reduction: int = 16, *, max_pool: bool = False, least: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for what, value in (("channels", channels), ("reduction", reduction), ("least", least)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConvArgumentError(f"{type(self).__name__}: {what} must be an int of at least 1, got {value!r}")
        self.channels, self.reduction, self.max_pool = channels, reduction, max_pool
        hidden = max(channels // reduction, min(least, channels))
        self.fc1 = nn.Linear(channels, hidden, bias, device, dtype)
        self.activation = activation()
        self.fc2 = nn.Linear(hidden, channels, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Scale every channel of ``x [N, C, *spatial]`` or ``[C, *spatial]``."""
        self._check(x, self.channels)
        spatial = tuple(range(-self._axes, 0))
        score = self._score(x.mean(spatial))
        if self.max_pool:
            score = score + self._score(x.amax(spatial))
        return x * score.sigmoid().to(x.dtype)[(..., *(None,) * self._axes)]

    def _score(self, pooled: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(pooled)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Channels, reduction, and what is pooled."""
        return f"{self.channels}, reduction={self.reduction}" + (", max_pool=True" if self.max_pool else "")


class _SpatialAttention(_Attention):
    def __init__(
        self, kernel_size: Any = 7, *, bias: bool = False, padding_mode: str = "zeros", device: Any = None,
        dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = _CONV[self._axes](
            2, 1, kernel_size, padding="same", bias=bias, padding_mode=padding_mode, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scale every position of ``x [N, C, *spatial]`` or ``[C, *spatial]``."""
        self._check(x, None)
        channel = -self._axes - 1
        pooled = torch.cat([x.mean(channel, keepdim=True), x.amax(channel, keepdim=True)], channel)
        gate: Tensor = self.conv(pooled).sigmoid()
        return x * gate.to(x.dtype)


class _DepthwiseSeparable(nn.Sequential):
    _axes: int

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any = 1, padding: Any = "same", *,
        norm: Callable[[int], nn.Module] | None = None, activation: Callable[[], nn.Module] | None = None,
        attention: Callable[[int], nn.Module] | None = None, bias: bool | None = None, padding_mode: str = "zeros",
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        conv, where = _CONV[self._axes], {"device": device, "dtype": dtype}
        family = kernel_size if isinstance(kernel_size, Family) else Grid(kernel_size)
        if padding == "same":
            padding = self._same(family, stride)
        biased = norm is None if bias is None else bias
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        parts["depthwise"] = conv(
            in_channels, in_channels, family, stride, padding, groups=in_channels, bias=biased,
            padding_mode=padding_mode, **where,
        )  # fmt: skip
        if norm is not None:
            parts["depthwise_norm"] = norm(in_channels)
        if activation is not None:
            parts["depthwise_activation"] = activation()
        if attention is not None:
            parts["attention"] = attention(in_channels)
        parts["pointwise"] = conv(in_channels, out_channels, 1, bias=biased, **where)
        if norm is not None:
            parts["norm"] = norm(out_channels)
        if activation is not None:
            parts["activation"] = activation()
        super().__init__(parts)

    def __getitem__(self, index: Any) -> Any:
        """A part; of a slice, a plain ``nn.Sequential``."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def _same(self, family: Family, stride: Any) -> Any:
        """Padding by which an output has ``ceil(extent / stride)`` positions; torch knows it for stride 1 only."""
        if all(step == 1 for step in per_axis(stride, self._axes, "stride")):
            return "same"
        window = family.bound(self._axes).taps.window
        if any(extent % 2 == 0 for extent in window):
            raise ConvArgumentError(
                f"{type(self).__name__}: padding='same' with stride {stride!r} needs a window that is odd on every "
                f"axis, got {window}; give the padding as ints"
            )
        return tuple(extent // 2 for extent in window)


_CHANNEL_DOC = """Channel attention: ``y = x * sigmoid(fc2(act(fc1(mean of x over space))))``, one factor a channel.

    Squeeze-and-excitation (Hu et al., "Squeeze-and-Excitation Networks", 2018); with ``max_pool`` the channel gate of
    CBAM (Woo et al., "CBAM: Convolutional Block Attention Module", 2018), which adds what the same two linear layers
    make of the maximum over space before the sigmoid.

    Args:
        channels: C.
        reduction: C over the hidden width. A reduction beyond C leaves the width at ``least``.
        max_pool: add the maximum's score.
        least: hidden width not to go below (nor ever above C because of it).
        activation: makes the module between the two linear layers.
        bias, device, dtype: of the linear layers.

    Input ``[N, C, {spatial}]`` or ``[C, {spatial}]``; the output has its shape, dtype and memory format.

    Raises:
        ConvArgumentError: an argument below 1; an input of another rank or number of channels.
        ConvTypeError: an input that is no tensor.
"""

_SPATIAL_DOC = """Spatial attention: ``y = x * sigmoid(conv([mean; max of x over channels]))``, one factor a position.

    The spatial gate of CBAM (Woo et al., "CBAM: Convolutional Block Attention Module", 2018), which uses a 7x7 kernel.

    Args:
        kernel_size: of the convolution from 2 channels to 1: ints, or a kernel family (``adaptconv.kernels``).
        bias, padding_mode, device, dtype: of the convolution.

    Input ``[N, C, {spatial}]`` or ``[C, {spatial}]``; the output has its shape, dtype and memory format.

    Raises:
        ConvArgumentError: a kernel that does not fit; an input of another rank.
        ConvTypeError: an input that is no tensor.
"""

_SEPARABLE_DOC = """A depthwise convolution, then a 1x1 one: ``depthwise -> norm -> activation -> attention -> pointwise
    -> norm -> activation``, of which only the two convolutions are there unless asked for.

    Chollet, "Xception: Deep Learning with Depthwise Separable Convolutions", 2017; norm and activation stand as in
    MobileNet (Howard et al., 2017), attention as in MobileNetV3 (Howard et al., 2019).

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: of the depthwise convolution: ints, or a kernel family (``adaptconv.kernels``).
        stride: of the depthwise convolution.
        padding: of the depthwise convolution. ``'same'`` gives ``ceil(extent / stride)`` outputs an axis; with a
            stride above 1 it pads half the window on both sides, which must be odd.
        norm: makes a normalisation from a number of channels, e.g. ``nn.BatchNorm{axes}d``.
        activation: makes an activation, e.g. ``nn.ReLU``.
        attention: makes a gate from a number of channels, e.g. ``ChannelAttention{axes}d``.
        bias: of both convolutions; by default only where no ``norm`` follows.
        padding_mode: of the depthwise convolution.
        device, dtype: of both convolutions.

    Input ``[N, C_in, {spatial}]``, or ``[C_in, {spatial}]`` where norm and attention take it.

    Raises:
        ConvArgumentError: arguments that do not fit together.
"""


class ChannelAttention1d(_ChannelAttention):  # noqa: D101 - docstrings are made from the texts above
    __doc__ = _CHANNEL_DOC.format(spatial="L")
    _axes = 1


class ChannelAttention2d(_ChannelAttention):  # noqa: D101
    __doc__ = _CHANNEL_DOC.format(spatial="H, W")
    _axes = 2


class ChannelAttention3d(_ChannelAttention):  # noqa: D101
    __doc__ = _CHANNEL_DOC.format(spatial="D, H, W")
    _axes = 3


class SpatialAttention1d(_SpatialAttention):  # noqa: D101
    __doc__ = _SPATIAL_DOC.format(spatial="L")
    _axes = 1


class SpatialAttention2d(_SpatialAttention):  # noqa: D101
    __doc__ = _SPATIAL_DOC.format(spatial="H, W")
    _axes = 2


class SpatialAttention3d(_SpatialAttention):  # noqa: D101
    __doc__ = _SPATIAL_DOC.format(spatial="D, H, W")
    _axes = 3


class DepthwiseSeparable1d(_DepthwiseSeparable):  # noqa: D101
    __doc__ = _SEPARABLE_DOC.format(axes=1, spatial="L")
    _axes = 1


class DepthwiseSeparable2d(_DepthwiseSeparable):  # noqa: D101
    __doc__ = _SEPARABLE_DOC.format(axes=2, spatial="H, W")
    _axes = 2


class DepthwiseSeparable3d(_DepthwiseSeparable):  # noqa: D101
    __doc__ = _SEPARABLE_DOC.format(axes=3, spatial="D, H, W")
    _axes = 3
