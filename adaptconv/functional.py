"""conv1d, conv2d, conv3d: torch.nn.functional's signatures, dispatched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaptconv import ops, records
from adaptconv.dispatch import current_pin
from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.kernel import Kernel
from adaptconv.ops import Plans
from adaptconv.problem import Padding, same_padding
from adaptconv.taps import TapPattern

Ints = int | Sequence[int]
SUPPORTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_MEMO_LIMIT = 65_536

_autocast = torch._C._is_any_autocast_enabled
_grad = torch.is_grad_enabled
_threads = torch.get_num_threads
_deterministic = torch.are_deterministic_algorithms_enabled
_precision = torch.get_float32_matmul_precision


@dataclass(frozen=True, slots=True)
class Call:
    """One prepared call: what a shape, layout, dtype and geometry came to.

    Attributes:
        run: ``(input, weight, bias) -> output`` on tensors of exactly the prepared kind.
        plans: the plans behind it; None where torch answers alone (a dtype adaptconv does not serve).
    """

    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    plans: Plans | None


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
        kernel = weight.spread()
        weight, taps = kernel.weight, kernel.taps
    if torch.compiler.is_dynamo_compiling():
        return traced(axes, input, weight, bias, stride, padding, dilation, groups, taps)
    if _autocast() and isinstance(input, Tensor):
        input, weight, bias = ops.autocasted(input, weight, bias)
    return prepared(axes, input, weight, bias, stride, padding, dilation, groups, taps).run(input, weight, bias)


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
) -> Call:
    """The prepared call for these operands, already autocast: one dictionary look-up when warm."""
    try:
        grad = _grad()
        key = (
            axes, input.shape, input.stride(), input.dtype, input.device, weight.shape, weight.stride(), bias is None,
            stride, padding, dilation, groups, taps, grad and input.requires_grad, grad and weight.requires_grad,
            current_pin(), records.epoch(), _threads(), _precision(), _deterministic(),
        )  # fmt: skip
        call = _CALLS.get(key)
    except (TypeError, AttributeError):
        return _unkeyed(axes, input, weight, bias, stride, padding, dilation, groups, taps)
    if call is None:
        call = _prepare(axes, input, weight, bias, stride, padding, dilation, groups, taps)
        if len(_CALLS) >= _MEMO_LIMIT:
            _CALLS.clear()
        _CALLS[key] = call
    return call


def _unkeyed(
    axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints | str,
    dilation: Ints, groups: int, taps: TapPattern | None,
) -> Call:  # fmt: skip
    """What could not be looked up as it came: lists for tuples, symbolic shapes, things that are no tensors."""
    for name, value in (("input", input), ("weight", weight)):
        if not isinstance(value, Tensor):
            raise ConvTypeError(f"conv{axes}d: {name} must be a tensor, got {type(value).__name__}")
    geometry = _hashable(stride), _hashable(padding), _hashable(dilation)
    if geometry != (stride, padding, dilation):
        return prepared(axes, input, weight, bias, *geometry, groups, taps)
    return _prepare(axes, input, weight, bias, stride, padding, dilation, groups, taps)


def _hashable(value: Ints | str) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    return value


def _prepare(
    axes: int, input: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints | str,
    dilation: Ints, groups: int, taps: TapPattern | None,
) -> Call:  # fmt: skip
    torch_conv = _CONV[axes]
    own_pattern = taps is not None
    if taps is None:
        if (input.dtype not in SUPPORTED and current_pin() is None) or 0 in (*weight.shape, *input.shape[1:]):
            # Integers, complex numbers and empty channels: torch serves them or says why not.
            return Call(lambda x, w, b: torch_conv(x, w, b, stride, padding, dilation, groups), None)
        taps = TapPattern.grid(*checked_grid(axes, weight, dilation))
    elif dilation not in (1, (1,) * axes):
        raise ConvArgumentError(
            f"conv{axes}d: dilation {dilation} was given with a tap pattern, which already says where its taps sit; "
            f"leave dilation at 1, or build the pattern with TapPattern.grid(size, dilation)"
        )
    strides = checked_ints(axes, stride, "stride", least=1)
    pads = checked_padding(axes, padding, taps.window, strides)
    _check_operands(axes, input, weight, bias, groups, taps)
    batched = input if input.dim() == axes + 2 else input.unsqueeze(0)
    _check_extents(axes, batched, taps, pads)
    if any(not isinstance(extent, int) for extent in batched.shape):
        return Call(_symbolic_call(axes, taps, strides, pads, groups), None)
    problem = ops.forward_problem(
        batched, weight, taps, strides, pads, groups, bias is not None, ops.layout_of(batched, weight)
    )
    grad = _grad()
    plans = ops.plan_all(problem, grad and input.requires_grad, grad and weight.requires_grad)
    if plans.plain and not own_pattern and _torch_takes(padding):
        return Call(lambda x, w, b: torch_conv(x, w, b, stride, padding, dilation, groups), plans)
    return Call(_planned_call(axes, plans), plans)


def _torch_takes(padding: Ints | str) -> bool:
    return isinstance(padding, (int, str)) or all(isinstance(p, int) for p in padding)


def _planned_call(axes: int, plans: Plans) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Run prepared plans; operands whose kind is not in the look-up key are checked here."""
    convolve = ops.executor(plans)

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        if w.dtype is not x.dtype or (b is not None and b.dtype is not x.dtype):
            raise _dtype_mismatch(axes, x, w, b)
        if b is not None and b.shape != w.shape[:1]:
            raise _bias_mismatch(axes, w, b)
        compact = w if w.dim() == 3 else w.flatten(2)
        if x.dim() == axes + 2:
            return convolve(x, compact, b)
        return convolve(x.unsqueeze(0), compact, b).squeeze(0)

    return run


