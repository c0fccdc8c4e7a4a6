"""Layers from layers: two convolutions as one, a pruned one as a sparse one, two parameters as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from adaptconv.backends.weights import picked
from adaptconv.errors import ConvArgumentError
from adaptconv.grids import Offset
from adaptconv.kernels.base import Family
from adaptconv.kernels.grid import FixedTaps, Grid
from adaptconv.kernels.masked import Mask, Masked
from adaptconv.kernels.partial import PartiallyDilated, columns
from adaptconv.modules import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d
from adaptconv.problem import Padding, same_padding
from adaptconv.taps import TapPattern

Adaptive = AdaptiveConv1d | AdaptiveConv2d | AdaptiveConv3d
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_Layer = TypeVar("_Layer", bound=Adaptive)

_LAYERS: tuple[type[Adaptive], ...] = (AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d)
_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_CONVS |= {layer: axes for axes, layer in enumerate(_LAYERS, 1)}


def from_convs(dense: Conv, dilated: Conv, *, two_parameters: bool = False) -> Adaptive:
    """One layer that computes ``dense(x) + dilated(x)``, from the values the two convolutions have now.

    The taps are the union of both kernels' taps, aligned as the paddings align them, and the biases add up.
    Outputs of one size for every input are what it takes: on each axis, padding before and after less the
    window ``(size - 1) * dilation + 1`` must be equal in both. The layer's tensors are its own: it shares no memory
    with the convolutions, and an optimizer must be made for it.

    Args:
        dense: ``nn.Conv1d/2d/3d``, or an ``AdaptiveConv`` of a plain grid.
        dilated: another of as many axes; channels, groups, stride, padding mode, dtype and device agree.
        two_parameters: keep both kernels as parameters, which train as the two convolutions would. Only for
            an odd dense kernel of dilation 1 and an odd dilated one that does not end inside it.

    Returns:
        An ``AdaptiveConv`` of the family ``PartiallyDilated``, or, where its settings cannot say the taps (even
        sizes, two dilated kernels, a dilated kernel that ends inside the dense one), ``FixedTaps``.

    Raises:
        ConvArgumentError: the convolutions do not agree, their outputs would not, or ``two_parameters`` cannot be.
    """
    axes = _checked(dense, "dense")
    if _checked(dilated, "dilated") != axes:
        raise ConvArgumentError(f"both convolutions must have as many axes; got {dense} and {dilated}")
    for name in ("in_channels", "out_channels", "groups", "stride", "padding_mode"):
        _agree(name, getattr(dense, name), getattr(dilated, name))
    for name in ("dtype", "device"):
        _agree(name, getattr(dense.weight, name), getattr(dilated.weight, name))
    joined = _joined(dense, dilated)
    family = _partial(dense, dilated, joined.taps)
    weights = (dense.weight.detach(), dilated.weight.detach())
    tensors: dict[str, Tensor] = {}
    if two_parameters:
        if family is None:
            raise ConvArgumentError(
                "two_parameters needs an odd dense kernel of dilation 1 and an odd dilated kernel that does not end "
                f"inside it; got kernels {dense.kernel_size} with dilation {dense.dilation} and {dilated.kernel_size} "
                f"with dilation {dilated.dilation}: leave two_parameters at False"
            )
        family = replace(family, two_parameters=True).bound(axes)
        trained = (dense.weight.requires_grad, dilated.weight.requires_grad)
        tensors["weight"] = nn.Parameter(weights[0].clone(), trained[0])
        tensors["wing_weight"] = nn.Parameter(weights[1].clone(), trained[1])
    else:
        parts = [picked(w.flatten(2), columns(p, joined.taps)) for w, p in zip(weights, joined.parts, strict=True)]
        trains = dense.weight.requires_grad or dilated.weight.requires_grad
        tensors["weight"] = nn.Parameter(parts[0] + parts[1], trains)
    biases = [bias for bias in (dense.bias, dilated.bias) if bias is not None]
    bias = None
    if biases:
        total = torch.stack([b.detach() for b in biases]).sum(0)
        bias = nn.Parameter(total, any(b.requires_grad for b in biases))
    return _built(dense, family or FixedTaps(joined.taps), tensors, bias, joined.padding)


def from_pruned(conv: Conv) -> Adaptive:
    """The sparse layer of a convolution pruned by ``torch.nn.utils.prune``, with masked gradients.

    The layer trains the convolution's own parameters: its ``weight`` is the object ``conv.weight_orig``, its
    ``bias`` is ``conv.bias``, so that an optimizer goes on as it is. Its family is ``Masked`` with the pruning's
    mask, one value a weight; positions that are pruned in every channel are no taps. ``conv`` is left as it is.

    Args:
        conv: ``nn.Conv1d/2d/3d`` (or an ``AdaptiveConv`` of a plain grid) whose weight was pruned, by any method or by
            several; unstructured, structured or custom.

    Raises:
        ConvArgumentError: the weight is not pruned, its mask is not made of 0 and 1 or kills every weight, or the bias
            is pruned: a layer's bias has no mask, so its pruned values would train.
    """
    axes = _checked(conv, "pruned", pruned=True)
    weight, mask = getattr(conv, "weight_orig", None), getattr(conv, "weight_mask", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(mask, Tensor):
        raise ConvArgumentError(
            f"from_pruned takes a convolution whose weight was pruned by torch.nn.utils.prune (weight_orig and "
            f"weight_mask); {conv} has {', '.join(dict(conv.named_parameters())) or 'no parameters'}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ConvArgumentError(
            "weight_mask has values other than 0 and 1: fold them into the weight with prune.remove"
        )
    bias: Tensor | None = conv.bias
    bias_mask = getattr(conv, "bias_mask", None)
    if isinstance(bias_mask, Tensor):
        if not bool((bias_mask == 1).all()):
            raise ConvArgumentError(
                "the bias is pruned, and a layer's bias has no mask: its pruned values would train. Make its pruning "
                "permanent first: torch.nn.utils.prune.remove(conv, 'bias')"
            )
        bias = conv.get_parameter("bias_orig")
    family = Masked(conv.kernel_size, mask=mask, dilation=conv.dilation).bound(axes)
    tensors = {"weight": weight, "mask": Mask.of(mask).tensor().to(weight.device)}
    return _built(conv, family, tensors, bias, conv.padding)


def to_compact(layer: _Layer) -> _Layer:
    """Turn a two-parameter ``PartiallyDilated`` layer into the compact form, in place, its function unchanged.

    The new ``weight [C_out, C_in/groups, T]`` is a new parameter and ``wing_weight`` is gone: make a new optimizer.
    It trains if either of the two did. A layer in the compact form is left as it is.

    Returns:
        The layer.

    Raises:
        ConvArgumentError: a layer of another family, or one with parametrized weights.
    """
    family = getattr(layer, "family", None)
    if not isinstance(family, PartiallyDilated):
        raise ConvArgumentError(f"to_compact takes a layer of the family PartiallyDilated, got {layer!r}")
    if not family.two_parameters:
        return layer
    if parametrize.is_parametrized(layer):
        raise ConvArgumentError("this layer has parametrized weights: remove the parametrizations first")
    tensors = layer._tensors()
    with torch.no_grad():
        weight = family.compact(*tensors.values()).contiguous()
    trains = any(tensor.requires_grad for tensor in tensors.values())
    for name in tensors:
        delattr(layer, name)
    layer._take(replace(family, two_parameters=False).bound(layer._axes), {"weight": nn.Parameter(weight, trains)})
    return layer


# ---- geometry ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Joined:
    """Two kernels in one window: the union of taps, each kernel's offsets there, and the padding."""

    taps: TapPattern
    parts: tuple[list[Offset], list[Offset]]
    padding: str | tuple[int, ...]


