"""Two small real networks full of convolutions with holes, in plain torch.nn.

They are written the way a user writes them and know of no library but torch; ``segmenter`` and
``denoiser`` take no arguments and return a model in eval mode with its real input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data import electrocardiogram, photograph

M = TypeVar("M", bound=nn.Module)

PHOTOGRAPH_PIXELS = 384
WINDOWS = 8
WINDOW_SAMPLES = 768


# ---- segmentation -------------------------------------------------------------------------------


def _conv_bn(
    c_in: int, c_out: int, kernel: int, *, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """Convolution with 'same' padding (at stride 1), batch norm and Hardswish: ``[N, C_in, H, W]`` in."""
    padding = (kernel - 1) // 2 * dilation
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(c_out),
        nn.Hardswish(),
    )


class SeparableBlock(nn.Module):
    """Inverted residual with a depthwise 3x3 in the middle (MobileNetV2, arXiv:1801.04381).

    Dilation takes the place of stride where the map must not shrink further.

    Shapes: ``[N, C_in, H, W] -> [N, C_out, ceil(H / stride), ceil(W / stride)]``.
    """

    def __init__(self, c_in: int, c_out: int, *, stride: int = 1, dilation: int = 1, expansion: int = 4) -> None:
        super().__init__()
        width = c_in * expansion
        self.expand = _conv_bn(c_in, width, 1)
        self.depthwise = _conv_bn(width, width, 3, stride=stride, dilation=dilation, groups=width)
        self.project = nn.Sequential(nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        """Expand, filter each channel, project; add the input where shapes allow."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class LargeKernelAttention(nn.Module):
    """Attention from a large depthwise kernel taken apart (Visual Attention Network, arXiv:2202.09741).

    A 21x21 receptive field as depthwise 5x5, depthwise 7x7 with dilation 3 and a pointwise
    convolution, whose result scales the features it was computed from.

    Shapes: ``[N, C, H, W] -> [N, C, H, W]``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.enter = nn.Conv2d(channels, channels, 1)
        self.near = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.far = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the features by the attention computed from them; add the input."""
        features = F.gelu(self.enter(self.norm(x)))
        attention: Tensor = self.mix(self.far(self.near(features)))
        y: Tensor = self.leave(features * attention)
        return x + y


class LargeKernelBlock(nn.Module):
    """Residual block around one large depthwise kernel (RepLKNet, arXiv:2203.06717).

    Shapes: ``[N, C, H, W] -> [N, C, H, W]``.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.enter = _conv_bn(channels, channels, 1)
        self.large = _conv_bn(channels, channels, kernel, groups=channels)
        self.leave = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Mix, filter each channel with the large kernel, mix; add the input."""
        y: Tensor = self.leave(self.large(self.enter(x)))
        return x + y


