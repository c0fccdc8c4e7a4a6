"""Tensors that torch's backward wants for their shape and memory format alone, without the memory.

``aten.convolution_backward`` takes the input even for the gradient of the input: it reads its shape and chooses a
kernel by its format. A stride-0 view has no format, and is copied whole; an uninitialised tensor costs an allocation,
some 80 us for ten megabytes. On a CPU one range of addresses that no memory is ever behind serves all.
"""

from __future__ import annotations

import math
import mmap
import threading

import torch
from torch import Tensor

from adaptconv.backends.base import transformed

_LEAST = 1 << 28  # bytes of addresses; doubled as it takes
_LOCK = threading.Lock()
_range: Tensor | None = None
_under_mode = torch._C._len_torch_dispatch_stack


def is_ordinary(like: Tensor) -> bool:
    """Whether an operand is a CPU tensor that is computed with now: nothing traces, nothing transforms."""
    return type(like) is Tensor and not _under_mode() and not transformed() and like.device.type == "cpu"


def stand_in(like: Tensor, shape: tuple[int, ...], memory_format: torch.memory_format) -> Tensor:
    """A tensor of a shape and memory format, of the dtype and on the device of ``like``; never read nor written.

    Args:
        like: an operand of the same call.
        shape: its extents.
        memory_format: contiguous, channels_last or channels_last_3d.
    """
    if transformed():  # formats cannot be asked for
        return like.new_empty(shape)
    if torch.compiler.is_compiling() or not is_ordinary(like):  # asked in this order: dynamo cannot trace the second
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)
    addresses = _addresses(math.prod(shape) * like.element_size())
    if addresses is None:
        return torch.empty(shape, dtype=like.dtype, memory_format=memory_format)
    last = memory_format is not torch.contiguous_format
    order = [0, *range(2, len(shape)), 1] if last else list(range(len(shape)))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return addresses.view(like.dtype).as_strided(shape, strides)


def _addresses(count: int) -> Tensor | None:
    """A range of at least so many bytes; None where the system gives none."""
    global _range
    found = _range
    if found is not None and found.numel() >= count:
        return found
    if not hasattr(mmap, "MAP_NORESERVE") and not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    with _LOCK:
        size = _LEAST
        while size < count:
            size *= 2
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            _range = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8)
        except (OSError, ValueError):
            return None
        return _range
