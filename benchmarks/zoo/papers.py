"""Networks written from their papers in plain torch: the convolutions are theirs, depth and width are settings.

They know of no library but torch; only ``convnext_dcls`` takes its depthwise layers from the ``dcls`` package.
Layer scales start at 1, not at the papers' 1e-6, so that a wrong branch shows in the output.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spatial = Callable[[int], nn.Module]
"""From a number of channels to a depthwise layer that keeps the map's size."""


class ChannelNorm(nn.Module):
    """Layer norm over the channels of ``[N, C, *spatial]``, at every place by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise with the channels moved last, and move them back."""
        y: Tensor = self.norm(x.movedim(1, -1))
        return y.movedim(-1, 1)


def _norm_conv2d(c_in: int, c_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Pooled(nn.Module):
    """Mean over space, norm, and a linear layer: ``[N, C, *spatial] -> [N, classes]``."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.classify = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Score the classes."""
        y: Tensor = self.classify(self.norm(x.flatten(2).mean(dim=2)))
        return y


# ---- ConvNeXt, and its learnable spacings --------------------------------------------------------


class ConvNeXtBlock(nn.Module):
    """Depthwise layer, norm, pointwise to four times the width and back (arXiv:2201.03545); the input is added."""

    def __init__(self, channels: int, spatial: Spatial) -> None:
        super().__init__()
        self.spatial = spatial(channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.widen = nn.Linear(channels, 4 * channels)
        self.narrow = nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H, W]``."""
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        scaled: Tensor = self.scale * self.narrow(F.gelu(self.widen(y)))
        return x + scaled.permute(0, 3, 1, 2)


class ConvNeXt(nn.Sequential):
    """Four stages of ``ConvNeXtBlock`` at strides 4 to 32: ``[N, 3, H, W] -> [N, classes]``."""

    def __init__(self, spatial: Spatial, widths: Sequence[int], depths: Sequence[int], classes: int = 100) -> None:
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0])]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if stage:
                parts += [ChannelNorm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], width, 2, 2)]
            parts += [ConvNeXtBlock(width, spatial) for _ in range(depth)]
        super().__init__(*parts, Pooled(widths[-1], classes))


def convnext_dcls(
    widths: Sequence[int] = (96, 192, 384, 768), depths: Sequence[int] = (1, 1, 1, 1), window: int = 17, count: int = 34
) -> ConvNeXt:
    """ConvNeXt-T-dcls (arXiv:2112.03740): depthwise 17x17 windows of 34 learnt positions, bilinear.

    Positions start spread over the window, as trained ones are, and not at its centre.

    Raises:
        ModuleNotFoundError: the ``dcls`` package is not installed.
    """
    logging.disable(logging.WARNING)  # the package names its missing extensions for every layer
    try:
        layer = importlib.import_module("DCLS.construct.modules").Dcls2d

        def spatial(channels: int) -> nn.Module:
            made: nn.Module = layer(
                channels, channels, count, dilated_kernel_size=window, padding=window // 2, groups=channels,
                version="v1",
            )  # fmt: skip
            nn.init.uniform_(made.get_parameter("P"), -(window // 2), window // 2)
            nn.init.normal_(made.get_parameter("weight"), std=count**-0.5)
            return made

        return ConvNeXt(spatial, widths, depths)
    finally:
        logging.disable(logging.NOTSET)


# ---- RepLKNet ------------------------------------------------------------------------------------


class RepLKBlock(nn.Module):
    """A large depthwise kernel with a parallel 5x5 between pointwise layers (arXiv:2203.06717), then a pointwise FFN.

    Shapes: ``[N, C, H, W] -> [N, C, H, W]``.
    """

    def __init__(self, channels: int, kernel: int, small: int = 5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.enter = _norm_conv2d(channels, channels, 1)
        self.large = _norm_conv2d(channels, channels, kernel, groups=channels)
        self.small = _norm_conv2d(channels, channels, small, groups=channels)
        self.leave = _norm_conv2d(channels, channels, 1)
        self.ffn = nn.Sequential(
            nn.BatchNorm2d(channels), _norm_conv2d(channels, 4 * channels, 1), nn.GELU(),
            _norm_conv2d(4 * channels, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Add what the kernels find, then what the pointwise layers make of it."""
        y = F.relu(self.enter(self.norm(x)))
        x = x + self.leave(F.relu(self.large(y) + self.small(y)))
        mixed: Tensor = self.ffn(x)
        return x + mixed


class RepLKNet(nn.Sequential):
    """Four stages of large kernels, 31, 29, 27 and 13: ``[N, 3, H, W] -> [N, classes]``."""

    def __init__(
        self, widths: Sequence[int] = (32, 64, 128, 256), depths: Sequence[int] = (1, 1, 2, 1),
        kernels: Sequence[int] = (31, 29, 27, 13), classes: int = 100,
    ) -> None:  # fmt: skip
        first = widths[0]
        parts: list[nn.Module] = [
            _norm_conv2d(3, first, 3, stride=2), nn.ReLU(), _norm_conv2d(first, first, 3, groups=first), nn.ReLU(),
            _norm_conv2d(first, first, 1), nn.ReLU(), _norm_conv2d(first, first, 3, stride=2, groups=first), nn.ReLU(),
        ]  # fmt: skip
        for stage, (width, depth, kernel) in enumerate(zip(widths, depths, kernels, strict=True)):
            if stage:
                parts += [_norm_conv2d(widths[stage - 1], width, 1), nn.ReLU()]
                parts += [_norm_conv2d(width, width, 3, stride=2, groups=width), nn.ReLU()]
            parts += [RepLKBlock(width, kernel) for _ in range(depth)]
        super().__init__(*parts, Pooled(widths[-1], classes))


# ---- Visual Attention Network --------------------------------------------------------------------


class VANBlock(nn.Module):
    """Attention of a depthwise 5x5, a depthwise 7x7 with dilation 3 and a 1x1 (arXiv:2202.09741), then an FFN.

    Shapes: ``[N, C, H, W] -> [N, C, H, W]``.
    """

    def __init__(self, channels: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.norm = nn.BatchNorm2d(channels)
        self.enter = nn.Conv2d(channels, channels, 1)
        self.near = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.far = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.leave = nn.Conv2d(channels, channels, 1)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.ffn = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, inner, 1),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.GELU(), nn.Conv2d(inner, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Scale features by their attention, mix; add both times."""
        normal = self.norm(x)
        features = F.gelu(self.enter(normal))
        attended = self.leave(features * self.mix(self.far(self.near(features)))) + normal
        x = x + self.scale * attended
        y: Tensor = self.ffn(x)
        return x + y


class VAN(nn.Sequential):
    """Stages of ``VANBlock`` behind overlapping patches, widths as in VAN-B0: ``[N, 3, H, W] -> [N, classes]``."""

    def __init__(
        self, widths: Sequence[int] = (32, 64, 160, 256), depths: Sequence[int] = (1, 1, 2, 1),
        expansions: Sequence[int] = (8, 8, 4, 4), classes: int = 100,
    ) -> None:  # fmt: skip
        parts: list[nn.Module] = []
        for stage, (width, depth, expansion) in enumerate(zip(widths, depths, expansions, strict=True)):
            c_in, kernel, stride = (widths[stage - 1], 3, 2) if stage else (3, 7, 4)
            parts += [nn.Conv2d(c_in, width, kernel, stride, kernel // 2), nn.BatchNorm2d(width)]
            parts += [VANBlock(width, expansion) for _ in range(depth)] + [ChannelNorm(width)]
        super().__init__(*parts, Pooled(widths[-1], classes))
