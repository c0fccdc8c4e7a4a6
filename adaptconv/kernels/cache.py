"""A constructed weight, kept while nothing it was made from has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Constructed:
    """A weight made without gradients, and what it was made from.

    A CPU tensor is compared by its values, microseconds against a construction's milliseconds, because writes
    through ``.data`` leave no trace in its version; elsewhere, where reading values would wait for the
    device, by identity and version.
    """

    weight: Tensor
    family: Any
    marks: tuple[Any, ...]

    @staticmethod
    def of(family: Any, tensors: Sequence[Tensor], weight: Tensor) -> Constructed | None:
        """Keep a weight; None where it is part of a gradient, or of a trace."""
        if weight.requires_grad or not _are_plain((weight, *tensors)):
            return None
        return Constructed(weight, family, tuple(map(_mark, tensors)))

    def still(self, family: Any, tensors: Sequence[Tensor]) -> bool:
        """Whether a construction from these tensors would give the same weight, and no gradient is asked for."""
        if family is not self.family or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
            return False
        return _are_plain(tensors) and all(_is_marked(t, mark) for t, mark in zip(tensors, self.marks, strict=True))


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Real tensors outside any transform, whose values are theirs alone."""
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta for t in tensors)


def _mark(tensor: Tensor) -> Any:
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    return None if tensor.is_inference() else (tensor, tensor._version, tensor.data_ptr())


def _is_marked(tensor: Tensor, mark: Any) -> bool:
    if isinstance(mark, Tensor):
        return mark.dtype is tensor.dtype and mark.device == tensor.device and torch.equal(mark, tensor)
    return mark is not None and mark[0] is tensor and mark[1] == tensor._version and mark[2] == tensor.data_ptr()
