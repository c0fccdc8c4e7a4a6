"""What dynamo sees of a convolution: one logical op, its plan left to the compile pass or to run time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptconv import ops
from adaptconv.arguments import Ints, checked_grid, checked_ints, checked_padding
from adaptconv.problem import Padding
from adaptconv.taps import TapPattern


def traced(
    axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints | str,
    dilation: Ints, groups: int, taps: TapPattern | None,
) -> Tensor:  # fmt: skip
    """What dynamo sees: the logical op, its plan left to the compile pass or to run time.

    Plain arithmetic on ints and strings only: dynamo traces every line of it.
    """
    if taps is None:
        size, steps = checked_grid(axes, weight, dilation)
        window = tuple((s - 1) * d + 1 for s, d in zip(size, steps, strict=True))
        text = "x".join([str(s) for s in size]) + "d" + "x".join([str(d) for d in steps])
    else:
        window, text = taps.window, taps.text
    strides = checked_ints(axes, stride, "stride", least=1)
    pads = checked_padding(axes, padding, window, strides)
    return op(axes, input, weight, bias, text, strides, pads, groups)


def op(
    axes: int, x: Tensor, w: Tensor, b: Tensor | None, taps: str, stride: Sequence[int], pads: Padding, groups: int
) -> Tensor:
    """``adaptconv::conv`` of operands as a layer has them: ``w [O, I, *size]`` or compact, ``x`` batched or not."""
    compact = w if w.dim() == 3 else w.flatten(2)
    flat = [zeros for pair in pads for zeros in pair]
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    y: Tensor = torch.ops.adaptconv.conv(batched, compact, b, taps, list(stride), flat, groups, ops.auto_plan())
    return y if x.dim() == axes + 2 else y.squeeze(0)
