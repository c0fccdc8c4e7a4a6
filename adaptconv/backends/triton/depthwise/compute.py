"""Host side of the depthwise kernels: layouts, tables, launches, and the second stage of the weight gradient."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends.base import Config
from adaptconv.backends.kept import kept
from adaptconv.backends.triton.depthwise import kernels, packed_kernels
from adaptconv.backends.triton.depthwise.plan import SECTIONS, STRIP, Packing, Pass, images, packing, passes
from adaptconv.backends.triton.depthwise.shapes import direct_shape, is_packed, packed_shape
from adaptconv.backends.triton.geometry import Triple, on_device
from adaptconv.problem import Direction, Problem

_KINDS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def compute(problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """What ``Backend.run`` promises, by the form that the configuration names."""
    with torch.cuda.device_of(a) if a.is_cuda else nullcontext():
        if problem.direction is Direction.GRAD_WEIGHT:
            return _weight_gradient(problem, config, a, b)
        shape = problem.output_shape if problem.direction is Direction.FORWARD else problem.input_shape
        y = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=problem.memory_format)
        run = _packed if is_packed(config) else _direct
        for here in passes(problem):
            # A pass without taps is nothing but bias or zeros, which the direct kernel writes.
            (run if here.taps else _direct)(problem, config, here, a, b, bias, y)
        return y


def _strides(t: Tensor, skip: tuple[int, int, int] = (1, 1, 1)) -> tuple[int, int, int, int, int]:
    """Of batch, channel and three axes, missing ones leading."""
    n, c, *rest = t.stride()
    z, y, x = (0,) * (3 - len(rest)) + tuple(rest)
    return n, c, z * skip[0], y * skip[1], x * skip[2]


def _is_long(*tensors: Tensor) -> bool:
    """Whether an element of one may lie past a 32-bit distance."""
    return any(sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True)) >= 1 << 31 for t in tensors)


def _unit(strides: tuple[int, ...], channels: int, *tensors: Tensor) -> int:
    """The largest vector of channels, at most sixteen bytes, that all strides, channels and addresses are whole in."""
    most = 16 // tensors[0].element_size()
    whole = math.gcd(most, channels, *strides)
    return whole if all(t.data_ptr() % (whole * t.element_size()) == 0 for t in tensors) else 1


def _multiple(problem: Problem) -> int:
    return problem.c_out // problem.groups


def _columns(rows: Tensor, indices: tuple[int, ...]) -> Tensor:
    """Columns of ``[C, n]`` by index, -1 giving zeros: ``[C, len(indices)]``."""
    gaps, known = _filled(indices, rows.shape[1])
    return (F.pad(rows, (0, 1)) if gaps else rows).index_select(1, on_device((known,), rows.device)[0])


@lru_cache(maxsize=1024)
def _filled(indices: tuple[int, ...], zeros: int) -> tuple[bool, tuple[int, ...]]:
    """Whether some are -1, and those replaced."""
    return -1 in indices, tuple(i if i >= 0 else zeros for i in indices)


@lru_cache(maxsize=1024)
def _inverse(taps: tuple[int, ...], count: int) -> tuple[int, ...]:
    """For each of ``count`` taps its place among ``taps``, -1 for none."""
    place = {t: i for i, t in enumerate(taps)}
    return tuple(place.get(t, -1) for t in range(count))


# ---- packed rows ------------------------------------------------------------------------------


def _pack(x: Tensor, extent: tuple[int, int, int, int], origin: tuple[int, int, int]) -> Tensor:
    """Copy ``[N, C, *spatial]`` of any strides to packed strips ``[C, N * volume * 8]``, half precision in words."""
    planes, rows, phases, length = extent
    n, channels = x.shape[:2]
    depth, height, width = (1,) * (5 - x.dim()) + tuple(x.shape[2:])
    strides = _strides(x)
    last = strides[1] == 1 and channels > 1 and (strides[4] != 1 or width == 1)
    unit = _unit((strides[0], *strides[2:]), channels, x) if last else 1
    packed = x.new_empty(channels, n * math.prod(extent) * STRIP)
    pitch, total = phases * length * STRIP, n * planes * rows
    along = min((64, 32) if last else (1024, 512, 256, 128, 64, 32), key=lambda b: -(-pitch // b) * b)  # least unused
    across = min(64, 1 << (channels - 1).bit_length()) if last else 4096 // along
    programs = -(-pitch // along) * (total * -(-channels // across) if last else channels * -(-total // across))
    packed_kernels.pack[programs,](
        x, packed, channels // unit, depth, height, width, total, rows, phases, length, *origin, planes,
        *_units(strides, unit, last),
        LAST=last, DEEP=planes > 1, PHASED=phases > 1, LONG=_is_long(x, packed), V=unit, A=across, B=along, num_warps=4,
    )  # fmt: skip
    return packed if x.dtype is torch.float32 else packed.view(torch.int32)


def _pack_images(x: Tensor, rows: Packing) -> Tensor:
    """Copy ``[N, C, *spatial]`` of any strides to strips of eight images ``[C, ceil(N / 8) * volume * 8]``."""
    planes, height, _, length = rows.extent
    n, channels = x.shape[:2]
    groups = -(-n // STRIP)
    packed = x.new_empty(channels, groups * rows.volume * STRIP)
    along, total = min(256, max(16, 1 << (length - 1).bit_length())), groups * planes * height
    packed_kernels.pack_images[-(-length // along) * total * channels,](
        x, packed, n, *(1,) * (5 - x.dim()), *x.shape[2:], total, height, length, *rows.origin, planes, *_strides(x),
        LONG=_is_long(x, packed), B=along, num_warps=4,
    )  # fmt: skip
    return packed if x.dtype is torch.float32 else packed.view(torch.int32)


def _groups(problem: Problem, rows: Packing) -> int:
    """How many times a channel's volume of strips is repeated over the batch."""
    return -(-problem.batch // STRIP) if rows.images else problem.batch


def _packed(problem: Problem, config: Config, here: Pass, a: Tensor, w: Tensor, bias: Tensor | None, y: Tensor) -> None:
    shape = packed_shape(config)
    rows = images(here) if shape.reach == 1 else packing(here, reach=shape.reach)
    packed = _pack_images(a, rows) if rows.images else _pack(a, rows.extent, rows.origin)
    table = on_device((rows.table,), a.device)
    weight = _columns(w[:, 0].float(), rows.indices)
    strides = _strides(y)
    places = _places(here, rows, problem.batch, strides, a.device)
    total = places.shape[1]
    step = strides[0] if rows.images else rows.spread * here.skip[2] * strides[4]
    packed_kernels.convolve_packed[y.shape[1] * -(-total // shape.strips),](
        packed, weight, weight if bias is None else bias, y, places, table, total,
        _groups(problem, rows) * rows.volume, weight.shape[1], _multiple(problem), strides[1], step,
        ADJOINT=problem.direction is Direction.GRAD_INPUT, HAS_BIAS=bias is not None,
        UNIT=step == 1 and not rows.images, KIND=_KINDS[problem.dtype], B=shape.strips, num_warps=shape.warps,
    )  # fmt: skip


@kept(1024)
def _places(here: Pass, rows: Packing, batch: int, strides: tuple[int, ...], device: torch.device) -> Tensor:
    """Of every strip of a channel's results: the packed strip it starts at; its address in y * 16 + how many exist."""

    def along(count: int, axis: int) -> Tensor:
        shape = [1] * 5
        shape[axis] = count
        return torch.arange(count, device=device, dtype=torch.int64).view(shape)

    planes, height, phases, length = rows.extent
    n, z, y = along(-(-batch // STRIP) if rows.images else batch, 0), along(here.count[0], 1), along(here.count[1], 2)
    r, j = along(rows.spread, 3), along(rows.strips, 4)
    source = (((n * planes + z * here.step[0]) * height + y * here.step[1]) * phases + r) * length
    if rows.images:
        source, x, exist = source + j * here.step[2], j, (batch - n * STRIP).clamp(max=STRIP)
        n = n * STRIP
    else:
        x = j * (STRIP * rows.spread) + r
        source, exist = source + j, ((here.count[2] - x + rows.spread - 1) // rows.spread).clamp(0, STRIP)
    at = [first + place * skip for first, place, skip in zip(here.first, (z, y, x), here.skip, strict=True)]
    to = n * strides[0] + at[0] * strides[2] + at[1] * strides[3] + at[2] * strides[4]
    source, to = torch.broadcast_tensors(source, to * 16 + exist)
    return torch.stack((source.reshape(-1), to.reshape(-1)))


# ---- straight from the operands ---------------------------------------------------------------


def _is_last(problem: Problem) -> bool:
    """Whether channels are neighbours in memory."""
    return problem.memory_format is not torch.contiguous_format


def _in_pairs(problem: Problem, unit: int) -> bool:
    """Whether two channels of half precision make an aligned word."""
    return _is_last(problem) and unit % 2 == 0 and problem.dtype != "float32" and _multiple(problem) == 1


def _words(t: Tensor) -> Tensor:
    """Channels-last ``[N, C, *spatial]`` as int32 ``[N, *spatial, C / 2]``."""
    return t.movedim(1, -1).view(torch.int32)


def _units(strides: tuple[int, ...], unit: int, last: bool) -> tuple[int, ...]:
    """Strides in vectors of channels; the channels' own is known where they are neighbours."""
    return tuple(1 if last and i == 1 else s // unit for i, s in enumerate(strides))


def _taps(offsets: tuple[Triple, ...], strides: tuple[int, ...], device: torch.device) -> Tensor:
    """``[T, 4]``: offsets on three axes, and the distance they make."""
    rows = tuple((z, y, x, z * strides[2] + y * strides[3] + x * strides[4]) for z, y, x in offsets)
    return on_device(rows or ((0, 0, 0, 0),), device)


def _direct(problem: Problem, config: Config, here: Pass, a: Tensor, w: Tensor, bias: Tensor | None, y: Tensor) -> None:
    a = a.contiguous(memory_format=problem.memory_format)
    channels, multiple, last = y.shape[1], _multiple(problem), _is_last(problem)
    read, written = _strides(a), _strides(y)
    unit = _unit((*read[:1], *read[2:], *written[:1], *written[2:]), channels, a, y) if last else 1
    places = problem.batch * math.prod(here.count)
    shape = direct_shape(config, last=last, channels=channels, unit=unit, places=places)
    weight = _columns(w[:, 0].float(), here.taps)
    start = sum(f * s for f, s in zip(here.first, written[2:], strict=True))
    filled = y.as_strided((1,), (1,), y.storage_offset() + start) if start else y
    grid = (-(-places // shape.places) * -(-channels // shape.channels),)
    reads, writes = _units(read, unit, last), _units(_strides(y, here.skip), unit, last)
    taps, extents = _taps(here.offsets, reads, a.device), (*here.size, *here.count, *here.step)
    long = _is_long(a, y)
    if _in_pairs(problem, unit):
        weight = weight.view(weight.shape[0] // 2, 2, weight.shape[1]).permute(2, 1, 0).contiguous()
        kernels.convolve_pairs[grid](
            _words(a), weight,
            weight if bias is None else bias, filled, taps, places, channels // unit, len(here.taps), *extents,
            reads[0], *reads[2:], writes[0], *writes[2:], KIND=_KINDS[problem.dtype], AXES=problem.axes, V=unit // 2,
            HAS_BIAS=bias is not None, LONG=long, BP=shape.places, BC=shape.channels // 2, num_warps=shape.warps,
        )  # fmt: skip
        return
    weight = weight.t().contiguous() if last else weight.contiguous()
    kernels.convolve_direct[grid](
        a, weight, weight if bias is None else bias, filled, taps, places, channels // unit, len(here.taps), multiple,
        *extents, *reads, *writes, AXES=problem.axes, LAST=last, V=unit, PLAIN=multiple == 1,
        ADJOINT=problem.direction is Direction.GRAD_INPUT, HAS_BIAS=bias is not None, LONG=long, BP=shape.places,
        BC=shape.channels, num_warps=shape.warps,
    )  # fmt: skip


# ---- the weight gradient ----------------------------------------------------------------------


def _weight_gradient(problem: Problem, config: Config, x: Tensor, dy: Tensor) -> Tensor:
    """Sums of dy times x by blocks of places and taps, then over the blocks, then to the taps that are alive."""
    (here,) = passes(problem)
    if not here.taps:
        return x.new_zeros(problem.weight_shape)
    sums, taps = (_packed_sums if is_packed(config) else _direct_sums)(problem, config, here, x, dy)
    return _columns(sums, _inverse(taps, len(problem.taps))).unsqueeze(1).to(x.dtype)


def _packed_sums(problem: Problem, config: Config, here: Pass, x: Tensor, dy: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``[C_out, columns]`` float32, and the tap of every column."""
    shape = packed_shape(config)
    if shape.reach == 1:
        rows = images(here)
        alone = Packing((*here.count[:2], 1, here.count[2]), (0, 0, 0), 1, here.count[2], (), (), (), images=True)
        packed, grads = _pack_images(x, rows), _pack_images(dy, alone)
    else:
        rows = packing(here, reach=shape.reach, lone=False)
        packed = _pack(x, rows.extent, rows.origin)
        grads = _pack(dy, (*here.count[:2], rows.spread, rows.strips), (0, 0, 0))
    places = _places(here, rows, problem.batch, (0,) * 5, x.device)
    offsets = list(rows.table[SECTIONS:])
    offsets += offsets[-1:] * (-len(offsets) % shape.groups)
    programs, total = len(offsets) // shape.groups, places.shape[1]
    splits = min(int(config["splits"]), -(-total // shape.strips))
    channels = problem.c_out
    part = torch.empty((splits, channels, len(offsets) * shape.reach), dtype=torch.float32, device=x.device)
    packed_kernels.correlate_packed[programs * splits * channels,](
        packed, grads, part, places, on_device((tuple(offsets),), x.device), total, channels,
        _groups(problem, rows) * rows.volume, programs, splits, _multiple(problem),
        KIND=_KINDS[problem.dtype], B=shape.strips, V=shape.reach // STRIP + 1, R=shape.groups, num_warps=shape.warps,
    )  # fmt: skip
    return part.sum(0) if splits > 1 else part[0], rows.indices


def _direct_sums(problem: Problem, config: Config, here: Pass, x: Tensor, dy: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """``[C_out, columns]`` float32, and the tap of every column."""
    x, dy = (t.contiguous(memory_format=problem.memory_format) for t in (x, dy))
    channels, multiple, last = problem.c_out, _multiple(problem), _is_last(problem)
    read, other = _strides(x), _strides(dy)
    unit = _unit((*read[:1], *read[2:], *other[:1], *other[2:]), channels, x, dy) if last else 1
    places = problem.batch * math.prod(here.count)
    shape = direct_shape(config, last=last, channels=channels, unit=unit, places=places)
    offsets = here.offsets + here.offsets[-1:] * (-len(here.offsets) % shape.taps)
    splits = min(int(config["splits"]), -(-places // shape.places))
    part = torch.empty((splits, len(offsets), channels), dtype=torch.float32, device=x.device)
    reads, others = _units(read, unit, last), _units(other, unit, last)
    taps, long = _taps(offsets, reads, x.device), _is_long(x, dy)
    pairs = _in_pairs(problem, unit)
    per = 2 if pairs else 1
    if pairs:
        x, dy = _words(x), _words(dy)
    kernels.correlate_direct[len(offsets) // shape.taps * -(-channels // shape.channels) * splits,](
        x, dy, part, taps, places, channels // unit, len(offsets), multiple, splits, *here.size, *here.count,
        *here.step, *reads, *others, KIND=_KINDS[problem.dtype], AXES=problem.axes, LAST=last, V=unit // per,
        PLAIN=multiple == 1, PAIRS=pairs, LONG=long, BT=shape.taps, BP=shape.places, BC=shape.channels // per,
        num_warps=shape.warps,
    )  # fmt: skip
    return (part.sum(0) if splits > 1 else part[0]).t(), here.taps
