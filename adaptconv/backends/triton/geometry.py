"""A problem on three axes, as every kernel here takes it, and its list of taps on a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from adaptconv.backends.kept import kept
from adaptconv.problem import Problem

Triple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Extents on three axes, depth, height and width; missing ones lead and are 1.

    Output place ``o`` reads, through tap t, input place ``o * stride + offsets[t]``, zeros where that lies outside:
    the padding before is subtracted from the offsets already.

    Attributes:
        size: input extents.
        out: output extents.
        stride: output step an axis.
        live: indices of the taps that read the input for some output; the others add nothing.
        offsets: of the live taps, in their order.
    """

    size: Triple
    out: Triple
    stride: Triple
    live: tuple[int, ...]
    offsets: tuple[Triple, ...]


@lru_cache(maxsize=4096)
def geometry(problem: Problem) -> Geometry:
    """Lay a problem out; its direction does not matter."""
    lead = (0,) * (3 - problem.axes)
    ones = (1,) * (3 - problem.axes)
    before = (*lead, *(first for first, _ in problem.padding))
    live = problem.taps.live(problem.spatial, problem.padding, problem.stride)
    offsets = []
    for t in live:
        z, y, x = (o - zeros for o, zeros in zip((*lead, *problem.taps.offsets[t]), before, strict=True))
        offsets.append((z, y, x))
    return Geometry(
        _triple(ones + problem.spatial), _triple(ones + problem.out_spatial), _triple(ones + problem.stride), live,
        tuple(offsets),
    )  # fmt: skip


@kept(4096)
def on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Rows of integers as an int32 tensor ``[rows, columns]``, made once: no captured graph may copy from the host."""
    return torch.tensor(rows, dtype=torch.int32).to(device)


def _triple(values: tuple[int, ...]) -> Triple:
    z, y, x = values
    return z, y, x
