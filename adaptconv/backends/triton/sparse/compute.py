"""The host's side of the kernels: layouts, packed weights, tables, launches, and the sums of parts."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends.base import Config
from adaptconv.backends.triton.geometry import on_device
from adaptconv.backends.triton.sparse import kernels, planar_kernels, weight_kernels
from adaptconv.backends.triton.sparse.tables import (
    Products,
    Sums,
    pitches,
    planar_products,
    planar_sums,
    planar_vector,
    products,
    sums,
)
from adaptconv.backends.triton.sparse.tiles import Tile, depth_of, precision, turned, vector_of
from adaptconv.problem import Direction, Problem

_SUMMED = 1024  # elements a program of ``sum_parts``


def compute(problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """One direction, as ``Backend.run`` promises it."""
    with _on(a):
        if problem.direction is Direction.GRAD_WEIGHT:
            return _grad_weight(problem, config, a, b)
        if Tile.parse(str(config["tile"])).planar:
            return _planar_product(problem, config, a, b, bias)
        return _product(problem, config, a, b, bias)


def _on(t: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device_of(t) if t.is_cuda else nullcontext()


def _wide(t: Tensor, groups: int, width: int) -> Tensor:
    """``[..., groups * n]`` as ``[..., groups * width]``: zeros behind the channels of each group."""
    now = t.shape[-1] // groups
    if now == width:
        return t
    return F.pad(t.reshape(*t.shape[:-1], groups, now), (0, width - now)).flatten(-2)


def _aligned(t: Tensor) -> Tensor:
    """Contiguous, from an address that vectors of 16 bytes may be read at: a view may begin anywhere."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % 16 else t


def _innermost(t: Tensor, groups: int, depth: int) -> Tensor:
    """``[N, C, *places]`` as contiguous ``[N, places, groups * depth]``: channels last."""
    return _aligned(_wide(t.movedim(1, -1), groups, depth).reshape(t.shape[0], -1, groups * depth))


