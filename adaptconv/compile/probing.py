"""Probing: what kernel a cut-out piece of a graph makes. Runs it on values of our own and looks at the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from adaptconv.compile.constructed import Cutting
from adaptconv.errors import ConvArgumentError
from adaptconv.kernel import Kernel
from adaptconv.taps import TapPattern

_BASE = 127  # digits 1 to 127 are exact in every floating-point dtype
_SPREAD_TOLERANCE = 1e-5  # of the largest weight: a footprint's values were rounded once more on the way


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A kernel that a graph constructs, as found.

    Attributes:
        taps: where it can be other than zero.
        leaves: the tensors it is made from.
        columns: for each leaf, seen as ``[C_out, C_in/groups, -1]``, which of its columns every tap holds, -1 for
            none; None where the kernel is more than such a placement: then its live columns are read off the weight
            as the graph made it.
        steps: the nodes that construct it.
        text: for people.
    """

    taps: TapPattern
    leaves: tuple[fx.Node, ...]
    columns: tuple[tuple[int, ...], ...] | None
    steps: tuple[fx.Node, ...]
    text: str


def probe(cutting: Cutting) -> Made | None:
    """The kernel a cutting makes; None where it has no zeros that are there for every value, nor a footprint."""
    with ExitStack() as outside:
        outside.enter_context(_disable_current_modes())
        outside.enter_context(torch.no_grad())
        outside.enter_context(torch.autocast("cpu", enabled=False))
        outside.enter_context(torch.device("cpu"))
        return _probed(cutting)


def _probed(cutting: Cutting) -> Made | None:
    shape = tuple(cutting.weight.meta["example_value"].shape)
    leads, window = shape[:2], shape[2:]
    if cutting.run(_filled(cutting, 0.0)).any() or not 1 <= len(window) <= 3:
        return None  # affine, not linear: something is added whatever the leaves hold
    generator = torch.Generator().manual_seed(0)
    probes = 2 if cutting.weight.meta["example_value"].dtype.itemsize >= 4 else 4  # few bits cancel by chance
    randoms = [_random(cutting, generator) for _ in range(probes)]
    results = [cutting.run(values) for values in randoms]
    live = torch.stack([result != 0 for result in results]).any(0).flatten(2)
    if not all(bool(result.isfinite().all()) for result in results) or not live.any():
        return None
    spread = _spread(cutting, randoms, results, leads, window)
    if spread is not None:
        leaf = cutting.leaves[0]
        columns = tuple(range(len(spread)))
        text = f"{len(spread)} taps, each spread by a footprint over {_by(window)}"
        return Made(spread, (leaf,), (columns,), cutting.steps, text)
    used = live.any(0).any(0)
    positions = used.nonzero().flatten().tolist()
    offsets = tuple(tuple(int(i) for i in torch.unravel_index(torch.tensor(p), window)) for p in positions)
    taps = TapPattern(offsets, window)
    if leads[1] == 1:  # a hint for depthwise kernels alone: each channel may have holes of its own
        taps = taps.with_density(float(live.sum()) / (live.shape[0] * len(positions)))
    if taps.is_dense() and taps.density == 1:
        return None
    columns_of = _placement(cutting, randoms, results, positions)
    tensors = len(cutting.leaves)
    text = f"{len(positions)} of {math.prod(window)} taps, made from {tensors} tensor{'s' * (tensors > 1)}"
    return Made(taps, cutting.leaves, columns_of, cutting.steps, text)


def _by(window: Sequence[int]) -> str:
    return "x".join(map(str, window))


def _like(leaf: fx.Node) -> Tensor:
    """An empty tensor with a leaf's shape, strides and dtype, on the CPU; one that overlaps itself cannot be filled."""
    value = leaf.meta["example_value"]
    if 0 in value.stride():
        return torch.empty(tuple(value.shape), dtype=value.dtype, device="cpu")
    return torch.empty_strided(tuple(value.shape), tuple(value.stride()), dtype=value.dtype, device="cpu")


def _filled(cutting: Cutting, value: float) -> list[Tensor]:
    return [_like(leaf).fill_(value) for leaf in cutting.leaves]


def _random(cutting: Cutting, generator: torch.Generator) -> list[Tensor]:
    """Values away from zero, so that a product with a constant stays a number other than zero."""
    values = []
    for leaf in cutting.leaves:
        empty = _like(leaf)
        size = tuple(empty.shape)
        sign = torch.randint(0, 2, size, generator=generator) * 2 - 1
        values.append(empty.copy_((torch.rand(size, generator=generator) + 0.5) * sign))
    return values