class DualContext(nn.Module):
    """Local and wide context in one sum: a dense and a dilated 3x3 over the same input, then norm.

    The two windows share their centre, so the sum is one convolution whose taps are their union.

    Shapes: ``[N, C_in, H, W] -> [N, C_out, H, W]``.
    """

    def __init__(self, c_in: int, c_out: int, dilation: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.wide = nn.Conv2d(c_in, c_out, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """Add both convolutions, normalise, activate."""
        y: Tensor = self.norm(self.local(x) + self.wide(x))
        return F.hardswish(y)


class AtrousPyramid(nn.Module):
    """Atrous spatial pyramid pooling (DeepLabV3, arXiv:1706.05587).

    A pointwise branch, one dilated 3x3 branch a rate and the image's mean, concatenated and mixed.

    Shapes: ``[N, C_in, H, W] -> [N, C_out, H, W]``.
    """

    def __init__(self, c_in: int, c_out: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.point = _conv_bn(c_in, c_out, 1)
        self.atrous = nn.ModuleList(_conv_bn(c_in, c_out, 3, dilation=rate) for rate in rates)
        self.image = nn.Sequential(nn.Conv2d(c_in, c_out, 1), nn.Hardswish())  # one pixel: nothing to normalise over
        self.mix = _conv_bn((2 + len(rates)) * c_out, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate every branch over the same features and mix them."""
        image: Tensor = self.image(x.mean(dim=(2, 3), keepdim=True))
        branches = [self.point(x), *(branch(x) for branch in self.atrous), image.expand(-1, -1, *x.shape[2:])]
        y: Tensor = self.mix(torch.cat(branches, dim=1))
        return y


class AtrousSegmenter(nn.Module):
    """Semantic segmentation: a depthwise-separable backbone held at output stride 8, and an atrous head.

    Args:
        classes: classes to score a pixel.
        width: channels at output stride 8.
        rates: dilations of the pyramid; DeepLabV3's 12, 24 and 36 for output stride 8, of which the
            last is three quarters of the 48x48 map of a 384-pixel picture.

    Shapes: ``[N, 3, H, W] -> [N, classes, H, W]`` with H and W divisible by 8.
    """

    def __init__(self, classes: int = 21, width: int = 96, rates: Sequence[int] = (12, 24, 36)) -> None:
        super().__init__()
        quarter, half = width // 4, width // 2
        self.backbone = nn.Sequential(
            _conv_bn(3, quarter, 3, stride=2),
            SeparableBlock(quarter, half, stride=2),
            SeparableBlock(half, width, stride=2),
            SeparableBlock(width, width, dilation=2),
            SeparableBlock(width, width, dilation=4),
            LargeKernelAttention(width),
            LargeKernelBlock(width, kernel=17),
            LargeKernelAttention(width),
        )
        self.context = DualContext(width, width, dilation=4)
        self.pyramid = AtrousPyramid(width, width, rates)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Score every class at every pixel of the input."""
        scores = self.classify(self.pyramid(self.context(self.backbone(x))))
        return F.interpolate(scores, x.shape[2:], mode="bilinear", align_corners=False)


# ---- denoising ----------------------------------------------------------------------------------


class WingedBlock(nn.Module):
    """Residual block around a partially dilated depthwise kernel, written as users write it today.

    A dense depthwise k5 plus a dilated depthwise k11 (dilation 2) over the same input: together the
    taps ``101010101111101010101``, a dense island with dilated wings. Pointwise layers mix channels.

    Shapes: ``[N, C, L] -> [N, C, L]``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.island = nn.Conv1d(channels, channels, 5, padding=2, groups=channels)
        self.wings = nn.Conv1d(channels, channels, 11, padding=10, dilation=2, groups=channels, bias=False)
        self.widen = nn.Conv1d(channels, 2 * channels, 1)
        self.narrow = nn.Conv1d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Filter each channel with island and wings, mix pointwise; add the input."""
        normal = self.norm(x)
        y: Tensor = self.narrow(F.gelu(self.widen(self.island(normal) + self.wings(normal))))
        return x + y


class SeparationBlock(nn.Module):
    """One block of Conv-TasNet's temporal convolutional network (arXiv:1809.07454).

    Shapes: ``[N, C, L] -> [N, C, L]``; inside, ``hidden`` channels.
    """

    def __init__(self, channels: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv1d(channels, hidden, 1), nn.PReLU(), nn.GroupNorm(1, hidden))
        self.depthwise = nn.Conv1d(hidden, hidden, 3, padding=dilation, dilation=dilation, groups=hidden)
        self.leave = nn.Sequential(nn.PReLU(), nn.GroupNorm(1, hidden), nn.Conv1d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Widen, filter each channel, narrow; add the input."""
        y: Tensor = self.leave(self.depthwise(self.enter(x)))
        return x + y


class WingedDenoiser(nn.Module):
    """Removes noise from a one-channel sensor recording by predicting it and taking it away.

    Partially dilated depthwise blocks, then one Conv-TasNet stack with dilations 1, 2, 4, .. 32.

    Args:
        channels: width of the network.
        blocks: partially dilated blocks.

    Shapes: ``[N, 1, L] -> [N, 1, L]``.
    """

    def __init__(self, channels: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, channels, 5, padding=2)
        self.winged = nn.Sequential(*(WingedBlock(channels) for _ in range(blocks)))
        self.separate = nn.Sequential(*(SeparationBlock(channels, 2 * channels, 2**i) for i in range(6)))
        self.decode = nn.Conv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input less the noise found in it."""
        noise: Tensor = self.decode(self.separate(self.winged(self.encode(x))))
        return x - noise


# ---- factories ----------------------------------------------------------------------------------


def segmenter() -> tuple[AtrousSegmenter, tuple[Tensor]]:
    """``AtrousSegmenter`` over a photograph ``[1, 3, 384, 384]``: the model in eval mode, and its inputs."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = AtrousSegmenter()
    inputs = (photograph(PHOTOGRAPH_PIXELS),)
    return _settled(model, inputs[0]), inputs


def denoiser() -> tuple[WingedDenoiser, tuple[Tensor]]:
    """``WingedDenoiser`` over an electrocardiogram ``[8, 1, 768]``: the model in eval mode, and its inputs."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = WingedDenoiser()
    inputs = (electrocardiogram(WINDOWS, WINDOW_SAMPLES),)
    return _settled(model, inputs[0]), inputs


def _settled(model: M, x: Tensor) -> M:
    """Give batch norms the statistics of a real input in one pass, as training would; leave in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a cumulative mean: one pass gives the statistics themselves
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
