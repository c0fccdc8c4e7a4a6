"""gather: im2col of the live taps only, then one matrix product a chunk of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends import costs, halves
from adaptconv.backends.base import Backend, Call, Config, Knob, Space, laid_out, transformed
from adaptconv.backends.pointwise import is_pointwise, product
from adaptconv.backends.weights import picked
from adaptconv.problem import Direction, Problem

_MIB = 1 << 20
_WORKSPACES = (4, 32, 256)  # MiB
_MOST_KEPT = 1000  # indices of views that a plan keeps, a third of a kilobyte each
_MOST_SLICES = 4000  # off the CPU: each is some microseconds of Python, whatever the GPU does meanwhile


class Gather(Backend):
    """Reads each live tap's view of the padded input into a workspace of bounded size and multiplies.

    Images are taken in chunks so that the workspace stays under its bound; one image that alone exceeds
    it is cut along its first spatial axis.
    """

    name: ClassVar[str] = "gather"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "im2col of the taps that can touch the input, then a matrix product; bounded workspace"

    def rejects(self, problem: Problem) -> str | None:
        """Declines spread taps, when one row of one image exceeds the largest workspace, and endless slicing."""
        if problem.taps.footprint is not None:
            return "its taps carry a footprint"
        row = _image_bytes(problem) // max(problem.out_spatial[0], 1)
        if row > 256 * _MIB:
            return f"one output row needs {row // _MIB} MiB of gathered input, over the 256 MiB bound"
        if problem.device.kind != "cpu" and not _bounds(problem):
            return f"it would slice the input more than {_MOST_SLICES} times, in Python"
        return None

    def space(self, problem: Problem) -> Space:
        """The bound of the workspace, and the dtype of half-precision arithmetic."""
        bounds = _bounds(problem) or _WORKSPACES
        default = 32 if 32 in bounds else bounds[0]
        text = "upper bound of the gathered columns kept at once, in MiB"
        return Space((Knob("workspace_mib", bounds, default, text), *halves.knobs(problem)))

    def cost(self, problem: Problem, config: Config) -> float:
        """A matrix product, plus writing and reading the columns."""
        if halves.is_wide(config):
            return costs.in_float32_us(self.cost, problem, config)
        if is_pointwise(problem):
            return costs.columns_us(problem, problem.flops, problem.bytes)
        live = len(_live(problem))
        columns = _image_bytes(problem) * problem.batch
        share = live / max(len(problem.taps), 1)
        return costs.columns_us(problem, problem.flops * share, 3 * columns)

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Gather, multiply, and scatter back where the direction asks for it."""
        return self.prepared(problem, config)(a, b, bias)

    def prepared(self, problem: Problem, config: Config) -> Call:
        """The call with its chunks and slices settled: between small products Python's time shows."""
        if halves.is_wide(config):
            return partial(halves.in_float32, self.run, problem, config)
        if is_pointwise(problem):
            return product(problem)
        run = {
            Direction.FORWARD: _forward, Direction.GRAD_INPUT: _grad_input, Direction.GRAD_WEIGHT: _grad_weight
        }[problem.direction]  # fmt: skip
        return partial(run, _settled(problem, int(config["workspace_mib"]) * _MIB))


def slices(problem: Problem, config: Config) -> int:
    """How many views of the input a call takes: each costs Python's time."""
    return len(_live(problem)) * sum(1 for _ in _chunks(problem, int(config["workspace_mib"]) * _MIB))


def _bounds(problem: Problem) -> tuple[int, ...]:
    """Workspaces in MiB; on a GPU those that leave few enough slices."""
    if problem.device.kind == "cpu":
        return _WORKSPACES
    return tuple(mib for mib in _WORKSPACES if slices(problem, Config(workspace_mib=mib)) <= _MOST_SLICES)


def _live(problem: Problem) -> tuple[int, ...]:
    return problem.taps.live(problem.spatial, problem.padding, problem.stride)


