"""Named convolution layers of published networks, at full size and cut to what a small CPU can time.

One table makes every suite. The CPU suite keeps each layer's window, dilation, map and padding and
cuts batch and channels, so that one native float32 forward takes about 1 to 200 ms on two cores.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Direction, Padding, Problem, same_padding
from adaptconv.taps import TapPattern

CPU_DEVICE = torch.device("cpu")
DEPTHWISE = -1


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution layer of a known network, over an input ``[batch, c_in, *spatial]``.

    Attributes:
        name: unique within a suite, e.g. ``deeplabv3-aspp-d6``.
        model: the network it comes from, for people.
        batch: N.
        c_in: input channels.
        c_out: output channels.
        groups: channel groups.
        spatial: input extents.
        taps: text of a ``TapPattern``: a grid (``3x3d6x6``) or a mask, maybe with a footprint or a density.
        stride: output step an axis.
        padding: zeros (before, after) an axis.
        dtype: "float32", "bfloat16", ...
        holes: weights of each channel's window that are not zero, at places of its own; 0 where all may be.
        spacing: elements of the learnt-spacing kernel that the taps come from; 0 where there is none.
    """

    name: str
    model: str
    batch: int
    c_in: int
    c_out: int
    groups: int
    spatial: tuple[int, ...]
    taps: str
    stride: tuple[int, ...]
    padding: Padding
    dtype: str
    holes: int = 0
    spacing: int = 0

    @property
    def kind(self) -> str:
        """Which sort: "depthwise"; "control", where torch's own call is mostly right; or "other"."""
        if self.groups == self.c_in > 1:
            return "depthwise"
        return "control" if TapPattern.parse(self.taps).single_grid() is not None else "other"

    def problem(
        self,
        direction: Direction = Direction.FORWARD,
        layout: str = "contiguous",
        device: torch.device = CPU_DEVICE,
    ) -> Problem:
        """The layer as a problem on a device, as torch's flags are set now.

        Args:
            direction: FORWARD, GRAD_INPUT or GRAD_WEIGHT.
            layout: "contiguous", "channels_last" or "mixed".
            device: what it would run on; an accelerator must be present to be named.
        """
        return Problem(
            direction=direction,
            batch=self.batch,
            c_in=self.c_in,
            c_out=self.c_out,
            groups=self.groups,
            spatial=self.spatial,
            taps=TapPattern.parse(self.taps),
            stride=self.stride,
            padding=self.padding,
            dtype=self.dtype,
            layout=layout,
            device=Device.of(device),
            fp32_precision=fp32_precision(getattr(torch, self.dtype), device),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


def _scattered(count: int, window: int, *, spread: int = 1) -> str:
    """Mask text of random taps in a square window, the same on every machine.

    Args:
        count: tap positions drawn.
        window: side of the square window.
        spread: side of the square each position covers; 2 is where bilinear interpolation puts weight.
    """
    cells = [(y, x) for y in range(window - spread + 1) for x in range(window - spread + 1)]
    draw = random.Random(0)  # only random() is promised to give the same numbers in every Python
    ranked = sorted((draw.random(), cell) for cell in cells)
    steps = [(y, x) for y in range(spread) for x in range(spread)]
    taps = {(y + dy, x + dx) for _, (y, x) in ranked[:count] for dy, dx in steps}
    return str(TapPattern(tuple(taps), (window, window)))


@dataclass(frozen=True, slots=True)
class _Row:
    """A layer at its two sizes; ``full`` and ``cpu`` are (batch, c_in, c_out)."""

    name: str
    model: str
    spatial: tuple[int, ...]
    taps: str
    full: tuple[int, int, int]
    cpu: tuple[int, int, int]
    groups: int = 1  # or DEPTHWISE
    causal: bool = False  # all padding before, as in autoregressive networks
    stride: int = 1
    valid: bool = False  # no padding, as where a picture is cut into patches
    holes: int = 0
    spacing: int = 0

    def layer(self, size: tuple[int, int, int], dtype: str) -> Layer:
        """The row at one size, ``full`` or ``cpu``."""
        batch, c_in, c_out = size
        pattern = TapPattern.parse(self.taps)
        window = pattern.window
        padding = tuple((extent - 1, 0) for extent in window) if self.causal else same_padding(window)
        return Layer(
            name=self.name,
            model=self.model,
            batch=batch,
            c_in=c_in,
            c_out=c_out,
            groups=c_in if self.groups == DEPTHWISE else self.groups,
            spatial=self.spatial,
            taps=self.taps if not self.holes else str(pattern.with_density(self.holes / len(pattern))),
            stride=(self.stride,) * len(self.spatial),
            padding=((0, 0),) * len(self.spatial) if self.valid else padding,
            dtype=dtype,
            holes=self.holes,
            spacing=self.spacing,
        )


_WIDE_WINGS = str(TapPattern.partial(island=13, wing=4, dilation=13))  # 21 taps over a span of 105

_ROUND, _TWO_ROUNDS = (0.5, 1, 0.5), (0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25)
_INTERPOLATED_7 = str(TapPattern.grid((3, 3), 2).spread_by((_ROUND, _ROUND)))
_INTERPOLATED_15 = str(TapPattern.grid((3, 3), 4).spread_by((_TWO_ROUNDS, _TWO_ROUNDS)))

# fmt: off
_DENSE_ROWS = (
    _Row("deeplabv3-aspp-d6", "DeepLabV3 ASPP, output stride 16", (33, 33), "3x3d6x6", (16, 2048, 256), (1, 512, 256)),
    _Row("deeplabv3-aspp-d12", "DeepLabV3 ASPP, output stride 16", (33, 33), "3x3d12x12",
         (16, 2048, 256), (1, 512, 256)),
    _Row("deeplabv3-aspp-d18", "DeepLabV3 ASPP, output stride 16", (33, 33), "3x3d18x18",
         (16, 2048, 256), (1, 512, 256)),
    _Row("deeplabv3-aspp8-d12", "DeepLabV3 ASPP, output stride 8", (65, 65), "3x3d12x12",
         (8, 2048, 256), (1, 256, 256)),
    _Row("deeplabv3-aspp8-d24", "DeepLabV3 ASPP, output stride 8", (65, 65), "3x3d24x24",
         (8, 2048, 256), (1, 256, 256)),
    _Row("deeplabv3-aspp8-d36", "DeepLabV3 ASPP, output stride 8", (65, 65), "3x3d36x36",
         (8, 2048, 256), (1, 256, 256)),
    _Row("drn-d4", "DRN-D level 8", (28, 28), "3x3d4x4", (32, 512, 512), (1, 512, 512)),
    _Row("csrnet-d2", "CSRNet back-end", (96, 128), "3x3d2x2", (1, 512, 512), (1, 128, 128)),
    _Row("espnet-d16", "ESPNet branch", (64, 128), "3x3d16x16", (8, 25, 25), (8, 25, 25)),
    _Row("hdc-d5", "Hybrid dilated convolution", (100, 100), "3x3d5x5", (2, 256, 256), (1, 128, 128)),
    # One group of output channels that share a dilation; a whole layer has sixteen such groups.
    _Row("icconv-d2x4", "IC-Conv ResNet-50 stage 3", (14, 14), "3x3d2x4", (64, 256, 16), (64, 256, 16)),
    _Row("wavenet-d512", "WaveNet", (16000,), "2d512", (8, 64, 128), (1, 64, 128), causal=True),
    _Row("tcn-d4", "TCN", (400,), "3d4", (32, 600, 600), (2, 600, 600), causal=True),
    _Row("bigvgan-d5", "BigVGAN-like", (2048,), "11d5", (16, 256, 256), (1, 256, 256)),
    _Row("partial-21of105", "partially dilated", (4096,), _WIDE_WINGS, (8, 256, 256), (1, 128, 128)),
    # Nine weights a channel pair, spread over the window by a footprint.
    _Row("interpolated-7x7", "interpolated 3x3, one round", (56, 56), _INTERPOLATED_7, (64, 64, 64), (8, 64, 64)),
    _Row("interpolated-15x15", "interpolated 3x3, two rounds", (56, 56), _INTERPOLATED_15, (64, 64, 64), (8, 64, 64)),
    # Every synapse has a delay of its own, so the taps that all channels share are the whole span.
    _Row("snn-delays-31", "spiking network with learnt delays", (100,), "31", (128, 512, 512), (4, 256, 256)),
    _Row("aspp3d-d6", "3-D ASPP", (8, 16, 16), "3x3x3d6x6x6", (1, 256, 256), (1, 128, 128)),
    _Row("vnet-d2", "V-Net style", (48, 48, 48), "3x3x3d2x2x2", (2, 64, 64), (1, 16, 16)),
    _Row("r2plus1d-d2", "R(2+1)D temporal", (16, 56, 56), "3x1x1d2x1x1", (8, 144, 64), (1, 144, 64)),
)

_DEPTHWISE_ROWS = (
    _Row("dcls-s1-34of17", "ConvNeXt-T-dcls stage 1", (56, 56), _scattered(34, 17),
         (128, 96, 96), (4, 96, 96), DEPTHWISE, spacing=34),
    _Row("dcls-s1-bilinear", "ConvNeXt-T-dcls stage 1, bilinear", (56, 56), _scattered(34, 17, spread=2),
         (128, 96, 96), (4, 96, 96), DEPTHWISE, spacing=34),
    _Row("dcls-s3-34of17", "ConvNeXt-T-dcls stage 3", (14, 14), _scattered(34, 17),
         (128, 384, 384), (8, 384, 384), DEPTHWISE, spacing=34),
    _Row("convformer-26of23", "ConvFormer-dcls stage 1", (56, 56), _scattered(26, 23),
         (128, 128, 128), (1, 128, 128), DEPTHWISE, spacing=26),
    # The same kernels written dense: no zeros, and for each channel zeros at places of its own.
    _Row("dense-k17", "ConvNeXt-T-dcls stage 1, written dense", (56, 56), "17x17",
         (128, 96, 96), (4, 96, 96), DEPTHWISE),
    _Row("holes-34of17", "ConvNeXt-T-dcls stage 1, holes of each channel", (56, 56), "17x17",
         (128, 96, 96), (4, 96, 96), DEPTHWISE, holes=34),
    _Row("replknet-s1-k31", "RepLKNet stage 1", (56, 56), "31x31", (64, 128, 128), (1, 128, 128), DEPTHWISE),
    _Row("replknet-s3-k27", "RepLKNet stage 3", (14, 14), "27x27", (64, 512, 512), (4, 512, 512), DEPTHWISE),
    _Row("slak-51x5", "SLaK-T", (56, 56), "51x5", (64, 124, 124), (2, 124, 124), DEPTHWISE),
    _Row("slak-5x51", "SLaK-T", (56, 56), "5x51", (64, 124, 124), (2, 124, 124), DEPTHWISE),
    _Row("unireplknet-k13", "UniRepLKNet", (14, 14), "13x13", (64, 320, 320), (32, 320, 320), DEPTHWISE),
    _Row("van-k7d3", "VAN large-kernel attention", (56, 56), "7x7d3x3", (128, 64, 64), (4, 64, 64), DEPTHWISE),
    _Row("convtasnet-d128", "Conv-TasNet", (4000,), "3d128", (8, 512, 512), (2, 512, 512), DEPTHWISE),
    _Row("conformer-k31", "Conformer, training", (512,), "31", (32, 512, 512), (8, 512, 512), DEPTHWISE),
    _Row("conformer-k31-infer", "Conformer, inference", (256,), "31", (1, 512, 512), (1, 512, 512), DEPTHWISE),
    _Row("partial-dw-13of21", "partially dilated depthwise", (1024,), "101010101111101010101",
         (8, 256, 256), (8, 256, 256), DEPTHWISE),
    _Row("partial-dw-21of105", "partially dilated depthwise", (4096,), _WIDE_WINGS,
         (8, 768, 768), (2, 192, 192), DEPTHWISE),
    _Row("interpolated-dw-15x15", "interpolated 3x3 depthwise, two rounds", (56, 56), _INTERPOLATED_15,
         (64, 128, 128), (4, 96, 96), DEPTHWISE),
    _Row("uxnet3d-k7", "3D UX-Net", (48, 48, 48), "7x7x7", (2, 48, 48), (1, 16, 16), DEPTHWISE),
    _Row("mamba-k4", "Mamba", (2048,), "4", (8, 4096, 4096), (2, 1024, 1024), DEPTHWISE, causal=True),
)

# Everyday layers, with nothing in them to gain: torch's own call is right, and must be picked at no cost.
_CONTROL_ROWS = (
    _Row("resnet50-stem", "ResNet-50 stem", (224, 224), "7x7", (64, 3, 64), (2, 3, 64), stride=2),
    _Row("resnet50-3x3", "ResNet-50 stage 3", (14, 14), "3x3", (64, 256, 256), (8, 256, 256)),
    _Row("resnet50-down", "ResNet-50 stage 2, first block", (56, 56), "3x3", (64, 128, 128), (4, 128, 128), stride=2),
    _Row("resnet50-1x1", "ResNet-50 stage 3", (14, 14), "1x1", (64, 256, 1024), (8, 256, 1024)),
    _Row("resnext50-g32-s1", "ResNeXt-50 stage 1", (56, 56), "3x3", (64, 128, 128), (8, 128, 128), 32),
    _Row("resnext50-g32", "ResNeXt-50 stage 2", (28, 28), "3x3", (64, 256, 256), (8, 256, 256), 32),
    _Row("vgg16-3x3", "VGG-16 second layer", (224, 224), "3x3", (16, 64, 64), (1, 64, 64)),
    _Row("mobilenetv2-1x1", "MobileNetV2 expansion", (56, 56), "1x1", (64, 24, 144), (8, 24, 144)),
    _Row("convnext-stem", "ConvNeXt-T stem", (224, 224), "4x4", (64, 3, 96), (8, 3, 96), stride=4, valid=True),
    _Row("vit-patch16", "ViT-B/16 patches", (224, 224), "16x16", (64, 3, 768), (4, 3, 768), stride=16, valid=True),
    _Row("conformer-pointwise", "Conformer, convolution module", (512,), "1d1", (32, 512, 1024), (4, 512, 1024)),
    _Row("conformer-linear", "Conformer, attention projection", (256,), "1d1", (32, 512, 512), (2, 512, 512)),
)
# fmt: on

_ROWS = _DENSE_ROWS + _DEPTHWISE_ROWS + _CONTROL_ROWS
_CPU = tuple(row.layer(row.cpu, "float32") for row in _ROWS)
_CPU_BF16 = tuple(row.layer(row.cpu, "bfloat16") for row in _ROWS)
_CPU_FP16 = tuple(row.layer(row.cpu, "float16") for row in _ROWS)
_GPU = tuple(row.layer(row.full, "bfloat16") for row in _ROWS)
_QUICK = (
    "deeplabv3-aspp-d18", "drn-d4", "wavenet-d512", "vnet-d2", "dcls-s1-34of17", "replknet-s3-k27", "van-k7d3",
    "convtasnet-d128", "conformer-k31", "partial-dw-13of21", "mamba-k4",
)  # fmt: skip
_HALVES = (
    "deeplabv3-aspp-d18", "drn-d4", "wavenet-d512", "resnet50-stem", "resnet50-3x3", "resnet50-1x1", "resnext50-g32",
    "dcls-s1-34of17", "replknet-s3-k27", "van-k7d3", "conformer-k31", "mamba-k4",
)  # fmt: skip

SUITES: dict[str, tuple[Layer, ...]] = {
    "cpu": _CPU,
    "quick": tuple(layer for layer in _CPU if layer.name in _QUICK),
    "depthwise": tuple(layer for layer in _CPU if layer.kind == "depthwise"),
    "control": tuple(layer for layer in _CPU if layer.kind == "control"),
    "cpu-bf16": _CPU_BF16,
    "depthwise-bf16": tuple(layer for layer in _CPU_BF16 if layer.kind == "depthwise"),
    "halves-bf16": tuple(layer for layer in _CPU_BF16 if layer.name in _HALVES),
    "cpu-fp16": _CPU_FP16,
    "halves-fp16": tuple(layer for layer in _CPU_FP16 if layer.name in _HALVES),
    "gpu": _GPU,
}
"""Suites by name. "cpu": every layer cut for a small CPU, in float32. From it, "quick": a mix, native at its best and
not; "depthwise"; "control": one group or few, one regular grid of taps, where torch is mostly right. "-bf16": the same
layers in bfloat16; "-fp16": in float16; "halves-": a dozen of those, everyday and depthwise ones. "gpu": every layer at
full size in bfloat16."""

MUST_SHOW = (
    "dense-k17", "holes-34of17", "dcls-s1-34of17", "replknet-s1-k31", "slak-51x5", "van-k7d3", "uxnet3d-k7",
    "conformer-k31", "conformer-k31-infer", "convtasnet-d128", "partial-dw-13of21", "mamba-k4", "deeplabv3-aspp-d18",
    "aspp3d-d6",
)  # fmt: skip
"""Layers whose rows a summary shows whatever they say: the classic dense kernel, kernels with holes of every sort, the
smallest calls, and those of the dilated layers that gain most and least."""


def check_layers(parser: argparse.ArgumentParser, suite: str, names: Iterable[str] | None) -> None:
    """End with the parser's error where a suite has no layer of such a name."""
    unknown = sorted(set(names or ()) - {layer.name for layer in SUITES[suite]})
    if unknown:
        parser.error(f"suite {suite} has no layer {', '.join(unknown)}; benchmarks.run --list names them")
