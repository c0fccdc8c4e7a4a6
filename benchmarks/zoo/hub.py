"""Networks of the ``transformers`` package, built from its configurations: its code, random weights, no download.

Depth and width are cut to what two cores can time; operations, kernels, strides and dilations are the models' own.
Dropout, layer drop and masking are off, so that a training step is the same each time.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor, nn


class Answer(nn.Module):
    """A model of the package that returns one tensor, so that every network is called alike.

    Args:
        model: what is called.
        field: the field of its output that counts; "" where it returns a tensor.
    """

    def __init__(self, model: nn.Module, field: str = "") -> None:
        super().__init__()
        self.model = model
        self.field = field

    def forward(self, x: Tensor) -> Tensor:
        """Call the model, return the field."""
        output: Any = self.model(x)
        answer: Tensor = getattr(output, self.field) if self.field else output
        return answer


def _made(architecture: str, config: str, field: str = "", **settings: Any) -> Answer:
    """A model by class name, with weights of variance 1 / fan-in: the package's own start fades with depth.

    Raises:
        ModuleNotFoundError: ``transformers`` is not installed.
    """
    transformers = importlib.import_module("transformers")
    model: nn.Module = getattr(transformers, architecture)(getattr(transformers, config)(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return Answer(model.float(), field)


def convnext(depths: tuple[int, ...] = (1, 1, 3, 1), widths: tuple[int, ...] = (96, 192, 384, 768)) -> Answer:
    """ConvNeXt-T's stages, depthwise 7x7: ``[N, 3, H, W] -> [N, classes]``."""
    return _made(
        "ConvNextForImageClassification", "ConvNextConfig", "logits", depths=list(depths), hidden_sizes=list(widths),
        layer_scale_init_value=1.0, drop_path_rate=0.0, num_labels=100,
    )  # fmt: skip


def mobilenet_v2_segmenter(multiplier: float = 0.5, size: int = 256) -> Answer:
    """MobileNetV2 held at output stride 8 by dilation, with its DeepLabV3+ head: ``-> [N, classes, H/8, W/8]``."""
    return _made(
        "MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", "logits", depth_multiplier=multiplier,
        image_size=size, output_stride=8, classifier_dropout_prob=0.0, num_labels=21,
    )  # fmt: skip


def segformer(
    depths: tuple[int, ...] = (1, 1, 1, 1), widths: tuple[int, ...] = (32, 64, 160, 256), decoder: int = 128
) -> Answer:
    """SegFormer-B0's widths; a depthwise 3x3 in each feed-forward layer: ``-> [N, classes, H/4, W/4]``."""
    return _made(
        "SegformerForSemanticSegmentation", "SegformerConfig", "logits", depths=list(depths),
        hidden_sizes=list(widths), decoder_hidden_size=decoder, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0, drop_path_rate=0.0, num_labels=21,
    )  # fmt: skip


def mobilevit_segmenter(size: int = 256) -> Answer:
    """MobileViT-XXS at output stride 8 with an atrous pyramid (6, 12, 18): ``-> [N, classes, H/8, W/8]``."""
    return _made(
        "MobileViTForSemanticSegmentation", "MobileViTConfig", "logits", image_size=size, output_stride=8,
        hidden_sizes=[64, 80, 96], neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320], expand_ratio=2.0,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout_prob=0.0,
        aspp_out_channels=128, aspp_dropout_prob=0.0, num_labels=21,
    )  # fmt: skip


def hifigan(channels: int = 128, mels: int = 80) -> Answer:
    """SpeechT5's HiFi-GAN vocoder, kernels 3, 7 and 11 with dilations 1, 3 and 5: ``[N, T, mels] -> [N, 256 T]``."""
    return _made(
        "SpeechT5HifiGan", "SpeechT5HifiGanConfig", upsample_initial_channel=channels, model_in_dim=mels,
        normalize_before=False,
    )  # fmt: skip


def conformer(layers: int = 2, width: int = 256, features: int = 128) -> Answer:
    """Wav2Vec2-Conformer, a depthwise 1-D convolution of 31 taps in each layer: ``[N, samples] -> [N, T, width]``."""
    return _made(
        "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", "last_hidden_state", num_hidden_layers=layers,
        hidden_size=width, num_attention_heads=4, intermediate_size=4 * width, conv_dim=[features] * 7,
        num_conv_pos_embeddings=128, num_conv_pos_embedding_groups=16, conv_depthwise_kernel_size=31,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0,
        conformer_conv_dropout=0.0, layerdrop=0.0, apply_spec_augment=False,
    )  # fmt: skip


def resnet(depths: tuple[int, ...] = (1, 1, 1, 1), widths: tuple[int, ...] = (32, 64, 128, 256)) -> Answer:
    """A ResNet of basic blocks, nothing but everyday convolutions: ``[N, 3, H, W] -> [N, classes]``."""
    return _made(
        "ResNetForImageClassification", "ResNetConfig", "logits", depths=list(depths), hidden_sizes=list(widths),
        embedding_size=widths[0], layer_type="basic", num_labels=100,
    )  # fmt: skip


class WithNoise(nn.Module):
    """A vocoder that is fed its noise instead of drawing it: ``[N, T, mels + noise] -> [N, samples]``.

    Args:
        model: takes ``[N, T, mels]`` and ``noise_sequence``.
        mels: how many of the last axis are the spectrogram's.
    """

    def __init__(self, model: nn.Module, mels: int) -> None:
        super().__init__()
        self.model = model
        self.mels = mels

    def forward(self, x: Tensor) -> Tensor:
        """Split the last axis, return the waveform."""
        waveform: Tensor = self.model(x[..., : self.mels], noise_sequence=x[..., self.mels :]).waveforms
        return waveform


def univnet(channels: int = 16, mels: int = 20, noise: int = 16) -> WithNoise:
    """UnivNet's vocoder, with kernels predicted from the input and applied by unfold and einsum.

    Shapes: ``[N, T, mels + noise] -> [N, 32 T]``.
    """
    made = _made(
        "UnivNetModel", "UnivNetConfig", model_in_channels=noise, model_hidden_channels=channels, num_mel_bins=mels,
        resblock_kernel_sizes=[3, 3], resblock_stride_sizes=[8, 4], resblock_dilation_sizes=[[1, 3, 9], [1, 3, 9]],
        kernel_predictor_num_blocks=1, kernel_predictor_hidden_channels=channels, kernel_predictor_dropout=0.0,
    )  # fmt: skip
    return WithNoise(made.model, mels)


def dac(encoder: int = 8, decoder: int = 64) -> Answer:
    """The Descript audio codec, residual units of dilations 1, 3 and 9, transposed convolutions on the way up.

    Shapes: ``[N, 1, samples] -> [N, samples]``.
    """
    return _made(
        "DacModel", "DacConfig", "audio_values", encoder_hidden_size=encoder, downsampling_ratios=[2, 4],
        decoder_hidden_size=decoder, n_codebooks=2, codebook_size=64, codebook_dim=4, quantizer_dropout=0.0,
    )  # fmt: skip