def _symbolic_call(
    axes: int, taps: TapPattern, stride: tuple[int, ...], pads: Padding, groups: int
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Extents unknown while tracing: the op that plans at run time."""

    def run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return _op(axes, x, w, b, str(taps), stride, pads, groups)

    return run


# ---- under torch.compile ------------------------------------------------------------------------


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
    return _op(axes, input, weight, bias, text, strides, pads, groups)


def _op(
    axes: int, x: Tensor, w: Tensor, b: Tensor | None, taps: str, stride: Sequence[int], pads: Padding, groups: int
) -> Tensor:
    compact = w if w.dim() == 3 else w.flatten(2)
    flat = [zeros for pair in pads for zeros in pair]
    batched = x if x.dim() == axes + 2 else x.unsqueeze(0)
    y: Tensor = torch.ops.adaptconv.conv(batched, compact, b, taps, list(stride), flat, groups, ops.auto_plan())
    return y if x.dim() == axes + 2 else y.squeeze(0)


# ---- checks -------------------------------------------------------------------------------------


def checked_grid(axes: int, weight: Tensor, dilation: Ints) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and dilation of a torch weight ``[C_out, C_in/groups, *size]``."""
    if weight.dim() != axes + 2:
        raise ConvArgumentError(
            f"conv{axes}d: weight should have at least three dimensions, exactly {axes + 2} here: "
            f"[C_out, C_in/groups, {', '.join('DHW'[-axes:] if axes > 1 else 'K')}]; got shape {tuple(weight.shape)}"
        )
    size = tuple(weight.shape[2:])
    if any(extent < 1 for extent in size):
        raise ConvArgumentError(f"conv{axes}d: kernel size must be at least 1 on every axis, got {size}")
    return size, checked_ints(axes, dilation, "dilation", least=1)


def checked_ints(axes: int, value: Ints, name: str, least: int) -> tuple[int, ...]:
    """An int or a sequence of one or ``axes`` ints, as a tuple of ``axes``."""
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= axes
    if len(values) != axes or any(isinstance(v, bool) or not isinstance(v, (int, torch.SymInt)) for v in values):
        raise ConvArgumentError(f"conv{axes}d: {name} must be an int or {axes} ints, got {value!r}")
    if any(v < least for v in values):
        torch_says = {
            "stride": "non-positive stride is not supported",
            "padding": "negative padding is not supported",
            "dilation": "dilation should be greater than zero",
        }[name]
        raise ConvArgumentError(f"conv{axes}d: {torch_says}: got {name}={value!r}, expected at least {least}")
    return values


def checked_padding(
    axes: int, padding: Ints | str, window: tuple[int, ...], stride: tuple[int, ...]
) -> Padding:  # fmt: skip
    """Padding in any of its spellings as (before, after) an axis."""
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * axes
        if padding != "same":
            raise ConvArgumentError(f"conv{axes}d: padding must be ints, 'same' or 'valid', got {padding!r}")
        if any(step != 1 for step in stride):
            raise ConvArgumentError(
                f"conv{axes}d: padding='same' is not supported for strided convolutions (stride {stride}); give ints"
            )
        return same_padding(window)
    if not isinstance(padding, int) and any(isinstance(p, (tuple, list)) for p in padding):
        pairs = tuple(tuple(p) if isinstance(p, (tuple, list)) else (p, p) for p in padding)
        if len(pairs) != axes or any(len(p) != 2 or min(p) < 0 for p in pairs):
            raise ConvArgumentError(
                f"conv{axes}d: padding in pairs is ((before, after), ...) with {axes} pairs of ints >= 0, got {padding!r}"
            )
        return pairs
    return tuple((p, p) for p in checked_ints(axes, padding, "padding", least=0))


def _check_operands(
    axes: int, x: Tensor, w: Tensor, b: Tensor | None, groups: int, taps: TapPattern
) -> None:
    name = f"conv{axes}d"
    if x.dim() not in (axes + 1, axes + 2):
        raise ConvArgumentError(
            f"{name}: Expected {axes + 2}-dimensional input for {axes + 2}-dimensional weight, or "
            f"{axes + 1}-dimensional if unbatched; got shape {tuple(x.shape)}"
        )
    if taps.axes != axes:
        raise ConvArgumentError(f"{name}: needs taps with {axes} axes, got a pattern with window {taps.window}")
    if w.dtype is not x.dtype or (b is not None and b.dtype is not x.dtype):
        raise _dtype_mismatch(axes, x, w, b)
    if x.dtype not in SUPPORTED:
        raise ConvArgumentError(
            f"{name}: tap patterns and pinned backends take {', '.join(str(d).removeprefix('torch.') for d in SUPPORTED)}; "
            f"got {str(x.dtype).removeprefix('torch.')}"
        )
    devices = {t.device for t in (x, w, b) if t is not None}
    if len(devices) > 1:
        raise ConvArgumentError(
            f"{name}: input, weight and bias must be on one device, got "
            + ", ".join(f"{label} on {t.device}" for label, t in (("input", x), ("weight", w), ("bias", b)) if t is not None)
        )
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ConvArgumentError(f"{name}: non-positive groups is not supported: got groups={groups!r}")
    if w.dim() == 3 and w.shape[2] != len(taps):
        raise ConvArgumentError(
            f"{name}: a compact weight is [C_out, C_in/groups, T] with T = {len(taps)} taps, got {tuple(w.shape)}"
        )
    c_out, c_in = w.shape[0], x.shape[-axes - 1]
    if c_out < groups or c_out % groups:
        raise ConvArgumentError(
            f"{name}: expected weight to be at least {groups} at dimension 0 and divisible by groups={groups}, "
            f"got weight {tuple(w.shape)}"
        )
    if c_in != w.shape[1] * groups:
        raise ConvArgumentError(
            f"{name}: groups={groups} and weight {tuple(w.shape)} expect an input with {w.shape[1] * groups} channels, "
            f"got {c_in} in shape {tuple(x.shape)}"
        )
    if b is not None and b.shape != w.shape[:1]:
        raise _bias_mismatch(axes, w, b)


def _check_extents(axes: int, x: Tensor, taps: TapPattern, pads: Padding) -> None:
    for extent, window, (before, after) in zip(x.shape[2:], taps.window, pads, strict=True):
        if extent + before + after < window:
            raise ConvArgumentError(
                f"conv{axes}d: the padded input is smaller than the kernel's window: input {tuple(x.shape[2:])} with "
                f"padding {pads} against window {taps.window}; pad more or use fewer or closer taps"
            )


def _dtype_mismatch(axes: int, x: Tensor, w: Tensor, b: Tensor | None) -> ConvArgumentError:
    kinds = ", ".join(
        f"{label} {str(t.dtype).removeprefix('torch.')}"
        for label, t in (("input", x), ("weight", w), ("bias", b))
        if t is not None
    )
    return ConvArgumentError(f"conv{axes}d: dtypes of input, weight and bias should be the same; got {kinds}")


def _bias_mismatch(axes: int, w: Tensor, b: Tensor) -> ConvArgumentError:
    return ConvArgumentError(f"conv{axes}d: bias must have shape [{w.shape[0]}], one value an output channel; got {tuple(b.shape)}")
