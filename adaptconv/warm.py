"""A layer's last call, and what has to be as it was for it to be so again.

Amid a network's own work the processor's caches have forgotten Python's tables: looking a call up among all prepared
ones then takes ten to fifty microseconds, comparing these fields four. How precise float32 must be is among them only
where the plan is not torch's own function, which heeds those flags by itself: they are the costliest to ask for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaptconv.functional import Call
from adaptconv.pins import current_pin as _pin
from adaptconv.precision import float32_flags
from adaptconv.records import epoch as _epoch

_NAME = "_warm"  # in a layer's __dict__
_any_autocast = torch._C._is_any_autocast_enabled
_autocast = torch.is_autocast_enabled
_narrowed_to = torch.get_autocast_dtype
_tracing = torch._C._get_tracing_state  # of torch.jit
_grad = torch.is_grad_enabled
_threads = torch.get_num_threads
_deterministic = torch.are_deterministic_algorithms_enabled


def again(layer: dict[str, Any], input: Any, weight: Tensor, bias: Tensor | None) -> Call | None:
    """The call remembered in a layer's ``__dict__``, if these operands are of its kind and nothing changed."""
    known = layer.get(_NAME)
    if known is None or type(input) is not Tensor or _tracing() is not None:
        return None
    (
        call, shape, strides, dtype, device, kind, weight_shape, weight_strides, stride, padding, mode, dilation,
        groups, of_input, of_weight, pin, epoch, threads, deterministic, narrowed, kinds, flags,
    ) = known  # fmt: skip
    grad = _grad()
    same = (
        input.shape == shape
        and input.dtype is dtype
        and (grad and input.requires_grad) is of_input
        and (grad and weight.requires_grad) is of_weight
        and _pin() is pin
        and _epoch() == epoch
        and input.stride() == strides
        and input.device == device
        and weight.shape == weight_shape
        and weight.stride() == weight_strides
        and layer["stride"] is stride
        and layer["padding"] is padding
        and layer["padding_mode"] is mode
        and layer["dilation"] is dilation
        and layer["groups"] is groups
        and _threads() == threads
        and _deterministic() is deterministic
        and (_narrowed_to(kind) if _any_autocast() and _autocast(kind) else None) is narrowed
        and kinds == (type(weight), type(bias))
        and (flags is None or float32_flags() == flags)
    )
    return call if same else None


def remember(
    layer: dict[str, Any], call: Call, input: Tensor, weight: Tensor, bias: Tensor | None,
    narrowed: torch.dtype | None,
) -> None:  # fmt: skip
    """Remember a call that came twice in a row; where shapes change by turns there is none.

    Nor where the geometry is in lists, which may be written to, nor of tensors that are planned part by part.
    """
    fixed = not any(isinstance(layer[name], list) for name in ("stride", "padding", "dilation"))
    planned = call.torchs or call.plans is not None
    if planned and layer.get("_last_call") is call and type(input) is Tensor and fixed:
        grad = _grad()
        layer[_NAME] = (
            call, input.shape, input.stride(), input.dtype, input.device, input.device.type, weight.shape,
            weight.stride(), layer["stride"], layer["padding"], layer["padding_mode"], layer["dilation"],
            layer["groups"], grad and input.requires_grad, grad and weight.requires_grad, _pin(), _epoch(), _threads(),
            _deterministic(), narrowed, (type(weight), type(bias)), None if call.torchs else float32_flags(),
        )  # fmt: skip
