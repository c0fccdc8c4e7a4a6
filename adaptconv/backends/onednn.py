"""oneDNN for the small volumes that torch keeps from it, and which those are.

Torch's own loops take a single small float32 image ("for some case, native is faster", says ``use_mkldnn`` in
aten/src/ATen/native/Convolution.cpp, where the numbers below are from). In two dimensions that is right; in three its
loops unfold the volume, zeros of the padding included, and oneDNN is two to four times as fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptconv.backends.base import transformed
from adaptconv.problem import Problem

_VALUES = 20480  # in the channels, planes and rows of a single image
_TAPS = 3  # along the narrower of the last two axes


def keeps_volume(problem: Problem, *, padded: bool = False) -> bool:
    """Whether torch computes a volume by its own loops on a CPU; ``padded``: the zeros are already in the input."""
    grid = problem.taps.single_grid()
    if grid is None or problem.axes != 3 or problem.batch > 1 or problem.groups > 1 or problem.dtype != "float32":
        return False
    zeros = [sum(pair) if padded else 0 for pair in problem.padding]
    counted = problem.c_in * math.prod(e + z for e, z in zip(problem.spatial[:2], zeros[:2], strict=True))
    return problem.device.kind == "cpu" and min(grid.size[1:]) <= _TAPS and counted <= _VALUES


def is_offered(problem: Problem) -> bool:
    """Whether oneDNN can be asked for what torch keeps from it."""
    return keeps_volume(problem) and torch.backends.mkldnn.is_available()


def conv3d(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """``torch.conv3d`` by oneDNN; torch's own where an op of ours is not wanted, or the user wants no oneDNN."""
    asked = torch._C._get_mkldnn_enabled()
    if transformed() or torch.compiler.is_exporting() or not asked:
        return torch.conv3d(x, w, bias, stride, padding, dilation, groups)
    result: Tensor = torch.ops.adaptconv.onednn(x, w, bias, padding, stride, dilation)
    return result


_LIBRARY = torch.library.Library("adaptconv", "FRAGMENT")
_LIBRARY.define(
    "onednn(Tensor x, Tensor w, Tensor? bias, int[] padding, int[] stride, int[] dilation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _onednn(
    x: Tensor, w: Tensor, bias: Tensor | None, padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    y = torch.mkldnn_convolution(x, w, bias, padding, stride, dilation, 1)
    return y.contiguous(memory_format=_format(x))


def _onednn_fake(
    x: Tensor, w: Tensor, bias: Tensor | None, padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    extents = [
        (extent + 2 * zeros - step * (size - 1) - 1) // pace + 1
        for extent, zeros, step, size, pace in zip(x.shape[2:], padding, dilation, w.shape[2:], stride, strict=True)
    ]
    return x.new_empty((x.shape[0], w.shape[0], *extents)).contiguous(memory_format=_format(x))


def _format(x: Tensor) -> torch.memory_format:
    turned = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if turned else torch.contiguous_format


_LIBRARY.impl("onednn", _onednn, "CPU")
torch.library.register_fake("adaptconv::onednn", _onednn_fake, lib=_LIBRARY)
