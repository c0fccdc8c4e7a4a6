"""Compact weights ``[C_out, C_in/groups, T]`` rearranged for a backend, and constants kept between calls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends.kept import kept
from adaptconv.kernel import spreading_values
from adaptconv.taps import TapPattern

_SMALL = 1 << 13  # elements below which all ways take microseconds
_FEW_RUNS = 4
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
    """Columns of a compact weight by tap index, -1 giving a column of zeros: ``[O, I, len(indices)]``.

    On a CPU torch selects along the last of three axes in 3 to 20 ns an element, and a kernel written out could cost
    more than its convolution. Eager calls there take the loops of torch's that are fast: over two axes in float32, and
    writing to places.
    """
    indices = tuple(indices)
    rows = w.shape[:2]
    if not w.is_cpu or rows.numel() * len(indices) < _SMALL or _is_traced():
        return _selected(w, indices)
    single = w.dtype is torch.float32
    runs, taken, places = _layout(indices)
    if taken and len(runs) <= (1 if single else _FEW_RUNS):
        return torch.cat([w.new_zeros(*rows, n) if at < 0 else w[:, :, at : at + n] for at, n in runs], 2)
    if single:
        return _selected(w.flatten(0, 1), indices).reshape(*rows, -1)
    if not len(taken) <= w.shape[2] < len(indices):
        return _selected(w, indices)
    used = w if taken == tuple(range(w.shape[2])) else _selected(w, taken)
    return w.new_zeros(*rows, len(indices)).index_copy(2, constant(places, w.device), used)


def _selected(w: Tensor, indices: tuple[int, ...]) -> Tensor:
    """Columns along the last axis, by one ``index_select``."""
    taps = w.shape[-1]
    if any(i < 0 for i in indices):
        w = F.pad(w, (0, 1))
    return w.index_select(w.dim() - 1, constant(tuple(i if i >= 0 else taps for i in indices), w.device))


@lru_cache(maxsize=1024)
def _layout(indices: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]:
    """The first of each run of consecutive indices, or -1 for one of zeros, and its length; the indices that are no
    zeros, and their places.
    """
    runs: list[tuple[int, int]] = []
    for i in indices:
        at, n = runs[-1] if runs else (-2, 0)
        if n and i == (at if at < 0 else at + n):
            runs[-1] = at, n + 1
        else:
            runs.append((i, 1))
    places = tuple(at for at, i in enumerate(indices) if i >= 0)
    return tuple(runs), tuple(indices[at] for at in places), places


def _is_traced() -> bool:
    """Whether what is computed here may outlive this call in a graph; asked in this order: dynamo cannot trace the
    second.
    """
    return torch.compiler.is_compiling() or bool(_NO_DISPATCH_MODE())


def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 tensor of known values, kept between eager calls.

    Made afresh under a tracing mode, whose tensors must not outlive it.
    """
    if _is_traced():
        return torch.tensor(values, dtype=torch.long, device=device)
    return _constant(values, device)


def real_constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of known real values, kept between eager calls."""
    if _is_traced():
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
