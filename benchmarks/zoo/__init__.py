"""Whole networks by name, with inputs of a size that two cores can time: what ``benchmarks.nets`` runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.zoo import hub, papers, sequences


@dataclass(frozen=True, slots=True)
class Network:
    """One network.

    Attributes:
        name: unique in the table.
        source: where it comes from, for people.
        make: builds it at benchmark size.
        shape: of its one float32 input, batch first.
        needs: package it takes layers or code from; "" for torch alone.
        trains: whether a training step of it is a benchmark.
    """

    name: str
    source: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    needs: str = ""
    trains: bool = True

    @property
    def memory_format(self) -> torch.memory_format | None:
        """Channels last for its rank; None for sequences, which have none."""
        return {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(self.shape))

    def build(self) -> tuple[nn.Module, tuple[Tensor]]:
        """The model in eval mode and its input, the same every time; the caller's random state is left alone.

        Batch norms have the statistics of this input, as training would give them.

        Raises:
            ModuleNotFoundError: the package it needs is not installed.
        """
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = self.make()
            inputs = (torch.randn(self.shape),)
            _settle(model, inputs[0])
        return model.eval(), inputs


def _settle(model: nn.Module, x: Tensor) -> None:
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # a cumulative mean: one pass gives the statistics themselves
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


_PICTURE = (2, 3, 224, 224)
_HUB = "transformers"
NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("convnext-dcls", "ConvNeXt-T-dcls, arXiv:2112.03740", papers.convnext_dcls, _PICTURE, "DCLS"),
        Network("replknet", "RepLKNet, arXiv:2203.06717", papers.RepLKNet, _PICTURE),
        Network("van", "VAN-B0, arXiv:2202.09741", papers.VAN, _PICTURE),
        Network("conv-tasnet", "Conv-TasNet, arXiv:1809.07454", sequences.ConvTasNet, (2, 1, 16000)),
        Network("wavenet", "WaveNet, arXiv:1609.03499", sequences.WaveNet, (1, 1, 8000)),
        Network("uxnet3d", "3D UX-Net encoder, arXiv:2209.15076", sequences.UXNetEncoder, (1, 1, 64, 64, 64)),
        Network("hf-convnext", "ConvNeXt-T", hub.convnext, _PICTURE, _HUB),
        Network("hf-mobilenetv2-os8", "MobileNetV2, output stride 8", hub.mobilenet_v2_segmenter,
                (2, 3, 256, 256), _HUB),
        Network("hf-segformer", "SegFormer-B0", hub.segformer, (1, 3, 256, 256), _HUB),
        Network("hf-mobilevit-os8", "MobileViT-XXS, output stride 8", hub.mobilevit_segmenter,
                (2, 3, 256, 256), _HUB),
        Network("hf-hifigan", "SpeechT5 HiFi-GAN", hub.hifigan, (1, 100, 80), _HUB),
        Network("hf-conformer", "Wav2Vec2-Conformer", hub.conformer, (2, 32000), _HUB),
    )
}  # fmt: skip
"""Every network of the benchmark, those written from papers first."""