def _joined(dense: Conv, dilated: Conv) -> _Joined:
    patterns = [TapPattern.grid(conv.kernel_size, conv.dilation) for conv in (dense, dilated)]
    pads = [_pads(conv, taps.window) for conv, taps in zip((dense, dilated), patterns, strict=True)]
    window: list[int] = []
    starts: list[list[int]] = [[], []]
    both: list[tuple[int, int]] = []
    for axis, pair in enumerate(zip(*pads, strict=True)):
        extents = [taps.window[axis] for taps in patterns]
        missing = sum(pair[0]) - extents[0] - sum(pair[1]) + extents[1]
        if missing:
            raise ConvArgumentError(_misaligned(axis, extents, pair, missing))
        before, after = (max(zeros) for zeros in zip(*pair, strict=True))
        for start, (own, _) in zip(starts, pair, strict=True):
            start.append(before - own)
        window.append(extents[0] + before + after - sum(pair[0]))
        both.append((before, after))
    first, second = (
        [tuple(i + s for i, s in zip(offset, start, strict=True)) for offset in taps.offsets]
        for taps, start in zip(patterns, starts, strict=True)
    )
    taps = TapPattern(tuple({*first, *second}), tuple(window))
    even = all(before == after for before, after in both)  # else both are 'same', and so is their union
    return _Joined(taps, (first, second), tuple(before for before, _ in both) if even else "same")


