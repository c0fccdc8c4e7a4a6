"""gather: im2col of the live taps only, then one matrix product a chunk of images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends import costs, halves
from adaptconv.backends.base import Backend, Config, Knob, Space, laid_out, transformed
from adaptconv.backends.weights import picked
from adaptconv.problem import Direction, Problem

_MIB = 1 << 20
_WORKSPACES = (4, 32, 256)  # MiB
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
        live = len(_live(problem))
        columns = _image_bytes(problem) * problem.batch
        share = live / max(len(problem.taps), 1)
        return costs.columns_us(problem, problem.flops * share, 3 * columns)

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Gather, multiply, and scatter back where the direction asks for it."""
        if halves.is_wide(config):
            return halves.in_float32(self.run, problem, config, a, b, bias)
        bound = int(config["workspace_mib"]) * _MIB
        if problem.direction is Direction.FORWARD:
            return _forward(problem, bound, a, b, bias)
        if problem.direction is Direction.GRAD_INPUT:
            return _grad_input(problem, bound, a, b)
        return _grad_weight(problem, bound, a, b)


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


def _view(problem: Problem, padded: Tensor, tap: int, rows: slice) -> Tensor:
    """What one tap reads for some output rows: ``[n, C_in, rows, *out_spatial[1:]]``."""
    view = padded
    for axis, (start, step, count) in enumerate(
        zip(problem.taps.offsets[tap], problem.stride, problem.out_spatial, strict=True)
    ):
        first, stop = (rows.start, rows.stop) if axis == 0 else (0, count)
        view = view[(slice(None),) * (2 + axis) + (slice(start + first * step, start + (stop - 1) * step + 1, step),)]
    return view


def _columns(problem: Problem, padded: Tensor, live: tuple[int, ...], rows: slice) -> Tensor:
    """Columns of a chunk, ``[n, groups, C_in/groups * T, pixels]``."""
    seen = torch.stack([_view(problem, padded, t, rows) for t in live], dim=2)
    n = seen.shape[0]
    return seen.reshape(n, problem.groups, problem.c_in // problem.groups * len(live), -1)


def _pads(problem: Problem) -> list[int]:
    return [zeros for pair in reversed(problem.padding) for zeros in pair]


def _padded(problem: Problem, x: Tensor) -> Tensor:
    """The input with its padding; in a graph for Inductor by an op that it does not look into.

    Inductor takes what makes a tensor into every place that reads it: a GELU before the convolution would be computed
    once for each tap, number by number under a stride.
    """
    pads = _pads(problem)
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


def _forward(problem: Problem, bound: int, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    live = _live(problem)
    n_out = problem.output_shape
    if not live:
        y = x.new_zeros(n_out)
    else:
        padded, matrix = _padded(problem, x), _matrix(problem, w, live)
        parts: dict[int, list[Tensor]] = {}
        for images, rows in _chunks(problem, bound):
            product = torch.matmul(matrix, _columns(problem, padded[images], live, rows))
            shape = (product.shape[0], problem.c_out, rows.stop - rows.start, *problem.out_spatial[1:])
            parts.setdefault(images.start, []).append(product.reshape(shape))
        whole = [part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts.values()]
        y = whole[0] if len(whole) == 1 else torch.cat(whole)
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * problem.axes)
    return laid_out(y, problem.memory_format)


def _grad_input(problem: Problem, bound: int, dy: Tensor, w: Tensor) -> Tensor:
    live = _live(problem)
    padded_spatial = tuple(extent + sum(pair) for extent, pair in zip(problem.spatial, problem.padding, strict=True))
    # Taps overlap: their sum is kept in float32 where the operands are narrower.
    wide = torch.float32 if problem.torch_dtype.itemsize < 4 else problem.torch_dtype
    padded = dy.new_zeros((problem.batch, problem.c_in, *padded_spatial), dtype=wide)
    if live:
        matrix = _matrix(problem, w, live).transpose(1, 2)
        for images, rows in _chunks(problem, bound):
            grad = dy[images][:, :, rows]
            spread = torch.matmul(
                matrix, grad.reshape(grad.shape[0], problem.groups, problem.c_out // problem.groups, -1)
            )
            spread = spread.reshape(grad.shape[0], problem.c_in, len(live), *grad.shape[2:])
            chunk = padded[images]
            for i, t in enumerate(live):
                _view(problem, chunk, t, rows).add_(spread[:, :, i])
    dx = F.pad(padded, [-zeros for zeros in _pads(problem)]).to(problem.torch_dtype)
    return laid_out(dx, problem.memory_format)


def _grad_weight(problem: Problem, bound: int, x: Tensor, dy: Tensor) -> Tensor:
    live = _live(problem)
    wide = torch.float32 if problem.torch_dtype.itemsize < 4 else problem.torch_dtype
    if not live:
        return x.new_zeros(problem.weight_shape)
    padded = _padded(problem, x)
    total: Tensor | None = None
    for images, rows in _chunks(problem, bound):
        grad = dy[images][:, :, rows]
        grad = grad.reshape(grad.shape[0], problem.groups, problem.c_out // problem.groups, -1)
        product = torch.matmul(grad, _columns(problem, padded[images], live, rows).transpose(2, 3)).sum(0, dtype=wide)
        total = product if total is None else total + product
    assert total is not None, "an empty batch is answered before any backend runs"
    dw = total.to(problem.torch_dtype).reshape(problem.c_out, problem.c_in // problem.groups, len(live))
    if len(live) == len(problem.taps):
        return dw
    column = {t: i for i, t in enumerate(live)}
    return picked(dw, tuple(column.get(t, -1) for t in range(len(problem.taps))))