def _image_bytes(problem: Problem) -> int:
    """Bytes of gathered columns for one image."""
    return problem.c_in * len(_live(problem)) * math.prod(problem.out_spatial) * problem.torch_dtype.itemsize


def _chunks(problem: Problem, bound: int) -> Iterator[tuple[slice, slice]]:
    """Slices of (images, first output axis) whose columns fit the bound, covering everything once."""
    image = max(_image_bytes(problem), 1)
    rows = problem.out_spatial[0]
    if image <= bound:
        step = max(1, bound // image)
        for n in range(0, problem.batch, step):
            yield slice(n, min(n + step, problem.batch)), slice(0, rows)
        return
    step = max(1, rows * bound // image)
    for n in range(problem.batch):
        for row in range(0, rows, step):
            yield slice(n, n + 1), slice(row, min(row + step, rows))


@dataclass(frozen=True, slots=True)
class _Settled:
    """A problem cut into chunks.

    Attributes:
        problem: the problem.
        live: taps that can touch the input.
        pads: zeros around the input, as ``F.pad`` takes them.
        chunks: images and rows of the output.
        known: what each live tap reads for the rows that begin at a place: the index of a view
            ``[n, C_in, rows, *out_spatial[1:]]`` of the padded input. Empty where that would be too much to keep.
    """

    problem: Problem
    live: tuple[int, ...]
    pads: list[int]
    chunks: tuple[tuple[slice, slice], ...]
    known: dict[int, tuple[tuple[slice, ...], ...]]

    def reads(self, rows: slice) -> tuple[tuple[slice, ...], ...]:
        """What each live tap reads for these rows."""
        known = self.known.get(rows.start)
        return tuple(_read_by(self.problem, tap, rows) for tap in self.live) if known is None else known


def _settled(problem: Problem, bound: int) -> _Settled:
    live, chunks = _live(problem), tuple(_chunks(problem, bound))
    starts = {rows.start: rows for _, rows in chunks}
    few = len(starts) * len(live) <= _MOST_KEPT
    known = {at: tuple(_read_by(problem, t, rows) for t in live) for at, rows in starts.items()} if few else {}
    return _Settled(problem, live, [zeros for pair in reversed(problem.padding) for zeros in pair], chunks, known)


def _read_by(problem: Problem, tap: int, rows: slice) -> tuple[slice, ...]:
    index = [slice(None), slice(None)]
    for axis, (start, step, count) in enumerate(
        zip(problem.taps.offsets[tap], problem.stride, problem.out_spatial, strict=True)
    ):
        first, stop = (rows.start, rows.stop) if axis == 0 else (0, count)
        index.append(slice(start + first * step, start + (stop - 1) * step + 1, step))
    return tuple(index)


def _columns(problem: Problem, padded: Tensor, reads: tuple[tuple[slice, ...], ...]) -> Tensor:
    """Columns of a chunk, ``[n, groups, C_in/groups * T, pixels]``."""
    views = [padded[index] for index in reads]
    seen = torch.stack(views, dim=2) if len(views) > 1 else views[0]
    return seen.reshape(seen.shape[0], problem.groups, problem.c_in // problem.groups * len(views), -1)


def _padded(x: Tensor, pads: list[int]) -> Tensor:
    """The input with its padding; in a graph for Inductor by an op that it does not look into.

    Inductor takes what makes a tensor into every place that reads it: a GELU before the convolution would be computed
    once for each tap, number by number under a stride.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not transformed():
        written: Tensor = torch.ops.adaptconv.padded(x, pads)
        return written
    return F.pad(x, pads) if any(pads) else x


_LIBRARY = torch.library.Library("adaptconv", "FRAGMENT")
_LIBRARY.define("padded(Tensor x, int[] pads) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _written(x: Tensor, pads: list[int]) -> Tensor:
    """The padded input in contiguous memory of its own."""
    return F.pad(x, pads).contiguous() if any(pads) else x.clone(memory_format=torch.contiguous_format)


def _written_fake(x: Tensor, pads: list[int]) -> Tensor:
    extents = [e + sum(pads[2 * i : 2 * i + 2]) for i, e in enumerate(reversed(x.shape[2:]))]
    return x.new_empty((*x.shape[:2], *reversed(extents)))


_LIBRARY.impl("padded", _written, "CompositeExplicitAutograd")
torch.library.register_fake("adaptconv::padded", _written_fake, lib=_LIBRARY)


def _matrix(problem: Problem, w: Tensor, live: tuple[int, ...]) -> Tensor:
    """Live columns of the weight as ``[groups, C_out/groups, C_in/groups * T]``."""
    kept = w if len(live) == len(problem.taps) else picked(w, live)
    return kept.reshape(problem.groups, problem.c_out // problem.groups, -1)


def _forward(settled: _Settled, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    problem = settled.problem
    if not settled.live:
        y = x.new_zeros(problem.output_shape)
    else:
        padded, matrix = _padded(x, settled.pads), _matrix(problem, w, settled.live)
        across = problem.out_spatial[1:]
        parts: dict[int, list[Tensor]] = {}
        for images, rows in settled.chunks:
            found = torch.matmul(matrix, _columns(problem, padded[images], settled.reads(rows)))
            shape = (found.shape[0], problem.c_out, rows.stop - rows.start, *across)
            parts.setdefault(images.start, []).append(found.reshape(shape))
        whole = [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts.values()]
        y = whole[0] if len(whole) == 1 else torch.cat(whole)
    if bias is not None:
        column = bias.reshape(-1, *(1,) * problem.axes)
        y = y + column if transformed() else y.add_(column)  # a second tensor costs more than the sum
    return laid_out(y, problem.memory_format)


def _grad_input(settled: _Settled, dy: Tensor, w: Tensor, _: Tensor | None) -> Tensor:
    problem, live = settled.problem, settled.live
    padded_spatial = tuple(extent + sum(pair) for extent, pair in zip(problem.spatial, problem.padding, strict=True))
    # Taps overlap: their sum is kept in float32 where the operands are narrower.
    wide = torch.float32 if problem.torch_dtype.itemsize < 4 else problem.torch_dtype
    padded = dy.new_zeros((problem.batch, problem.c_in, *padded_spatial), dtype=wide)
    if live:
        matrix = _matrix(problem, w, live).transpose(1, 2)
        for images, rows in settled.chunks:
            grad = dy[images][:, :, rows]
            spread = torch.matmul(
                matrix, grad.reshape(grad.shape[0], problem.groups, problem.c_out // problem.groups, -1)
            )
            spread = spread.reshape(grad.shape[0], problem.c_in, len(live), *grad.shape[2:])
            chunk = padded[images]
            for i, index in enumerate(settled.reads(rows)):
                chunk[index].add_(spread[:, :, i])
    dx = F.pad(padded, [-zeros for zeros in settled.pads]).to(problem.torch_dtype)
    return laid_out(dx, problem.memory_format)


def _grad_weight(settled: _Settled, x: Tensor, dy: Tensor, _: Tensor | None) -> Tensor:
    problem, live = settled.problem, settled.live
    wide = torch.float32 if problem.torch_dtype.itemsize < 4 else problem.torch_dtype
    if not live:
        return x.new_zeros(problem.weight_shape)
    padded = _padded(x, settled.pads)
    total: Tensor | None = None
    for images, rows in settled.chunks:
        grad = dy[images][:, :, rows]
        grad = grad.reshape(grad.shape[0], problem.groups, problem.c_out // problem.groups, -1)
        found = torch.matmul(grad, _columns(problem, padded[images], settled.reads(rows)).transpose(2, 3)).sum(
            0, dtype=wide
        )
        total = found if total is None else total + found
    assert total is not None, "an empty batch is answered before any backend runs"
    dw = total.to(problem.torch_dtype).reshape(problem.c_out, problem.c_in // problem.groups, len(live))
    if len(live) == len(problem.taps):
        return dw
    column = {t: i for i, t in enumerate(live)}
    return picked(dw, tuple(column.get(t, -1) for t in range(len(problem.taps))))
