"""Convolutions written as sums of convolutions, as products with unfolded columns, and those that are only reported."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptconv.taps import TapPattern
from tests.patterns.base import grid, layer, pattern

G2 = grid((3, 3))
CROSS = grid((3, 3), 2).union(G2)
DENSE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def conv(axes: int, size: int, dilation: int = 1, groups: int = 1, **more: Any) -> Any:
    """What makes a convolution of 4 channels to 4 that keeps extents."""
    return partial(DENSE[axes], 4, 4, size, padding=dilation * (size // 2), dilation=dilation, groups=groups, **more)


def sum_of(count: int) -> str:
    return f"sum of {count} convs"


# ---- sums ----------------------------------------------------------------------------------------------


@pattern(CROSS, kind=sum_of(2), a=conv(2, 3), b=conv(2, 3, 2))
def sum_of_two(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@pattern(grid((5,)).union(grid((11,), 2)), kind=sum_of(2), a=conv(1, 5, 1, 4), b=conv(1, 11, 2, 4))
def sum_of_an_island_and_wings(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@pattern(grid((3, 3, 3)).union(grid((3, 3, 3), 2)), kind=sum_of(2), a=conv(3, 3), b=conv(3, 3, 2, bias=False))
def sum_in_space(m: Any, x: Tensor) -> Any:
    return torch.add(m.a(x), m.b(x))


@pattern(G2, kind=sum_of(2), a=conv(2, 3), b=conv(2, 1))
def sum_as_in_repvgg(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@pattern(grid((9, 9)), kind=sum_of(2), a=conv(2, 9, 1, 4, bias=False), b=conv(2, 5, 1, 4))
def sum_as_in_replknet(m: Any, x: Tensor) -> Any:
    y = m.a(x)
    y += m.b(x)
    return y


@pattern(grid((3, 3), 2).union(grid((3, 3), 3)), kind=sum_of(3), a=conv(2, 1), b=conv(2, 3, 2), c=conv(2, 3, 3))
def sum_of_three_as_in_aspp(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x) + m.c(x)


@pattern(
    grid((3,)).union(grid((3,), 2)).union(grid((3,), 4)), kind=sum_of(3), a=conv(1, 3), b=conv(1, 3, 2), c=conv(1, 3, 4)
)
def sum_by_the_builtin(m: Any, x: Tensor) -> Any:
    return sum([m.a(x), m.b(x), m.c(x)])


@pattern(
    grid((3,)).union(grid((3,), 2)).union(grid((3,), 4)), kind=sum_of(3), a=conv(1, 3), b=conv(1, 3, 2), c=conv(1, 3, 4)
)
def sum_by_a_loop(m: Any, x: Tensor) -> Any:
    y = 0
    for part in (m.a, m.b, m.c):
        y = y + part(x)
    return y


@pattern(
    grid((3,)).union(grid((3,), 2)).union(grid((5,), 3)), kind=sum_of(3), a=conv(1, 3), b=conv(1, 3, 2), c=conv(1, 5, 3)
)
def sum_to_the_right(m: Any, x: Tensor) -> Any:
    return m.a(x) + (m.b(x) + m.c(x))


@pattern(
    grid((3,)).union(grid((3,), 2)).union(grid((5,), 3)),
    kind=sum_of(4),
    a=conv(1, 3),
    b=conv(1, 3, 2),
    c=conv(1, 5, 3),
    d=conv(1, 1),
)
def sum_of_pairs(m: Any, x: Tensor) -> Any:
    return (m.a(x) + m.b(x)) + (m.c(x) + m.d(x))


@pattern(CROSS, kind=sum_of(2), w=(6, 2, 3, 3), v=(6, 2, 3, 3), b=(6,))
def sum_by_methods(m: Any, x: Tensor) -> Any:
    return F.conv2d(x, m.w, padding=1, groups=2).add_(F.conv2d(x, m.v, m.b, padding=2, dilation=2, groups=2))


@pattern(CROSS, kind=sum_of(2), a=partial(nn.Conv2d, 4, 6, 3, 2, 1), b=partial(nn.Conv2d, 4, 6, 3, 2, 2, 2))
def sum_of_strided(m: Any, x: Tensor) -> Any:
    return F.relu(m.a(x) + m.b(x), inplace=True)


@pattern(
    CROSS,
    kind=sum_of(2),
    a=partial(nn.Conv2d, 4, 6, 3, padding="same"),
    b=partial(nn.Conv2d, 4, 6, 3, padding="same", dilation=2),
)
def sum_of_same(m: Any, x: Tensor) -> Any:
    return m.a(x).add(m.b(x))


@pattern(grid((4,)).union(grid((6,))), [(2, 3)], kind=sum_of(2), w=(4, 1, 4), v=(4, 1, 6))
def sum_of_even(m: Any, x: Tensor) -> Any:
    return F.conv1d(x, m.w, padding="same", groups=4) + F.conv1d(x, m.v, padding="same", groups=4)


@pattern(CROSS, kind=sum_of(2), w=(6, 4, 3, 3), v=(6, 4, 3, 3))
def sum_of_padded(m: Any, x: Tensor) -> Any:
    return F.conv2d(F.pad(x, (1, 1, 1, 1)), m.w) + F.conv2d(F.pad(x, (2, 2, 2, 2)), m.v, dilation=2)


# ---- unfolded -------------------------------------------------------------------------------------------

UNFOLDED: dict[str, Any] = {"kind": "unfold", "w": (6, 36)}


@pattern(G2, **UNFOLDED)
def unfold_and_product(m: Any, x: Tensor) -> Any:
    return (m.w @ F.unfold(x, 3, padding=1)).view(x.shape[0], 6, *x.shape[2:])


@pattern(grid((3, 3), 2), kind="unfold", w=(6, 4, 3, 3), b=(6,))
def unfold_and_matmul_with_bias(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, (3, 3), dilation=2, padding=2)
    y = torch.matmul(m.w.view(6, -1), columns) + m.b[:, None]
    return y.reshape(x.shape[0], 6, x.shape[2], x.shape[3])


@pattern(G2, **UNFOLDED)
def unfold_and_bmm(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, 3, padding=1)
    return torch.bmm(m.w.unsqueeze(0).expand(x.shape[0], -1, -1), columns).view(x.shape[0], 6, *x.shape[2:])


@pattern(G2, **UNFOLDED, b=(6,))
def unfold_and_einsum(m: Any, x: Tensor) -> Any:
    y = torch.einsum("ok,nkl->nol", m.w, F.unfold(x, 3, padding=1))
    return (y + m.b.view(1, -1, 1)).view(x.shape[0], 6, *x.shape[2:])


@pattern(grid((5, 1), (2, 1)), kind="unfold", w=(6, 20))
def unfold_and_einsum_in_other_letters(m: Any, x: Tensor) -> Any:
    columns = torch.nn.functional.unfold(x, kernel_size=(5, 1), dilation=(2, 1), padding=(4, 0))
    return torch.einsum("bij,ci->bcj", columns, m.w).unflatten(2, x.shape[2:])


@pattern(G2, **UNFOLDED, b=(6,))
def unfold_and_linear(m: Any, x: Tensor) -> Any:
    y = F.linear(F.unfold(x, 3, padding=1).transpose(1, 2), m.w, m.b).transpose(1, 2)
    return y.reshape(x.shape[0], 6, *x.shape[2:])


@pattern(G2, kind="unfold", unfold=partial(nn.Unfold, 3, padding=1), linear=partial(nn.Linear, 36, 6))
def unfold_and_linear_modules(m: Any, x: Tensor) -> Any:
    return m.linear(m.unfold(x).permute(0, 2, 1)).permute(0, 2, 1).reshape(x.shape[0], 6, *x.shape[2:])


@pattern(G2, 0, kind="unfold", w=(6, 4, 3, 3))
def unfold_and_fold_as_in_the_manual(m: Any, x: Tensor) -> Any:
    columns = F.unfold(x, (3, 3))
    y = columns.transpose(1, 2).matmul(m.w.view(m.w.size(0), -1).t()).transpose(1, 2)
    return F.fold(y, (x.shape[2] - 2, x.shape[3] - 2), (1, 1))


@pattern(G2, **UNFOLDED)
def unfold_of_strided(m: Any, x: Tensor) -> Any:
    y = m.w @ F.unfold(x, 3, padding=1, stride=2)
    return y.view(x.shape[0], 6, (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)


@pattern(G2, **UNFOLDED)
def unfold_and_left_unfolded(m: Any, x: Tensor) -> Any:
    """The places stay one axis: the result has no rows and columns."""
    return m.w @ F.unfold(x, 3, padding=1)


@pattern(G2, 1, **UNFOLDED)
def unfold_of_padded(m: Any, x: Tensor) -> Any:
    return (m.w @ F.unfold(F.pad(x, (1, 1, 1, 1)), 3)).view(x.shape[0], 6, *x.shape[2:])


# ---- reported ----------------------------------------------------------------------------------------------

layer(partial(nn.ConvTranspose2d, 4, 6, 3, 2, 1), None, axes=2, note="transpos", name="conv2d_transposed")
layer(partial(nn.ConvTranspose1d, 4, 6, 4, 2, 1), None, axes=1, note="transpos", name="conv1d_transposed")


@pattern(None, axes=3, note="transpos", w=(4, 3, 2, 2, 2))
def functional_transposed(m: Any, x: Tensor) -> Any:
    return F.conv_transpose3d(x, m.w, stride=2, groups=2)


@pattern(grid((5, 5)), note="pointwise", a=conv(2, 5, 1, 4), b=partial(nn.Conv2d, 4, 6, 1))
def depthwise_then_pointwise(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x))


@pattern(grid((7,)), note="pointwise", a=conv(1, 7, 1, 4, bias=False), b=partial(nn.Conv1d, 4, 6, 1))
def depthwise_then_pointwise_in_time(m: Any, x: Tensor) -> Any:
    return m.b(m.a(x))


@pattern(G2, note="batch norm", eval=True, conv=conv(2, 3, bias=False), norm=partial(nn.BatchNorm2d, 4))
def batch_norm_after_it(m: Any, x: Tensor) -> Any:
    return F.relu(m.norm(m.conv(x)))


@pattern(TapPattern.grid((3,), 2), note="batch norm", eval=True, conv=conv(1, 3, 2), norm=partial(nn.BatchNorm1d, 4))
def batch_norm_after_it_in_time(m: Any, x: Tensor) -> Any:
    return m.norm(m.conv(x))
