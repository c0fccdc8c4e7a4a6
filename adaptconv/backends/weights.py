"""Compact weights ``[C_out, C_in/groups, T]`` rearranged for a backend, and constants kept between calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends.kept import kept
from adaptconv.kernel import spreading_values
from adaptconv.taps import TapPattern

_NO_DISPATCH_MODE = torch._C._len_torch_dispatch_stack


def adjoint_weight(w: Tensor, groups: int) -> Tensor:
    """The compact weight of the adjoint: channels exchanged within each group, taps reversed.

    ``[C_out, C_in/g, T]`` -> ``[C_in, C_out/g, T]``. Offsets are sorted, so mirroring every axis of the
    window reverses the order of the taps.
    """
    outs, ins, taps = w.shape
    w = w.reshape(groups, outs // groups, ins, taps).transpose(1, 2)
    return w.reshape(groups * ins, outs // groups, taps).flip(2)


def spread_weight(w: Tensor, taps: TapPattern) -> tuple[Tensor, TapPattern]:
    """A compact weight on spread taps written out on their plain ones: ``[O, I, T] -> [O, I, T_plain]``."""
    if taps.footprint is None:
        return w, taps
    return w @ _spreading(taps, w.dtype, w.device), taps.spread()[0]


def gathered_gradient(dw: Tensor, taps: TapPattern) -> Tensor:
    """The adjoint of ``spread_weight``: ``[O, I, T_plain] -> [O, I, T]``."""
    if taps.footprint is None:
        return dw
    return dw @ _spreading(taps, dw.dtype, dw.device).t()


def _spreading(taps: TapPattern, dtype: torch.dtype, device: torch.device) -> Tensor:
    return real_constant(spreading_values(taps), dtype, device).reshape(len(taps), len(taps.spread()[0]))


def picked(w: Tensor, indices: Sequence[int]) -> Tensor:
    """Columns of a compact weight by tap index, -1 giving a column of zeros: ``[O, I, len(indices)]``."""
    taps = w.shape[2]
    if any(i < 0 for i in indices):
        w = F.pad(w, (0, 1))
    return w.index_select(2, constant(tuple(i if i >= 0 else taps for i in indices), w.device))


def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 tensor of known values, kept between eager calls.

    Made afresh under a tracing mode, whose tensors must not outlive it.
    """
    if torch.compiler.is_compiling() or _NO_DISPATCH_MODE():  # asked in this order: dynamo cannot trace the second
        return torch.tensor(values, dtype=torch.long, device=device)
    return _constant(values, device)


def real_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of known real values, kept between eager calls."""
    if torch.compiler.is_compiling() or _NO_DISPATCH_MODE():
        return torch.tensor(values, dtype=dtype, device=device)
    return _real_constant(values, dtype, device)


@kept(1024)
def _real_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


@kept(1024)
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.long, device=device)
