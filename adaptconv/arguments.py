"""What a convolution's arguments may be: read in any of torch's spellings, refused in words.

The wordings hold torch's own where torch has one, so that code which matches on them keeps working.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.problem import Padding, same_padding
from adaptconv.taps import TapPattern

Ints = int | Sequence[int]
SUPPORTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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


def is_int(value: object) -> bool:
    """Whether torch would take a value for an int: NumPy's integers and 0-dim integer tensors too, booleans not."""
    if isinstance(value, (int, torch.SymInt)):
        return not isinstance(value, bool)
    if isinstance(value, Tensor):
        return value.dim() == 0 and not (value.is_floating_point() or value.is_complex() or value.dtype is torch.bool)
    return hasattr(value, "__index__")


def as_int(value: int) -> int:
    """A Python int for what ``is_int`` accepts; symbolic ints stay symbolic."""
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def checked_groups(axes: int, groups: int) -> int:
    """A positive number of channel groups."""
    if not is_int(groups):
        raise ConvTypeError(f"conv{axes}d: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ConvArgumentError(f"conv{axes}d: non-positive groups is not supported: got groups={groups!r}")
    return as_int(groups)


def checked_ints(axes: int, value: Ints, name: str, least: int) -> tuple[int, ...]:
    """An int or a sequence of one or ``axes`` ints, as a tuple of ``axes``."""
    given = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(given) == 1:
        given *= axes
    if not all(is_int(v) for v in given):
        raise ConvTypeError(f"conv{axes}d: {name} must be an int or {axes} ints, got {value!r}")
    if len(given) != axes:
        raise ConvArgumentError(f"conv{axes}d: {name} must be an int or {axes} ints, got {value!r}")
    values = tuple(as_int(v) for v in given)
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
                f"conv{axes}d: padding='same' is not supported for strided convolutions, got stride={stride}; give ints"
            )
        return same_padding(window)
    if isinstance(padding, (tuple, list)) and any(isinstance(p, (tuple, list)) for p in padding):
        pairs = tuple(tuple(p) if isinstance(p, (tuple, list)) else (p, p) for p in padding)
        if not all(is_int(p) for pair in pairs for p in pair):
            raise ConvTypeError(f"conv{axes}d: padding in pairs is {axes} pairs of ints, got {padding!r}")
        if len(pairs) != axes or any(len(p) != 2 or min(p) < 0 for p in pairs):
            raise ConvArgumentError(
                f"conv{axes}d: padding in pairs is ((before, after), ...), {axes} pairs of ints >= 0, got {padding!r}"
            )
        return tuple((as_int(before), as_int(after)) for before, after in pairs)
    return tuple((p, p) for p in checked_ints(axes, padding, "padding", least=0))


def check_operands(axes: int, x: Tensor, w: Tensor, b: Tensor | None, groups: int, taps: TapPattern) -> None:
    """Dimensions, dtypes, devices and channels that fit each other.

    Raises:
        ConvArgumentError: they do not; the message says what came and what was expected.
        ConvTypeError: the bias is no tensor, or the number of groups no int.
    """
    name = f"conv{axes}d"
    if b is not None and not isinstance(b, Tensor):
        raise ConvTypeError(f"{name}: bias must be a tensor or None, got {type(b).__name__}")
    if x.dim() not in (axes + 1, axes + 2):
        raise ConvArgumentError(
            f"{name}: Expected {axes + 2}-dimensional input for {axes + 2}-dimensional weight, or "
            f"{axes + 1}-dimensional if unbatched; got shape {tuple(x.shape)}"
        )
    if taps.axes != axes:
        raise ConvArgumentError(f"{name}: needs taps with {axes} axes, got a pattern with window {taps.window}")
    if w.dtype is not x.dtype or (b is not None and b.dtype is not x.dtype):
        raise dtype_mismatch(axes, x, w, b)
    if x.dtype not in SUPPORTED:
        served = ", ".join(_name(dtype) for dtype in SUPPORTED)
        raise ConvArgumentError(f"{name}: tap patterns and pinned backends take {served}; got {_name(x.dtype)}")
    operands = [(label, t) for label, t in (("input", x), ("weight", w), ("bias", b)) if t is not None]
    if len({t.device for _, t in operands}) > 1:
        places = ", ".join(f"{label} on {t.device}" for label, t in operands)
        raise ConvArgumentError(f"{name}: input, weight and bias must be on one device, got {places}")
    checked_groups(axes, groups)
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
        raise bias_mismatch(axes, w, b)


def check_extents(axes: int, x: Tensor, taps: TapPattern, pads: Padding) -> None:
    """A padded input of at least one window, and something to pad.

    Raises:
        ConvArgumentError: it is smaller, or an axis is empty.
    """
    if 0 in x.shape[2:]:
        raise ConvArgumentError(f"conv{axes}d: no axis of the input may be empty, padded or not; got {tuple(x.shape)}")
    for extent, window, (before, after) in zip(x.shape[2:], taps.window, pads, strict=True):
        if extent + before + after < window:
            raise ConvArgumentError(
                f"conv{axes}d: the padded input is smaller than the kernel's window: input {tuple(x.shape[2:])} with "
                f"padding {pads} against window {taps.window}; pad more or use fewer or closer taps"
            )


def dtype_mismatch(axes: int, x: Tensor, w: Tensor, b: Tensor | None) -> ConvArgumentError:
    """The error for operands of different dtypes."""
    operands = (("input", x), ("weight", w), ("bias", b))
    kinds = ", ".join(f"{label} {_name(t.dtype)}" for label, t in operands if t is not None)
    return ConvArgumentError(f"conv{axes}d: dtypes of input, weight and bias should be the same; got {kinds}")


def bias_mismatch(axes: int, w: Tensor, b: Tensor) -> ConvArgumentError:
    """The error for a bias that is not one value an output channel."""
    return ConvArgumentError(
        f"conv{axes}d: bias must have shape [{w.shape[0]}], one value an output channel; got {tuple(b.shape)}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
