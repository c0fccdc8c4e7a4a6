"""The models that ``benchmarks.compiled`` compiles, each with five input sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import AtrousSegmenter, WingedDenoiser
from benchmarks.zoo import NETWORKS, Network, hub

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """One model.

    Attributes:
        network: how it is built, and its first input.
        sizes: four further shapes, each of which has other extents than the first wherever it may.
        trained: what stands for those in training, where plain torch.compile cannot compile a step of unknown extents.
    """

    network: Network
    sizes: tuple[Shape, ...]
    trained: tuple[Shape, ...] = ()

    @property
    def name(self) -> str:
        """Unique in the table."""
        return self.network.name

    def shapes(self, *, train: bool) -> tuple[Shape, ...]:
        """Every input shape, the network's own first."""
        return (self.network.shape, *((train and self.trained) or self.sizes))

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model in eval mode and its first input, the same every time.

        Raises:
            ModuleNotFoundError: the package it needs is not installed.
        """
        module, (x,) = self.network.build()
        return module, x

    def input_of(self, shape: Shape) -> Tensor:
        """An input of another shape, the same every time."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _pictures(batch: int, *extents: tuple[int, int]) -> tuple[Shape, ...]:
    return tuple((batch, 3, *pair) for pair in extents)


def _batches(shape: Shape, *batches: int) -> tuple[Shape, ...]:
    return tuple((batch, *shape[1:]) for batch in batches)


_SEGMENTER = Network("segmenter", "benchmarks.models", AtrousSegmenter, (1, 3, 384, 384))
_DENOISER = Network("denoiser", "benchmarks.models", WingedDenoiser, (8, 1, 768))
_PICTURE = (2, 3, 96, 96)
_HUB = "transformers"
MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(_SEGMENTER, _pictures(1, (320, 256), (256, 352), (288, 192), (192, 320))),
        Model(_DENOISER, ((8, 1, 512), (8, 1, 640), (8, 1, 900), (8, 1, 333))),
        Model(
            NETWORKS["hf-convnext"],
            _pictures(2, (192, 160), (160, 256), (128, 192), (256, 224)),
            trained=_batches(NETWORKS["hf-convnext"].shape, 1, 3, 4, 5),
        ),
        Model(NETWORKS["hf-mobilenetv2-os8"], _pictures(2, (192, 160), (160, 256), (128, 192), (224, 288))),
        Model(
            NETWORKS["hf-segformer"],
            _pictures(1, (192, 160), (160, 256), (128, 192), (224, 288)),
            trained=_batches(NETWORKS["hf-segformer"].shape, 2, 3, 4, 5),
        ),
        Model(NETWORKS["hf-mobilevit-os8"], _pictures(2, (192, 160), (160, 256), (128, 192), (224, 288))),
        Model(NETWORKS["hf-hifigan"], ((1, 80, 80), (1, 60, 80), (1, 91, 80), (1, 120, 80))),
        Model(NETWORKS["hf-conformer"], ((2, 24000), (2, 16000), (2, 20001), (2, 28000))),
        Model(
            Network("hf-resnet", "ResNet, basic blocks", hub.resnet, _PICTURE, _HUB),
            _pictures(2, (64, 128), (128, 96), (160, 64), (96, 128)),
        ),
        Model(
            Network("hf-univnet", "UnivNet vocoder", hub.univnet, (1, 40, 36), _HUB),
            ((1, 32, 36), (1, 24, 36), (1, 37, 36), (1, 48, 36)),
        ),
        Model(
            Network("hf-dac", "Descript audio codec", hub.dac, (1, 1, 4096), _HUB),
            ((1, 1, 3072), (1, 1, 2048), (1, 1, 3584), (1, 1, 5120)),
        ),
    )
}
"""Two models in plain torch and nine of the ``transformers`` package, random weights."""