def _packed(problem: Problem, w: Tensor, width: int, deep: int) -> Tensor:
    """``[C_out, C_in/g, T]`` as ``[T, groups * width, deep]``: what a column sums side by side, zeros behind."""
    outs, ins, taps = w.shape
    groups = problem.groups
    grouped = w.reshape(groups, outs // groups, ins, taps)
    if problem.direction is Direction.GRAD_INPUT:
        grouped = grouped.transpose(1, 2)
    packed = grouped.permute(3, 0, 1, 2)
    _, _, columns, summed = packed.shape
    if (columns, summed) != (width, deep):
        packed = F.pad(packed, (0, deep - summed, 0, width - columns))
    return _aligned(packed.reshape(taps, groups * width, deep))


def _product(problem: Problem, config: Config, a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    tile, split, groups = Tile.parse(str(config["tile"])), int(config["split"]), problem.groups
    forward = problem.direction is Direction.FORWARD
    ins, outs = (problem.c_in, problem.c_out) if forward else (problem.c_out, problem.c_in)
    vec = vector_of(problem)
    depth, width = depth_of(ins // groups, vec), depth_of(outs // groups, vec)
    deep = -(-depth // tile.k) * tile.k
    table = products(problem, tile.m, bool(config.get("cut", False)))
    x, packed = _innermost(a, groups, depth), _packed(problem, w, width, deep)
    bias = None if bias is None else _wide(bias, groups, width)
    y = a.new_empty((problem.batch, *(problem.out_spatial if forward else problem.spatial), groups * width))
    if split == 1:
        _launch_product(problem, tile, table, x, packed, bias, y, 1)
    else:
        parts = a.new_empty((split, *y.shape), dtype=torch.float32)
        _launch_product(problem, tile, table, x, packed, None, parts, split)
        kernels.sum_parts[(-(-y.numel() // _SUMMED),)](
            parts, y if bias is None else bias, y, y.numel(), split, groups * width, 1,
            BIAS=bias is not None, BLOCK=_SUMMED, num_warps=4,
        )  # fmt: skip
    if groups * width != outs:
        y = y.unflatten(-1, (groups, width))[..., : outs // groups].flatten(-2)
    return y.movedim(-1, 1).contiguous(memory_format=problem.memory_format)


def _launch_product(
    problem: Problem, tile: Tile, table: Products, x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, split: int
) -> None:
    """Write y, or with a split its parts."""
    s, groups = table.sweep, problem.groups
    vec = vector_of(problem)
    depth, width = x.shape[2] // groups, w.shape[1] // groups
    lead = 3 - len(s.axes)
    size = [1] * lead + [axis.source for axis in s.axes]
    step = [1] * lead + [axis.step for axis in s.axes]
    pitch = [0] * lead + [
        axis.pitch * places for axis, places in zip(s.axes, pitches([a.target for a in s.axes]), strict=True)
    ]
    grid = (table.tiles * groups * -(-width // tile.n), split)
    kernels.tap_product[grid](
        x, w, y if bias is None else bias, y, on_device(table.jobs, x.device), on_device(table.taps, x.device),
        len(table.jobs), s.batch, *size, *step, *pitch,
        s.sources * groups * depth // vec, s.targets * groups * width // vec, w.shape[1] * w.shape[2] // tile.k,
        groups * depth // vec, depth // vec, w.shape[2] // tile.k, width // vec, groups,
        _channel_parts(split, w.shape[2] // tile.k), s.batch * s.targets * groups * width // vec,
        AXES=len(s.axes), JOBS=table.room, VEC=vec, EVEN=depth == w.shape[2], BIAS=bias is not None,
        PARTIAL=split > 1, PRECISION=precision(problem), BM=tile.m, BN=tile.n, BK=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _planar_product(problem: Problem, config: Config, a: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    tile, split, groups = Tile.parse(str(config["tile"])), int(config["split"]), problem.groups
    forward = problem.direction is Direction.FORWARD
    ins, outs = (problem.c_in, problem.c_out) if forward else (problem.c_out, problem.c_in)
    ins, outs = ins // groups, outs // groups
    vec = planar_vector(problem)
    table = planar_products(problem, tile.n, bool(config.get("cut", False)))
    (axis,) = table.sweep.axes
    packed = _packed(problem, w, outs, -(-ins // tile.k) * tile.k)
    y = a.new_empty(problem.output_shape if forward else problem.input_shape)
    parts = y if split == 1 else a.new_empty((split, y.numel()), dtype=torch.float32)
    blocks = packed.shape[2] // tile.k
    planar_kernels.planar_product[(table.tiles * groups * -(-outs // tile.m), split)](
        _aligned(a), packed, y if bias is None else bias, parts, on_device(table.jobs, a.device),
        on_device(table.taps, a.device), len(table.jobs), axis.source // vec, axis.target // vec,
        groups * ins * axis.source // vec, groups * outs * axis.target // vec, groups * outs * blocks, ins, blocks,
        outs, groups, _channel_parts(split, blocks), y.numel() // vec,
        JOBS=table.room, VEC=vec, EVEN=ins % tile.k == 0, BIAS=bias is not None and split == 1, PARTIAL=split > 1,
        PRECISION=precision(problem), BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if split > 1:
        kernels.sum_parts[(-(-y.numel() // _SUMMED),)](
            parts, y if bias is None else bias, y, y.numel(), split, groups * outs, axis.target,
            BIAS=bias is not None, BLOCK=_SUMMED, num_warps=4,
        )  # fmt: skip
    return y


def _grad_weight(problem: Problem, config: Config, x: Tensor, dy: Tensor) -> Tensor:
    """Parts of the sums of the taps that read the input, then their sum; other taps are zero."""
    tile, split, groups = Tile.parse(str(config["tile"])), int(config["split"]), problem.groups
    table = planar_sums(problem) if tile.planar else sums(problem, tile.taps)
    dw = x.new_empty(problem.weight_shape)
    alive, taps = len(table.sweep.taps), len(problem.taps)
    if not alive:
        return dw.zero_()
    ins = problem.c_in // groups
    wide = depth_of(ins, vector_of(problem))
    rows = problem.c_out * wide
    parts = x.new_empty((split, alive, rows), dtype=torch.float32)
    launch = _launch_planar_weight if tile.planar else _launch_weight
    launch(problem, tile, table, x, dy, parts)
    across = min(16, 1 << max(taps - 1, 0).bit_length())
    tall = _SUMMED // across
    weight_kernels.sum_weights[(-(-rows // tall), -(-taps // across))](
        parts, dw, on_device((table.slots,), x.device), rows, ins, wide, taps, alive, split, BR=tall, BT=across,
        num_warps=4,
    )  # fmt: skip
    return dw


def _launch_weight(problem: Problem, tile: Tile, table: Sums, x: Tensor, dy: Tensor, parts: Tensor) -> None:
    s, groups, vec = table.sweep, problem.groups, vector_of(problem)
    ins, outs = problem.c_in // groups, problem.c_out // groups
    depth_in, depth_out = depth_of(ins, vec), depth_of(outs, vec)
    x, dy = _innermost(x, groups, depth_in), _innermost(dy, groups, depth_out)
    lead = 3 - len(s.axes)
    size = [1] * lead + [axis.source for axis in s.axes]
    wide = [1] * lead + [axis.target for axis in s.axes]
    step = [1] * lead + [axis.step for axis in s.axes]
    grid = (len(table.boxes) * groups * -(-outs // tile.m) * -(-ins // tile.n), parts.shape[0])
    weight_kernels.weight_product[grid](
        x, dy, parts, on_device(table.boxes, x.device), s.batch, *size, wide[1], wide[2], *step, s.sources, s.targets,
        depth_in // vec, depth_out // vec, ins, outs, groups, parts[0].numel() // vec,
        AXES=len(s.axes), SHARE=tile.taps, SAME=all(axis.source == axis.target and axis.step == 1 for axis in s.axes),
        WIDE=max(x.numel(), dy.numel()) >= 1 << 31, TURNED=turned(problem, tile), VEC=vec,
        PRECISION=precision(problem), BM=tile.m, BN=tile.n, BK=tile.k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _launch_planar_weight(problem: Problem, tile: Tile, table: Sums, x: Tensor, dy: Tensor, parts: Tensor) -> None:
    s, groups, vec, width = table.sweep, problem.groups, planar_vector(problem), vector_of(problem)
    ins, outs = problem.c_in // groups, problem.c_out // groups
    (axis,) = s.axes
    grid = (len(table.boxes) * groups * -(-outs // tile.m) * -(-ins // tile.n), parts.shape[0])
    planar_kernels.planar_weight[grid](
        _aligned(x), _aligned(dy), parts, on_device(table.boxes, x.device), s.batch, axis.source // vec,
        axis.target // vec, problem.c_in * axis.source // vec, problem.c_out * axis.target // vec, ins,
        depth_of(ins, width) // width, outs, groups, parts[0].numel() // width,
        VEC=vec, WIDTH=width, PRECISION=precision(problem), BM=tile.m, BN=tile.n, BK=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _channel_parts(split: int, blocks: int) -> int:
    """Of ``split`` parts of a sum those along the channels: each then has all taps. Taps are cut for the rest."""
    return max(n for n in (1, 2, 4, 8, 16, 32, 64) if n <= min(split, blocks))
