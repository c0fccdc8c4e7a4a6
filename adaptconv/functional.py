"""conv1d, conv2d, conv3d: torch.nn.functional's signatures, dispatched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptconv import ops, records, sharding, tracing, trilinear
from adaptconv.arguments import (
    SUPPORTED,
    Ints,
    check_extents,
    check_operands,
    checked_grid,
    checked_groups,
    checked_ints,
    checked_padding,
)  # fmt: skip
from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.kernel import Kernel
from adaptconv.pins import current_pin
from adaptconv.precision import float32_flags
from adaptconv.problem import Padding
from adaptconv.taps import TapPattern
from adaptconv.trilinear import Plans

_CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_MEMO_LIMIT = 65_536

_autocast = torch._C._is_any_autocast_enabled
_grad = torch.is_grad_enabled
_threads = torch.get_num_threads
_deterministic = torch.are_deterministic_algorithms_enabled


@dataclass(frozen=True, slots=True)
class Call:
    """One prepared call: what a shape, layout, dtype and geometry came to.

    Attributes:
        run: ``(input, weight, bias) -> output`` on tensors of exactly the prepared kind.
        plans: the plans behind it; None where torch answers alone (a dtype adaptconv does not serve).
        torchs: whether ``run`` is torch's own function, which heeds autocast by itself.
    """

    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    plans: Plans | None
    torchs: bool = False


_CALLS: dict[object, Call] = {}


def conv1d(
    input: Tensor,
    weight: Tensor | Kernel,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """1-D convolution of ``input [N, C_in, L]`` or ``[C_in, L]``: ``torch.nn.functional.conv1d``, dispatched.

    Args:
        input: fp64, fp32, bf16 or fp16; any strides; an empty batch is fine.
        weight: ``[C_out, C_in/groups, K]``, or a ``Kernel`` (taps anywhere in a window).
        bias: ``[C_out]`` or None.
        stride: output step.
        padding: zeros on both sides, ``'same'``, ``'valid'``, or a (before, after) pair an axis.
        dilation: step between taps; must be 1 with a ``Kernel``, whose taps already say where they sit.
        groups: channel groups.

    Returns:
        What torch's convolution returns: same shape, dtype, memory format and device.

    Raises:
        ConvArgumentError: shapes or arguments that do not fit (it is a ``RuntimeError``, as in torch).
        BackendRejected: a pinned backend declines the problem.
    """
    return convolution(1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor | Kernel,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution of ``input [N, C_in, H, W]`` or ``[C_in, H, W]``; otherwise as ``conv1d``."""
    return convolution(2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor | Kernel,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Ints | str = 0,
    dilation: Ints = 1,
    groups: int = 1,
) -> Tensor:
    """3-D convolution of ``input [N, C_in, D, H, W]`` or ``[C_in, D, H, W]``; otherwise as ``conv1d``."""
    return convolution(3, input, weight, bias, stride, padding, dilation, groups)


def convolution(
    axes: int,
    input: Tensor,
    weight: Tensor | Kernel,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
) -> Tensor:
    """The dispatched convolution behind ``conv1d``, ``conv2d`` and ``conv3d``."""
    taps: TapPattern | None = None
    if isinstance(weight, Kernel):
        taps, weight = weight.taps, weight.weight
    if torch.compiler.is_dynamo_compiling():
        return tracing.traced(axes, input, weight, bias, stride, padding, dilation, groups, taps)
    narrowed = ops.autocast_dtype(input) if _autocast() else None
    call = prepared(axes, input, weight, bias, stride, padding, dilation, groups, taps, narrowed)
    return call.run(input, weight, bias)


def prepared(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints | str,
    dilation: Ints,
    groups: int,
    taps: TapPattern | None,
    narrowed: torch.dtype | None = None,
) -> Call:
    """The prepared call for these operands: one dictionary look-up when warm. It narrows them, if autocast says to."""
    try:
        grad = _grad()
        key = (
            axes, input.shape, input.stride(), input.dtype, input.device, weight.shape, weight.stride(), type(input),
            type(weight), type(bias), stride, padding, dilation, groups, taps, grad and input.requires_grad,
            grad and weight.requires_grad, current_pin(), records.epoch(), _threads(), float32_flags(),
            _deterministic(), narrowed,
        )  # fmt: skip
        call = _CALLS.get(key)
    except (TypeError, AttributeError):
        return _unkeyed(axes, input, weight, bias, stride, padding, dilation, groups, taps, narrowed)
    if call is None:
        call = _prepare(axes, input, weight, bias, stride, padding, dilation, groups, taps, narrowed)
        if _is_fixed((stride, padding, dilation, groups)):
            if len(_CALLS) >= _MEMO_LIMIT:
                _CALLS.clear()
            _CALLS[key] = call
    return call


