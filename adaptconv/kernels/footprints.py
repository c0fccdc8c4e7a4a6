"""Footprints: the small filters by which interpolated kernels spread their weights, as plain numbers and as tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends.weights import real_constant
from adaptconv.errors import ConvArgumentError

LINEAR = (0.5, 1.0, 0.5)

Filter = tuple[float, ...]
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Stencil:
    """A filter over all axes at once: what a tensor of more than one axis means as a footprint.

    Args:
        shape: extent along each axis, odd.
        values: the values, row by row.
    """

    shape: tuple[int, ...]
    values: tuple[float, ...]

    def factors(self) -> tuple[Filter, ...] | None:
        """One filter an axis whose outer product this is, exactly in float64; None if there are none."""
        places = list(itertools.product(*map(range, self.shape)))
        table = dict(zip(places, self.values, strict=True))
        peak = max(places, key=lambda place: abs(table[place]))
        filters = [
            tuple(table[(*peak[:axis], i, *peak[axis + 1 :])] / (table[peak] if axis else 1.0) for i in range(extent))
            for axis, extent in enumerate(self.shape)
        ]
        exact = all(math.prod(f[i] for f, i in zip(filters, place, strict=True)) == table[place] for place in places)
        return tuple(filters) if exact else None

    def rounds(self, count: int) -> Stencil:
        """The one stencil of several rounds: convolved with itself, ever wider: ``S * up2(S) * up4(S) ...``."""
        table = dict(zip(itertools.product(*map(range, self.shape)), self.values, strict=True))
        whole, shape = dict(table), self.shape
        for step in (2**k for k in range(1, count)):
            sums: dict[tuple[int, ...], float] = {}
            for (near, value), (far, weight) in itertools.product(whole.items(), table.items()):
                place = tuple(i + step * j for i, j in zip(near, far, strict=True))
                sums[place] = sums.get(place, 0.0) + value * weight
            shape = tuple(extent + step * (own - 1) for extent, own in zip(shape, self.shape, strict=True))
            whole = {place: sums.get(place, 0.0) for place in itertools.product(*map(range, shape))}
        return Stencil(shape, tuple(whole.values()))

    def energies(self) -> tuple[float, float]:
        """The sum of its squares, and the square of its sum."""
        return sum(value * value for value in self.values), sum(self.values) * sum(self.values)


Footprint = Filter | tuple[Filter, ...] | Stencil


def read_footprint(given: Any) -> Footprint:
    """A footprint as plain tuples: a filter for every axis, one filter an axis, or a ``Stencil``.

    Raises:
        ConvArgumentError: no numbers in one of these shapes; an even length; values not finite or all zero.
    """
    if isinstance(given, str):
        if given != "linear":
            raise ConvArgumentError(f"a footprint is 'linear', or values; got {given!r}")
        return LINEAR
    if isinstance(given, Stencil):
        return _checked_stencil(given)
    is_array = hasattr(given, "tolist")
    values = (given.detach().cpu() if isinstance(given, Tensor) else given).tolist() if is_array else given
    if isinstance(values, (list, tuple)):
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]
    depth = _depth(values)
    if depth == 1:
        return _checked_filter(values)
    if depth == 2 and not is_array:
        return tuple(map(_checked_filter, values))
    shape, flat = _flat(values)
    if not 1 <= len(shape) <= 3:
        raise ConvArgumentError(f"a footprint has 1 to 3 axes, got shape {shape}")
    return _checked_stencil(Stencil(shape, tuple(flat)))


def filters_of(footprint: Footprint, axes: int) -> tuple[Filter, ...] | Stencil:
    """One filter an axis, or the stencil where it is no outer product of such.

    Raises:
        ConvArgumentError: another number of axes.
    """
    if isinstance(footprint, Stencil):
        if len(footprint.shape) != axes:
            raise ConvArgumentError(
                f"the footprint has shape {footprint.shape}, the kernel {axes} axes: give values over as many axes"
            )
        return footprint.factors() or footprint
    nested = tuple(f for f in footprint if isinstance(f, tuple))
    if not nested:
        return (tuple(f for f in footprint if not isinstance(f, tuple)),) * axes
    if len(nested) != axes:
        raise ConvArgumentError(
            f"the footprint has {len(nested)} filters, the kernel {axes} axes: give one filter an axis"
        )
    return nested


def combined(values: Filter, rounds: int) -> Filter:
    """The filter of several rounds along one axis, ``s * up2(s) * up4(s) ...``; that of none is ``(1,)``."""
    return Stencil((len(values),), values).rounds(rounds).values if rounds else (1.0,)


def cut_matrix(values: Filter, size: int, rounds: int) -> Matrix:
    """The linear map of rounds that keep within the outermost weights: ``[size, (size - 1) * 2^rounds + 1]``.

    One round takes ``w[i]`` to place ``2 i`` and spreads it by the filter; what falls outside is cut off.
    """
    half = len(values) // 2
    whole = [[float(i == j) for j in range(size)] for i in range(size)]
    for _ in range(rounds):
        extent = 2 * size - 1
        near = [
            {i: j - 2 * i + half for i in range(size) if 0 <= j - 2 * i + half < len(values)} for j in range(extent)
        ]
        whole = [[sum(row[i] * values[k] for i, k in near[j].items()) for j in range(extent)] for row in whole]
        size = extent
    return tuple(map(tuple, whole))


def cut_energies(stencil: Stencil, size: tuple[int, ...], rounds: int) -> tuple[float, float]:
    """What one weight becomes in rounds cut off at the outermost weights: the sum of squares, and the square of the
    sum; both on average over the weights.
    """
    half = [extent // 2 for extent in stencil.shape]
    steps = list(zip(itertools.product(*map(range, stencil.shape)), stencil.values, strict=True))
    squares, sums_squared = [], []
    for origin in itertools.product(*map(range, size)):
        spread, extents = {origin: 1.0}, size
        for _ in range(rounds):
            extents = tuple(2 * extent - 1 for extent in extents)
            sums: dict[tuple[int, ...], float] = {}
            for (place, value), (step, weight) in itertools.product(spread.items(), steps):
                moved = tuple(2 * i + j - h for i, j, h in zip(place, step, half, strict=True))
                if all(0 <= i < extent for i, extent in zip(moved, extents, strict=True)):
                    sums[moved] = sums.get(moved, 0.0) + value * weight
            spread = sums
        squares += [value * value for value in spread.values()]
        sums_squared.append(sum(spread.values()) * sum(spread.values()))
    return sum(squares) / math.prod(size), sum(sums_squared) / math.prod(size)


def _depth(values: Any) -> int:
    depth = 0
    while isinstance(values, (list, tuple)):
        depth += 1
        values = values[0] if len(values) else 0.0
    return depth


def _flat(values: Any) -> tuple[tuple[int, ...], list[float]]:
    """Shape and values of a nested sequence.

    Raises:
        ConvArgumentError: it is ragged, or holds something else than numbers.
    """
    if not isinstance(values, (list, tuple)):
        return (), [_number(values)]
    inner = [_flat(value) for value in values]
    shapes = {shape for shape, _ in inner}
    if len(shapes) != 1:
        raise ConvArgumentError(f"a footprint over several axes must be rectangular and not empty, got {values!r}")
    return (len(values), *shapes.pop()), [number for _, flat in inner for number in flat]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConvArgumentError(f"a footprint is 'linear' or made of numbers, got {value!r} in it") from None


def _checked_filter(values: Sequence[Any]) -> Filter:
    if not isinstance(values, (list, tuple)):
        raise ConvArgumentError(f"a footprint is one filter for all axes or one an axis, got {values!r} among filters")
    shape, flat = _flat(values) if values else ((0,), [])
    if len(shape) != 1:
        raise ConvArgumentError(f"a footprint is one filter for all axes or one an axis, got {values!r} for an axis")
    _check_values(shape, flat)
    return tuple(flat)


def _checked_stencil(stencil: Stencil) -> Stencil:
    if len(stencil.values) != math.prod(stencil.shape):
        raise ConvArgumentError(f"a footprint of shape {stencil.shape} has so many values, got {len(stencil.values)}")
    _check_values(stencil.shape, stencil.values)
    return stencil


def _check_values(shape: tuple[int, ...], values: Sequence[float]) -> None:
    if any(extent % 2 == 0 for extent in shape):
        raise ConvArgumentError(f"a footprint has odd lengths, so that there is a centre; got {shape}")
    if not all(map(math.isfinite, values)):
        raise ConvArgumentError(f"a footprint's values must be finite, got {tuple(values)}")
    if not any(values):
        raise ConvArgumentError(f"a footprint must not be all zero, got {tuple(values)}: the kernel would be none")


# ---- as tensors ---------------------------------------------------------------------------------


def learnt_rounds(filters: Tensor, rounds: int) -> Tensor:
    """The filters ``[axes, L]`` of one round as those of several together; elementwise, so autocast leaves it be."""
    length = filters.shape[1]
    whole = filters
    for step in (2**k for k in range(1, rounds)):
        shifted = [F.pad(whole, (i * step, (length - 1 - i) * step)) * filters[:, i : i + 1] for i in range(length)]
        whole = torch.stack(shifted).sum(0)
    return whole


def learnt_matrix(values: Tensor, size: int, rounds: int, fade: bool) -> Tensor:
    """The map ``[size, extent]`` from the weights along an axis to the window's, for a learnt filter ``[L]``."""
    if fade:
        whole = learnt_rounds(values[None], rounds)[0]
        return _rows(whole, size, 2**rounds)
    half = values.shape[0] // 2
    matrix = None
    for _ in range(rounds):
        once = _rows(values, size, 2)
        once = once[:, half : once.shape[1] - half]
        matrix = once if matrix is None else matrix @ once
        size = 2 * size - 1
    assert matrix is not None
    return matrix


def _rows(values: Tensor, size: int, step: int) -> Tensor:
    """The filter once a weight, each ``step`` further: ``[size, (size - 1) * step + L]``."""
    return torch.stack([F.pad(values, (i * step, (size - 1 - i) * step)) for i in range(size)])


def stencil_tensor(stencil: Stencil, like: Tensor) -> Tensor:
    """A stencil in a tensor's dtype and place."""
    return _known(stencil.values, like).reshape(stencil.shape)


def joint_matrix(matrices: tuple[Matrix, ...], like: Tensor) -> Tensor:
    """The map over all axes, ``[prod(size), prod(window)]``, of one matrix an axis."""
    product: Tensor | None = None
    for matrix in matrices:
        values = tuple(itertools.chain.from_iterable(matrix))
        rows = _known(values, like).reshape(len(matrix), -1)
        product = rows if product is None else torch.kron(product, rows)
    assert product is not None
    return product


def _known(values: tuple[float, ...], like: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # asked first: what comes next, dynamo does not trace
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    return real_constant(values, like.dtype, like.device)