def _pads(conv: Conv, window: tuple[int, ...]) -> Padding:
    if isinstance(conv.padding, str):
        return same_padding(window) if conv.padding == "same" else ((0, 0),) * len(window)
    return tuple((zeros, zeros) for zeros in conv.padding)


def _misaligned(axis: int, extents: Sequence[int], pads: Sequence[tuple[int, int]], missing: int) -> str:
    said = (
        f"on axis {axis} the dense kernel's window is {extents[0]} with padding {pads[0]}, the dilated kernel's "
        f"{extents[1]} with padding {pads[1]} (before, after): their outputs differ by {abs(missing)} in size"
    )
    if (extents[0] - extents[1]) % 2:
        return f"{said}. Windows that differ by an odd number align only with padding='same' on both"
    wanted = pads[0][0] + (extents[1] - extents[0]) // 2
    if pads[0][0] == pads[0][1] and wanted >= 0:
        return f"{said}. Give the dilated convolution padding={wanted} on this axis"
    return f"{said}. Give the dense convolution padding={max(pads[1]) + (extents[0] - extents[1]) // 2} on this axis"


def _partial(dense: Conv, dilated: Conv, taps: TapPattern) -> PartiallyDilated | None:
    """The family that says these taps; None where none does."""
    odd = all(width % 2 for width in (*dense.kernel_size, *dilated.kernel_size))
    if not odd or any(step != 1 for step in dense.dilation):
        return None
    wing = tuple(
        size // 2 - width // 2 // step
        for width, size, step in zip(dense.kernel_size, dilated.kernel_size, dilated.dilation, strict=True)
    )
    if min(wing) < 0:
        return None
    family = PartiallyDilated(dense.kernel_size, wing, dilated.dilation).bound(taps.axes)
    return family if family.taps == taps else None


# ---- layers -----------------------------------------------------------------------------------------


def _built(like: Conv, family: Family, tensors: dict[str, Tensor], bias: Tensor | None, padding: Any) -> Adaptive:
    """A layer with these tensors, in all else like a convolution. Nothing is initialised: no random number is drawn."""
    axes = len(like.kernel_size)
    layer = _LAYERS[axes - 1](
        like.in_channels, like.out_channels, family, like.stride, padding, 1, like.groups, bias is not None,
        like.padding_mode, device="meta", dtype=like.weight.dtype,
    )  # fmt: skip
    layer._take(family.bound(axes), tensors)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return layer.train(like.training)


def _checked(conv: Any, what: str, *, pruned: bool = False) -> int:
    """Axes of a convolution that is nothing but one.

    Raises:
        ConvArgumentError: it is not: another kind of module, or one whose weight or call is changed by hooks.
    """
    axes = _CONVS.get(type(conv))
    if axes is None or (isinstance(conv, _LAYERS) and not isinstance(conv.family, Grid)):
        raise ConvArgumentError(
            f"the {what} convolution must be an nn.Conv1d, nn.Conv2d or nn.Conv3d itself, whose call is known; got "
            f"{conv!r}. Remove parametrizations, or copy a subclass's weights into a plain one"
        )
    hooks = [*conv._forward_pre_hooks.values(), *conv._forward_hooks.values()]
    if pruned:
        hooks = [hook for hook in hooks if not isinstance(hook, prune.BasePruningMethod)]
    elif "weight" not in conv._parameters:
        raise ConvArgumentError(
            f"the {what} convolution's weight is computed from other parameters ({', '.join(conv._parameters)}): "
            f"make it permanent first, e.g. by torch.nn.utils.prune.remove(conv, 'weight')"
        )
    if hooks:
        raise ConvArgumentError(
            f"the {what} convolution has hooks, which a new layer would not run: {hooks}; remove them"
        )
    return axes


def _agree(name: str, first: object, second: object) -> None:
    if first != second:
        raise ConvArgumentError(
            f"both convolutions must have the same {name}; got {first!r} for the dense and {second!r} for the dilated"
        )