def _placement(
    cutting: Cutting, randoms: Sequence[Sequence[Tensor]], results: Sequence[Tensor], positions: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    """Which column of which leaf every live position holds, if that is all there is and all channels are alike."""
    outs, ins = results[0].shape[:2]
    sizes = [leaf.meta["example_value"].numel() for leaf in cutting.leaves]
    if any(size % (outs * ins) for size in sizes):
        return None
    source = _sources(cutting, sizes, positions)
    if source is None:
        return None
    columns = []
    start = 0
    for size in sizes:
        width = size // (outs * ins)
        local = source - start - torch.arange(outs * ins).reshape(outs, ins, 1) * width
        mine = (source >= start) & (source < start + size)
        if not bool((mine == mine[0, 0]).all()) or not bool(((local == local[0, 0]) | ~mine).all()):
            return None
        columns.append(tuple(torch.where(mine[0, 0], local[0, 0], -1).tolist()))
        start += size
    if any(not -1 <= column < size // (outs * ins) for size, row in zip(sizes, columns, strict=True) for column in row):
        return None
    for values, result in zip(randoms, results, strict=True):
        flat = [value.reshape(outs, ins, -1) for value in values]
        placed = torch.stack([_columns_of(flat, columns, t) for t in range(len(positions))], 2)
        if not torch.equal(placed.to(result.dtype), result.flatten(2)[:, :, torch.tensor(positions)]):
            return None
    return tuple(columns)


def _columns_of(flat: Sequence[Tensor], columns: Sequence[Sequence[int]], tap: int) -> Tensor:
    return next(leaf[:, :, row[tap]] for leaf, row in zip(flat, columns, strict=True) if row[tap] >= 0)


def _sources(cutting: Cutting, sizes: Sequence[int], positions: Sequence[int]) -> Tensor | None:
    """The element, of all leaves strung together, that each live position holds: ``[C_out, C_in/groups, T]``.

    Every element's index is written in digits, one probe a digit, small enough to be exact in every dtype.
    """
    index = torch.arange(sum(sizes))
    total = torch.zeros(1, dtype=torch.long)
    for power in range(max(1, math.ceil(math.log(len(index) + 1, _BASE)))):
        digits = (index // _BASE**power) % _BASE + 1
        values = [_like(leaf) for leaf in cutting.leaves]
        for value, part in zip(values, digits.split(list(sizes)), strict=True):
            value.copy_(part.reshape(value.shape))
        seen = cutting.run(values).flatten(2)[:, :, torch.tensor(positions)].double()
        if bool((seen != seen.round()).any() | (seen < 1).any() | (seen > _BASE).any()):
            return None
        total = total + (seen.long() - 1) * _BASE**power
    return total if bool((total < len(index)).all()) else None


# ---- footprints -------------------------------------------------------------------------------------


def _spread(
    cutting: Cutting,
    randoms: Sequence[Sequence[Tensor]],
    results: Sequence[Tensor],
    leads: Sequence[int],
    window: Sequence[int],
) -> TapPattern | None:
    """The kernel as taps on a grid, each spread by one footprint, if it is that."""
    if len(cutting.leaves) != 1:
        return None
    shape = tuple(cutting.leaves[0].meta["example_value"].shape)
    if shape[:2] != tuple(leads) or len(shape) != len(window) + 2:
        return None
    taps = _spread_guess(cutting, shape[2:], window)
    if taps is None:
        return None
    for (value,), result in zip(randoms, results, strict=True):
        difference = Kernel(value.double().flatten(2), taps).dense() - result.double()
        if float(difference.abs().max()) > _SPREAD_TOLERANCE * float(result.abs().max()):
            return None
    return taps


def _spread_guess(cutting: Cutting, size: Sequence[int], window: Sequence[int]) -> TapPattern | None:
    """The pattern that single taps suggest: what the first becomes, and how far its neighbour on each axis lies."""

    def answer(tap: Sequence[int]) -> Tensor:
        value = _like(cutting.leaves[0]).zero_()
        at: tuple[slice | int, ...] = (slice(None), slice(None), *tap)
        value[at] = 1
        return cutting.run([value])[0, 0].double()

    origin = [0] * len(size)
    first = answer(origin)
    if not first.any():
        return None
    start, end = _box(first)
    if all(a == b for a, b in zip(start, end, strict=True)):
        return None  # no footprint: a tap stays a tap
    step = []
    for axis, extent in enumerate(size):
        if extent == 1:
            step.append(1)
            continue
        moved = answer([int(a == axis) for a in range(len(size))])
        if not moved.any() or (distance := _box(moved)[0][axis] - start[axis]) < 1:
            return None
        step.append(distance)
    filters = _factored(first[tuple(slice(a, b + 1) for a, b in zip(start, end, strict=True))])
    core = tuple(w - len(values) + 1 for w, values in zip(window, filters, strict=True))
    grid = TapPattern.grid(tuple(size), tuple(step))
    offsets = tuple(tuple(o + a for o, a in zip(offset, start, strict=True)) for offset in grid.offsets)
    try:
        return TapPattern(offsets, core).spread_by(filters)
    except ConvArgumentError:
        return None


def _box(values: Tensor) -> tuple[list[int], list[int]]:
    """First and last position on each axis that is not zero."""
    found = values.nonzero()
    return found.min(0).values.tolist(), found.max(0).values.tolist()


def _factored(values: Tensor) -> list[list[float]]:
    """One filter an axis whose outer product is this, if there are such; the first carries the scale."""
    peak = [int(i) for i in torch.unravel_index(values.abs().argmax(), tuple(values.shape))]
    top = float(values[tuple(peak)])
    filters = []
    for axis in range(values.dim()):
        line = values.moveaxis(axis, -1)[tuple(i for a, i in enumerate(peak) if a != axis)]
        filters.append((line if axis == 0 else line / top).tolist())
    return filters