def _unkeyed(
    axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints | str,
    dilation: Ints, groups: int, taps: TapPattern | None, narrowed: torch.dtype | None,
) -> Call:  # fmt: skip
    """What could not be looked up as it came: lists for tuples, symbolic shapes, things that are no tensors."""
    for name, value in (("input", input), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise ConvTypeError(f"conv{axes}d: {name} must be a tensor, got {type(value).__name__}")
    geometry = _hashable(stride), _hashable(padding), _hashable(dilation)
    if geometry != (stride, padding, dilation):
        return prepared(axes, input, weight, bias, *geometry, groups, taps, narrowed)
    return _prepare(axes, input, weight, bias, stride, padding, dilation, groups, taps, narrowed)


def _is_fixed(value: object) -> bool:
    """Whether a geometry stays what it is: a 0-dim tensor, which torch takes for an int, may be written to."""
    return all(map(_is_fixed, value)) if isinstance(value, tuple) else not isinstance(value, Tensor)


def _hashable(value: Ints | str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    return value


def _prepare(
    axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints | str,
    dilation: Ints, groups: int, taps: TapPattern | None, narrowed: torch.dtype | None,
) -> Call:  # fmt: skip
    if narrowed is None:
        return _planned(axes, input, weight, bias, stride, padding, dilation, groups, taps)
    made = _planned(axes, *ops.autocasted(input, weight, bias), stride, padding, dilation, groups, taps)
    if made.torchs:
        return made
    return Call(lambda x, w, b: made.run(*ops.autocasted(x, w, b)), made.plans)


def _planned(
    axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints | str,
    dilation: Ints, groups: int, taps: TapPattern | None,
) -> Call:  # fmt: skip
    if sharding.is_sharded(input, weight, bias):
        whole = checked_groups(axes, groups)

        def local(x: Tensor, w: Tensor, b: Tensor | None, own_groups: int) -> Tensor:  # each rank plans its own part
            return prepared(axes, x, w, b, stride, padding, dilation, own_groups, taps).run(x, w, b)

        return Call(lambda x, w, b: sharding.convolve(local, axes, x, w, b, whole), None)  # type: ignore[arg-type]
    torch_conv = _CONV[axes]
    own_pattern = taps is not None
    if taps is None:
        if (input.dtype not in SUPPORTED and current_pin() is None) or 0 in (*weight.shape, *input.shape[1:]):
            # Integers, complex numbers and empty channels: torch serves them or says why not.
            return Call(lambda x, w, b: torch_conv(x, w, b, stride, padding, dilation, groups), None, True)
        size, dilation = checked_grid(axes, weight, dilation)
        taps = TapPattern.grid(size, dilation)
    elif dilation not in (1, (1,) * axes):
        raise ConvArgumentError(
            f"conv{axes}d: dilation {dilation} was given with a tap pattern, which already says where its taps sit; "
            f"leave dilation at 1, or build the pattern with TapPattern.grid(size, dilation)"
        )
    strides = checked_ints(axes, stride, "stride", least=1)
    pads = checked_padding(axes, padding, taps.window, strides)
    groups = checked_groups(axes, groups)
    check_operands(axes, input, weight, bias, groups, taps)
    batched = input if input.dim() == axes + 2 else input.unsqueeze(0)
    check_extents(axes, batched, taps, pads)
    if any(not isinstance(extent, int) for extent in batched.shape):
        return Call(_symbolic_call(axes, taps, strides, pads, groups), None)
    problem = trilinear.forward_problem(
        batched, weight, taps, strides, pads, groups, bias is not None, trilinear.layout_of(batched, weight)
    )
    grad = _grad()
    plans = trilinear.plan_all(problem, grad and input.requires_grad, grad and weight.requires_grad)
    plans = trilinear.worth_leaving(plans)
    if plans.plain and not own_pattern:
        even = tuple(before for before, _ in pads)  # what is plain is padded evenly
        return Call(lambda x, w, b: torch_conv(x, w, b, strides, even, dilation, groups), plans, True)
    return Call(_planned_call(axes, plans, taps), plans)


def _planned_call(axes: int, plans: Plans, taps: TapPattern) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Run prepared plans; operands whose kind is not in the look-up key are checked here."""
    convolve = trilinear.executor(plans)
    groups = plans.forward.problem.groups

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        fits = w.dtype is x.dtype and w.device == x.device
        if not fits or (b is not None and not _bias_fits(x, w, b)):
            check_operands(axes, x, w, b, groups, taps)
        compact = w if w.dim() == 3 else w.flatten(2)
        if x.dim() == axes + 2:
            return convolve(x, compact, b)
        return convolve(x.unsqueeze(0), compact, b).squeeze(0)

    return run


def _bias_fits(x: Tensor, w: Tensor, b: object) -> bool:
    if not isinstance(b, Tensor):
        return False
    return b.dtype is x.dtype and b.shape == w.shape[:1] and b.device == x.device


def _symbolic_call(
    axes: int, taps: TapPattern, stride: tuple[int, ...], pads: Padding, groups: int
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Extents unknown while tracing: the op that plans at run time."""

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return tracing.op(axes, x, w, b, str(taps), stride, pads, groups)

    return run
