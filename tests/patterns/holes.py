"""Zeros between the taps of a kernel, written in every spelling: into zeros, as products with constants, as shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.kernels import dilate
from adaptconv.taps import TapPattern
from tests.patterns.base import Forward, grid, pattern

HOLES = grid((3, 3), 2)
TRAILED = TapPattern(HOLES.offsets, (6, 6))  # what a Kronecker product leaves when its tail is not cut off


def holes(taps: TapPattern = HOLES, **more: Any) -> Callable[[Forward], Any]:
    """List a function ``(module, x) -> weight``; the pattern is that weight's convolution, extents kept."""

    def keep(weight: Forward) -> Any:
        call = (torch.conv1d, torch.conv2d, torch.conv3d)[taps.axes - 1]

        def forward(m: Any, x: Tensor) -> Any:
            return call(x, weight(m, x), padding=[extent // 2 for extent in taps.window])

        forward.__name__ = weight.__name__
        given = {"made": True, "w": (6, 4, *(3,) * taps.axes), **more}
        sides = [extent // 2 for extent in taps.window]
        pattern(taps, sides, **given)(forward)
        return weight

    return keep


def spread(w: Tensor) -> Tensor:
    dense = w.new_zeros(*w.shape[:2], 5, 5)
    dense[:, :, ::2, ::2] = w
    return dense


def corner() -> Tensor:
    mask = torch.zeros(2, 2)
    mask[0, 0] = 1
    return mask


# ---- written into zeros ------------------------------------------------------------------------------


@holes()
def holes_by_slices(m: Any, x: Tensor) -> Any:
    return spread(m.w)


@holes()
def holes_by_slices_of_zeros_elsewhere(m: Any, x: Tensor) -> Any:
    dense = torch.zeros((6, 4, 5, 5), device=x.device, dtype=m.w.dtype)
    dense[..., ::2, ::2] = m.w
    return dense


@holes()
def holes_by_copy(m: Any, x: Tensor) -> Any:
    dense = torch.zeros(6, 4, 5, 5)
    dense[:, :, ::2, ::2].copy_(m.w)
    return dense


@holes()
def holes_by_adding(m: Any, x: Tensor) -> Any:
    dense = torch.zeros(6, 4, 5, 5)
    dense[:, :, ::2, ::2] += m.w
    return dense


@holes()
def holes_tap_by_tap(m: Any, x: Tensor) -> Any:
    dense = torch.zeros_like(F.pad(m.w, (1, 1, 1, 1)))
    for i in range(3):
        for j in range(3):
            dense[:, :, 2 * i, 2 * j] = m.w[:, :, i, j]
    return dense


@holes()
def holes_by_advanced_indexing(m: Any, x: Tensor) -> Any:
    places = torch.arange(0, 5, 2)
    dense = torch.zeros(6, 4, 5, 5)
    dense[:, :, places[:, None], places[None]] = m.w
    return dense


@holes()
def holes_by_index_put(m: Any, x: Tensor) -> Any:
    rows, columns = torch.meshgrid(torch.arange(3) * 2, torch.arange(3) * 2, indexing="ij")
    dense = torch.zeros(5, 5, 6, 4).index_put((rows, columns), m.w.permute(2, 3, 0, 1))
    return dense.permute(2, 3, 0, 1)


@holes()
def holes_by_scatter(m: Any, x: Tensor) -> Any:
    places = torch.tensor([0, 2, 4, 10, 12, 14, 20, 22, 24]).expand(6, 4, 9)
    return torch.zeros(6, 4, 25).scatter(2, places, m.w.flatten(2)).view(6, 4, 5, 5)


@holes()
def holes_by_scatter_in_place(m: Any, x: Tensor) -> Any:
    places = (torch.arange(0, 5, 2)[:, None] * 5 + torch.arange(0, 5, 2)).flatten().repeat(6, 4, 1)
    return m.w.new_zeros(6, 4, 25).scatter_(2, places, m.w.reshape(6, 4, 9)).view(6, 4, 5, 5)


@holes()
def holes_by_index_copy(m: Any, x: Tensor) -> Any:
    places = torch.arange(0, 5, 2)
    rows = torch.zeros(6, 4, 5, 3).index_copy(2, places, m.w)
    return torch.zeros(6, 4, 5, 5).index_copy_(3, places, rows)


@holes()
def holes_by_index_add(m: Any, x: Tensor) -> Any:
    places = torch.tensor([0, 2, 4])
    rows = torch.zeros(6, 4, 5, 3).index_add(2, places, m.w)
    return torch.zeros(6, 4, 5, 5).index_add(3, places, rows)


@holes()
def holes_by_slice_scatter(m: Any, x: Tensor) -> Any:
    rows = torch.slice_scatter(m.w.new_zeros(6, 4, 5, 3), m.w, dim=2, step=2)
    return torch.slice_scatter(m.w.new_zeros(6, 4, 5, 5), rows, dim=3, step=2)


# ---- products with constants ----------------------------------------------------------------------------


@holes()
def holes_by_kron(m: Any, x: Tensor) -> Any:
    return torch.kron(m.w, corner())[..., :-1, :-1]


@holes(TRAILED)
def holes_by_kron_untrimmed(m: Any, x: Tensor) -> Any:
    return torch.kron(m.w, corner())


@holes()
def holes_by_kron_with_a_literal(m: Any, x: Tensor) -> Any:
    return torch.kron(m.w, torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))[:, :, :5, :5]


@holes()
def holes_by_rows_of_the_identity(m: Any, x: Tensor) -> Any:
    rows = torch.eye(5)[:, ::2]
    return rows @ m.w @ rows.T


@holes()
def holes_by_matmul(m: Any, x: Tensor) -> Any:
    rows = torch.eye(5, dtype=m.w.dtype, device=m.w.device)[::2]
    return torch.matmul(torch.matmul(rows.t(), m.w), rows)


@holes()
def holes_by_einsum(m: Any, x: Tensor) -> Any:
    rows = torch.eye(5)[:, ::2]
    return torch.einsum("ai,ocij,bj->ocab", rows, m.w, rows)


@holes()
def holes_by_linear(m: Any, x: Tensor) -> Any:
    rows = torch.eye(5)[:, ::2]
    return F.linear(F.linear(m.w, rows).transpose(2, 3), rows).transpose(2, 3)


@holes()
def holes_by_transposed_convolution(m: Any, x: Tensor) -> Any:
    one = torch.ones(1, 1, 1, 1)
    return F.conv_transpose2d(m.w.reshape(-1, 1, 3, 3), one, stride=2).reshape(6, 4, 5, 5)


@holes()
def holes_by_grouped_transposed_convolution(m: Any, x: Tensor) -> Any:
    return F.conv_transpose2d(m.w, torch.ones(4, 1, 1, 1), stride=2, groups=4)


# ---- shapes with zeros in them ----------------------------------------------------------------------------


@holes()
def holes_by_padding_and_reshaping(m: Any, x: Tensor) -> Any:
    pieces = F.pad(m.w.reshape(6, 4, 3, 1, 3, 1), (0, 1, 0, 0, 0, 1))
    return pieces.reshape(6, 4, 6, 6)[..., :-1, :-1]


@holes()
def holes_by_stacking_with_zeros(m: Any, x: Tensor) -> Any:
    rows = torch.stack([m.w, torch.zeros_like(m.w)], dim=-1).flatten(-2)[..., :-1]
    return torch.stack([rows, torch.zeros_like(rows)], dim=3).reshape(6, 4, 6, 5)[:, :, :-1]


@holes()
def holes_by_joining_with_zeros(m: Any, x: Tensor) -> Any:
    zero = m.w.new_zeros(6, 4, 3, 1)
    rows = torch.cat([m.w[..., :1], zero, m.w[..., 1:2], zero, m.w[..., 2:]], dim=3)
    gap = rows.new_zeros(6, 4, 1, 5)
    return torch.cat([rows[:, :, :1], gap, rows[:, :, 1:2], gap, rows[:, :, 2:]], dim=2)


@holes()
def holes_by_dilate_of_ours(m: Any, x: Tensor) -> Any:
    return dilate(m.w, 2)
