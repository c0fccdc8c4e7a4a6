"""Plain taps: a regular grid, or any fixed pattern; and ``dilate``, a dense kernel with holes written as zeros."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.errors import ConvArgumentError
from adaptconv.kernels.base import Family, Ints, Slot, per_axis
from adaptconv.taps import TapPattern


@dataclass(frozen=True)
class Grid(Family):
    """One regular grid: an ordinary or dilated kernel, ``y[p] = sum_t w[t] x[p + t * dilation]``.

    What ``AdaptiveConv2d(64, 64, 3, dilation=2)`` means; the layer is torch's in every respect.

    Args:
        size: taps along each axis.
        dilation: step between taps along each axis.
    """

    size: Ints
    dilation: Ints = 1

    identity = True

    def bound(self, axes: int) -> Grid:
        """Size and dilation an axis."""
        return Grid(per_axis(self.size, axes, "size"), per_axis(self.dilation, axes, "dilation"))

    @property
    def taps(self) -> TapPattern:
        """The grid."""
        return TapPattern.grid(self.size, self.dilation)

    def slots(self, c_out: int, c_in: int) -> tuple[Slot, ...]:
        """A weight of torch's shape."""
        assert isinstance(self.size, tuple)
        return (Slot("weight", (c_out, c_in, *self.size)),)

    def compact(self, *tensors: Tensor) -> Tensor:
        """The weight, flattened."""
        return tensors[0].flatten(2)


@dataclass(frozen=True)
class FixedTaps(Family):
    """Any fixed pattern of taps, one weight each: ``y[p] = sum_t w[t] x[p + offset_t]``.

    What ``taps=`` of a layer means, and what ``freeze()`` leaves.

    Args:
        taps: a ``TapPattern``, its text, or a mask.
    """

    pattern: TapPattern

    identity = True

    def __repr__(self) -> str:
        return f"FixedTaps({str(self.pattern)!r})"

    @staticmethod
    def of(taps: Any) -> FixedTaps:
        """From what users write: a ``TapPattern``, its text, or a mask (nested sequences, array, tensor)."""
        if isinstance(taps, str):
            return FixedTaps(TapPattern.parse(taps))
        return FixedTaps(taps if isinstance(taps, TapPattern) else TapPattern.from_mask(taps))

    def bound(self, axes: int) -> FixedTaps:
        """Itself, checked."""
        if self.pattern.axes != axes:
            raise ConvArgumentError(
                f"AdaptiveConv{axes}d needs taps with {axes} axes, got a window {self.pattern.window}"
            )
        if not len(self.pattern):
            raise ConvArgumentError("a layer needs at least one tap; this pattern has none")
        return self

    @property
    def taps(self) -> TapPattern:
        """The pattern."""
        return self.pattern

    def slots(self, c_out: int, c_in: int) -> tuple[Slot, ...]:
        """A compact weight."""
        return (Slot("weight", (c_out, c_in, len(self.pattern))),)

    def compact(self, *tensors: Tensor) -> Tensor:
        """The weight."""
        return tensors[0]


def dilate(weight: Tensor, dilation: int | Sequence[int], *, axes: int | None = None) -> Tensor:
    """Write a kernel with holes as a dense one: zeros between its values.

    Args:
        weight: ``[..., *size]``, any leading dimensions, 1 to 3 spatial axes last.
        dilation: step between values, an int or one an axis.
        axes: number of spatial axes; by default as many as dilations, or else ``weight.dim() - 2``,
            as in a torch weight ``[C_out, C_in/groups, *size]``.

    Returns:
        ``[..., *window]`` with ``window = size + (size - 1) * (dilation - 1)``: the weight itself where nothing is
        to be done, else a differentiable copy, contiguous in eager mode. Under ``torch.compile`` each axis is
        padded as a matrix whose first column is the kernel, read row by row, so that constant folding sees
        through it.

    Raises:
        ConvArgumentError: not 1 to 3 spatial axes, or a dilation below 1.
    """
    if axes is None:
        axes = len(dilation) if isinstance(dilation, (list, tuple)) else weight.dim() - 2
    if not 1 <= axes <= 3 or weight.dim() < axes:
        raise ConvArgumentError(
            f"dilate: a kernel has 1 to 3 spatial axes, got {axes} for a weight of shape {tuple(weight.shape)}; "
            f"say which with axes="
        )
    steps = per_axis(dilation, axes, "dilation")
    if all(step == 1 for step in steps):
        return weight
    lead, size = tuple(weight.shape[:-axes]), tuple(weight.shape[-axes:])
    window = tuple([max(0, (extent - 1) * step + 1) for extent, step in zip(size, steps, strict=True)])
    if not torch.compiler.is_compiling():
        if weight.requires_grad and torch.is_grad_enabled() and not weight.is_complex():
            # The gradient of this is a strided view, that of a write in place a copy of the whole window.
            full = weight
            for axis in (axis for axis in range(-1, -axes - 1, -1) if steps[axis] != 1):
                shape = (*full.shape[:axis], window[axis], *full.shape[full.dim() + axis + 1 :])
                full = torch.slice_scatter(weight.new_zeros(()).expand(shape), full, axis, step=steps[axis])
            return full
        full = weight.new_zeros(lead + window)
        places: list[Any] = [..., *[slice(None, None, step) for step in steps]]
        full[tuple(places)] = weight
        return full
    # Inductor's freezing folds a pad of a constant, and does not fold a write into zeros.
    split = weight.reshape(*lead, *reduce(operator.add, ((extent, 1) for extent in size)))
    pads = [zeros for step in reversed(steps) for zeros in (0, step - 1, 0, 0)]
    full = F.pad(split, pads).reshape(*lead, *(extent * step for extent, step in zip(size, steps, strict=True)))
    for axis, extent in enumerate(window):
        full = full.narrow(len(lead) + axis, 0, extent)
    return full
