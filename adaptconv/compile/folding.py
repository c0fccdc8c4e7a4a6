"""Folding: what stands next to a convolution in a graph and is part of the same function.

Zero padding before it becomes its own padding. Constructed weights become the kernel they make.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx

from adaptconv.compile.constructed import Uncut, cut
from adaptconv.compile.effects import Effects, storages
from adaptconv.compile.nodes import Conv, named, stand_in, value
from adaptconv.compile.probing import probe
from adaptconv.problem import Padding
from adaptconv.taps import TapPattern
from adaptconv.trilinear import layout_of

_PADS: dict[object, tuple[str, ...]] = {
    F.pad: ("input", "pad", "mode", "value"),
    torch._C._nn.pad: ("input", "pad", "mode", "value"),
    torch.constant_pad_nd: ("input", "pad", "value"),
}


def folded(conv: Conv, effects: Effects) -> Conv:
    """A convolution with the zero padding before it and the construction of its weight taken in.

    What goes wrong in here costs this convolution the recognition and nothing else: one warning, and it is as written.
    """
    try:
        wider = _padded(conv, effects)
        return _made(wider, effects) if conv.kind == "conv" else wider
    except Exception as error:  # noqa: BLE001 - the user's own operations are run to see what they make
        failure = f"looking into what it is made from failed: {type(error).__name__}: {error}"
        warnings.warn(f"adaptconv takes {conv.node} as it is written: {failure}", RuntimeWarning, stacklevel=2)
        return replace(conv, note=failure)


def _padded(conv: Conv, effects: Effects) -> Conv:
    while (extra := _zeros_around(conv, effects)) is not None:
        pad = conv.x
        padding = tuple((a + c, b + d) for (a, b), (c, d) in zip(conv.padding, extra, strict=True))
        operands = (named(pad, _PADS[pad.target])["input"], *conv.operands[1:])
        conv = replace(conv, operands=operands, padding=padding, inner=(*conv.inner, pad))
    return conv


def _zeros_around(conv: Conv, effects: Effects) -> Padding | None:
    """The zeros that the node before a convolution puts around its input, if that is all it does."""
    node = conv.x
    if node.op != "call_function" or node.target not in _PADS:
        return None
    a = named(node, _PADS[node.target])
    pads, mode, fill = a.get("pad"), a.get("mode", "constant"), a.get("value")
    if mode != "constant" or isinstance(fill, fx.Node) or fill not in (None, 0) or not isinstance(pads, tuple | list):
        return None
    if any(not isinstance(p, int) or p < 0 for p in pads) or any(pads[2 * conv.axes :]) or len(pads) % 2:
        return None
    before, after = value(a["input"]), value(node)
    mine, copy = storages(a["input"]), storages(node)
    if before.dim() != conv.axes + 2 or mine is None or copy is None:
        return None
    if effects.changed(mine | copy, node, conv.node) or effects.changed_later(mine, conv.node):
        return None
    weight = value(conv.weight)
    if conv.kind != "unfold" and layout_of(stand_in(before), weight) != layout_of(stand_in(after), weight):
        return None  # the answer's strides follow the input's
    pairs = [(pads[i], pads[i + 1]) for i in range(0, min(len(pads), 2 * conv.axes), 2)]
    pairs += [(0, 0)] * (conv.axes - len(pairs))
    return tuple(reversed(pairs))


def _made(conv: Conv, effects: Effects) -> Conv:
    cutting = cut(conv.weight, conv.node, effects)
    if isinstance(cutting, Uncut):
        return replace(conv, note=cutting.reason)
    made = probe(cutting)
    if made is None:
        return conv
    grid = conv.taps.single_grid()
    assert grid is not None, "a convolution of torch's is one grid"
    return replace(conv, taps=_dilated(made.taps, grid.dilation), made=made, stated=conv.taps)


def _dilated(taps: TapPattern, dilation: Sequence[int]) -> TapPattern:
    """A pattern with its positions so many steps apart."""
    offsets = tuple(tuple(i * d for i, d in zip(offset, dilation, strict=True)) for offset in taps.offsets)
    window = tuple((w - 1) * d + 1 for w, d in zip(taps.core.window, dilation, strict=True))
    apart = TapPattern(offsets, window, density=taps.density)
    if taps.footprint is None:
        return apart
    return apart.spread_by([_with_holes(values, d) for values, d in zip(taps.footprint, dilation, strict=True)])


def _with_holes(values: Sequence[float], step: int) -> list[float]:
    spaced = [0.0] * ((len(values) - 1) * step + 1)
    spaced[::step] = values
    return spaced
