"""Learnable spacings whose positions all output channels share: a depthwise and a 1x1 convolution, exactly.

``y[o] = sum_{i, n} w[o, i, n] (x[i] * T[i, n])``, T an element spread onto the window: every element's plane is
made once for all outputs. T is separable, so that a plane is one 1-D convolution an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adaptconv import functional
from adaptconv.arguments import checked_padding
from adaptconv.errors import ConvArgumentError
from adaptconv.kernel import Kernel
from adaptconv.kernels.base import full_precision
from adaptconv.kernels.profiles import Rule, profiles
from adaptconv.problem import Padding
from adaptconv.taps import TapPattern

_PLANE_COST = 8  # a multiply-add of a 1-D depthwise convolution, in those of a matrix product
_CHUNK_BYTES = 32 << 20  # planes made at a time
_KEPT_BYTES = 128 << 20  # planes kept for the backward pass; more are made again


def expanded(position: Tensor, weight: Tensor) -> Tensor:
    """Shared positions ``[axes, I, n]`` as those of every output, ``[axes, O, I, n]``."""
    return position.unsqueeze(1).expand(position.shape[0], *weight.shape)


def units(position: Tensor, sigma: Tensor | None, rule: Rule) -> list[Tensor]:
    """Every element of weight 1 along each axis: ``[I, n, k]`` an axis, in float32 or wider; differentiable."""
    dtype = torch.promote_types(position.dtype, torch.float32)
    with full_precision(position.device):
        made = profiles(position.to(dtype), None if sigma is None else sigma.to(dtype), rule).values
        if rule.normalised:
            made = [g / g.sum(1, keepdim=True) for g in made]
        return [g.transpose(1, 2) for g in made]


def spread_shared(weight: Tensor, position: Tensor, sigma: Tensor | None, rule: Rule) -> Tensor:
    """The constructed kernel ``[O, I, *window]`` of ``weight [O, I, n]`` and ``position [axes, I, n]``."""
    elements, *others = units(position, sigma, rule)
    with full_precision(weight.device):
        for q in others:
            elements = (elements.unsqueeze(3) * q.unsqueeze(2)).flatten(2)
        kernel = torch.bmm(weight.to(elements.dtype).transpose(0, 1), elements).transpose(0, 1)
    return kernel.reshape(*weight.shape[:2], *rule.window).to(weight.dtype)


def convolve_shared(
    x: Tensor, weight: Tensor, position: Tensor, sigma: Tensor | None, bias: Tensor | None, rule: Rule,
    taps: TapPattern, stride: tuple[int, ...], padding: Any, groups: int,
) -> Tensor:  # fmt: skip
    """Convolve without constructing the kernel, wherever that is less work; ``Family.convolve`` says what."""
    axes, channels = len(rule.window), weight.shape[1] * groups
    if x.dim() not in (axes + 1, axes + 2) or x.shape[-axes - 1] != channels:
        raise ConvArgumentError(
            f"conv{axes}d: groups={groups} and weight {tuple(weight.shape)} expect an input with {channels} channels "
            f"and {axes} spatial axes, batched or not; got shape {tuple(x.shape)}"
        )
    if not steps_are_less_work(weight.shape, rule.window, groups):
        kernel = Kernel(spread_shared(weight, position, sigma, rule).flatten(2), taps)
        return functional.convolution(axes, x, kernel, bias, stride, padding, 1, groups)
    pads = checked_padding(axes, padding, rule.window, stride)
    filters = [q.to(x.dtype) for q in units(position, sigma, rule)]
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    y = _chunked(batched, weight, bias, filters, stride, pads, groups)
    return y if x.dim() == axes + 2 else y.squeeze(0)


def steps_are_less_work(weight: Sequence[int], window: Sequence[int], groups: int) -> bool:
    """Whether planes, ``n (k_0 + k_1 + ...)`` multiply-adds a channel, and their sums, n an output, cost less.

    The constructed kernel has ``k_0 k_1 ...`` an output, in a faster convolution. Depthwise, it always wins.
    """
    outs, _, count = weight
    return count * (_PLANE_COST * groups * sum(window) + outs) < outs * math.prod(window)


def _chunked(
    x: Tensor, weight: Tensor, bias: Tensor | None, filters: list[Tensor], stride: tuple[int, ...], pads: Padding,
    groups: int,
) -> Tensor:  # fmt: skip
    """A few images at a time: the planes are n times as large as the input."""

    def steps(part: Tensor) -> Tensor:
        return _steps(part, weight, bias, filters, stride, pads, groups)

    if torch.compiler.is_compiling():
        return steps(x)
    image = math.prod(x.shape[1:]) * weight.shape[2] * x.element_size()
    total = image * x.shape[0]
    if total <= _CHUNK_BYTES or x.shape[0] < 2:
        return steps(x)
    parts = x.split(max(_CHUNK_BYTES // image, 1))
    if torch.is_grad_enabled() and total > _KEPT_BYTES:
        return torch.cat(
            [checkpoint(steps, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )  # fmt: skip
    return torch.cat([steps(part) for part in parts])


def _steps(
    x: Tensor, weight: Tensor, bias: Tensor | None, filters: list[Tensor], stride: tuple[int, ...], pads: Padding,
    groups: int,
) -> Tensor:  # fmt: skip
    """One depthwise convolution an axis, the first of n outputs a channel, and the 1x1 that adds the planes up."""
    axes, channels = len(filters), x.shape[1]
    outs, ins, count = weight.shape
    for axis, q in enumerate(filters):
        shape, step = [1] * axes, [1] * axes
        zeros: list[Any] = [(0, 0)] * axes
        shape[axis], step[axis], zeros[axis] = q.shape[2], stride[axis], pads[axis]
        taps = q.repeat(groups, 1, 1).reshape(channels * count, 1, *shape)
        x = functional.convolution(axes, x, taps, None, tuple(step), tuple(zeros), 1, x.shape[1])
    mix = weight.reshape(outs, ins * count, *(1,) * axes)
    return functional.convolution(axes, x, mix, bias, 1, 0, 1, groups)
