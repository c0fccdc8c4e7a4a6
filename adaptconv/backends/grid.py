"""One regular grid through torch's own convolution: what native, dense and dual share.

Everything here is made of torch operations on whole tensors and traces through torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends import halves, onednn
from adaptconv.backends.base import Config, Knob, Space, laid_out, transformed
from adaptconv.backends.geometry import Geometry, geometry
from adaptconv.backends.stand_in import is_ordinary, stand_in
from adaptconv.backends.weights import adjoint_weight
from adaptconv.problem import Direction, Problem
from adaptconv.taps import TapPattern

_CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def grid_space(problem: Problem) -> Space:
    """Knobs of one grid through torch: layout, padding, the route a gradient takes, and the dtype it computes in."""
    here = "channels_last" if problem.memory_format is not torch.contiguous_format else "contiguous"
    other = "contiguous" if here == "channels_last" else "channels_last"
    pads = ("implicit", "explicit") if problem.device.kind == "cpu" else ("implicit",)  # cuDNN pads for nothing
    knobs = [
        Knob("layout", ("asis", other), "asis", "memory format torch convolves in; a 1-D problem goes as [N, C, 1, L]"),
        Knob("pad", pads, "implicit", "let torch pad, or F.pad first and convolve with padding 0"),
    ]
    small = ("onednn",) if onednn.is_offered(problem) else ()
    if problem.direction is Direction.GRAD_INPUT and problem.adjoint() is not None:
        routes = "torch's backward, or a forward with flipped taps; that by oneDNN, which torch does not ask"
        knobs.append(Knob("route", ("native", "adjoint", *small), "native", routes))
    elif problem.direction is Direction.FORWARD and small:
        knobs.append(Knob("route", ("native", *small), "native", "as torch would, or oneDNN, which torch does not ask"))
    # A group an image and channel: on a GPU cuDNN may take seconds to try its algorithms on thousands of groups.
    if problem.direction is Direction.GRAD_WEIGHT and problem.is_depthwise and problem.device.kind == "cpu":
        knobs.append(
            Knob("route", ("native", "grouped"), "native", "torch's backward, or one grouped forward of x by dy")
        )
    return Space((*knobs, *halves.knobs(problem)))


def run_grid(problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run a single-grid problem in its direction; operands and result as in ``Backend.run``."""
    if problem.axes == 1 and config["layout"] == "channels_last":
        return _run_as_2d(problem, config, a, b, bias)
    memory_format = _working_format(problem, config)
    # Where it is traced, Inductor will choose the format.
    if halves.is_wide(config) or halves.is_unsound(problem, memory_format if is_ordinary(a) else None, config):
        return halves.in_float32(run_grid, problem, config, a, b, bias)
    grid = geometry(problem)
    assert grid is not None, "run_grid needs a single grid"
    if problem.direction is Direction.FORWARD:
        result = _forward(problem, grid, config, memory_format, a, b, bias)
    elif problem.direction is Direction.GRAD_INPUT:
        result = _grad_input(problem, grid, config, memory_format, a, b)
    else:
        return _grad_weight(problem, grid, config, memory_format, a, b)
    return laid_out(result, problem.memory_format)


def plain_call(problem: Problem) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The plain torch call of a problem, with all that can be settled once settled: ``(a, b, bias) -> result``.

    What ``run_grid`` does under default knobs, for a single grid with even padding. After a call of a few milliseconds
    nothing of Python is left in the processor's caches, and the way through the knobs then takes tens of microseconds.
    """
    grid = geometry(problem)
    assert grid is not None and grid.symmetric is not None, "a plain call is a single grid with even padding"
    size, dilation, stride, groups = grid.size, list(grid.dilation), list(problem.stride), problem.groups
    padding, memory_format, direction = list(grid.symmetric), problem.memory_format, problem.direction
    if direction is Direction.FORWARD:
        convolve = _CONV[problem.axes]

        def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
            y: Tensor = convolve(x, w.reshape(*w.shape[:2], *size), bias, stride, padding, dilation, groups)
            return laid_out(y, memory_format)  # as it is, unless the operands are not in the problem's format

        return forward
    backward, none = torch.ops.aten.convolution_backward.default, [0] * problem.axes
    into_input = direction is Direction.GRAD_INPUT
    mask, at = [into_input, not into_input, False], 0 if into_input else 1
    window = (*problem.weight_shape[:2], *size)
    shape = problem.input_shape if into_input else window
    kept: list[Tensor] = []  # a stand-in is addresses without memory: it can be kept

    def unread(like: Tensor) -> Tensor:
        if not is_ordinary(like):
            return stand_in(like, shape, memory_format)
        if not kept:
            kept.append(stand_in(like, shape, memory_format))
        return kept[0]

    def gradient(a: Tensor, b: Tensor, _: Tensor | None) -> Tensor:
        if into_input:
            dy, x, w = a, unread(a), b.reshape(window)
        else:
            x, dy, w = a, b, unread(a)
        found: Tensor = backward(dy, x, w, None, stride, padding, dilation, False, none, groups, mask)[at]
        return laid_out(found, memory_format) if into_input else found.flatten(2)

    return gradient


def _laid_strictly(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """An operand of torch's in a memory format, the strides of axes of extent 1 too.

    Torch reads formats off them, and convolves wrong where it reads one operand's otherwise than another's.
    """
    t = laid_out(t, memory_format)
    if memory_format is torch.contiguous_format or 1 not in t.shape or transformed():
        return t
    _, c, *spatial = t.shape
    steps = [c]
    for extent in reversed(spatial[1:]):
        steps.insert(0, steps[0] * extent)
    wanted = (math.prod(spatial) * c, 1, *steps)
    return t if t.stride() == wanted else t.as_strided(t.shape, wanted)


def _working_format(problem: Problem, config: Config) -> torch.memory_format:
    layout = config["layout"]
    if layout == "asis":
        return problem.memory_format
    if layout == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if problem.axes == 2 else torch.channels_last_3d


def _run_as_2d(problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """A 1-D problem as a 2-D one with a row of height 1, in channels_last."""
    flat = _as_2d(problem)
    knobs = Config({**config, "layout": "asis"})
    if problem.direction is Direction.GRAD_WEIGHT:
        return run_grid(flat, knobs, a.unsqueeze(2), b.unsqueeze(2))
    return run_grid(flat, knobs, a.unsqueeze(2), b, bias).squeeze(2).contiguous()


@lru_cache(maxsize=4096)
def _as_2d(problem: Problem) -> Problem:
    taps = TapPattern(tuple((0, i) for (i,) in problem.taps.offsets), (1, *problem.taps.window))
    return replace(
        problem, spatial=(1, *problem.spatial), taps=taps, stride=(1, *problem.stride),
        padding=((0, 0), *problem.padding), layout="channels_last",
    )  # fmt: skip


def _forward(
    problem: Problem, grid: Geometry, config: Config, memory_format: torch.memory_format,
    x: Tensor, w: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    weight = _laid_strictly(w.reshape(*w.shape[:2], *grid.size), memory_format)
    padding = grid.symmetric if config["pad"] == "implicit" else None
    if padding is None:
        x, padding = _padded(x, grid.pads), (0,) * problem.axes
    x = _laid_strictly(x, memory_format)
    convolve = onednn.conv3d if config.get("route") == "onednn" else _CONV[problem.axes]
    return convolve(x, weight, bias, problem.stride, padding, grid.dilation, problem.groups)


def _grad_input(
    problem: Problem, grid: Geometry, config: Config, memory_format: torch.memory_format, dy: Tensor, w: Tensor
) -> Tensor:
    if config.get("route") in ("adjoint", "onednn"):
        adjoint = problem.adjoint()
        assert adjoint is not None
        # The working format travels as the adjoint's own layout: its knobs are a forward's.
        knobs = Config(layout=config["layout"], pad=config["pad"], route=config["route"])
        return run_grid(adjoint, knobs, dy, adjoint_weight(w, problem.groups))
    weight = _laid_strictly(w.reshape(*w.shape[:2], *grid.size), memory_format)
    dy = _laid_strictly(dy, memory_format)
    padding = grid.symmetric if config["pad"] == "implicit" else None
    cropped = padding is None
    spatial = problem.spatial
    if padding is None:
        padding = (0,) * problem.axes
        spatial = tuple(extent + sum(pair) for extent, pair in zip(spatial, grid.padding, strict=True))
    x = stand_in(dy, (problem.batch, problem.c_in, *spatial), memory_format)
    dx: Tensor = _backward(problem, grid, dy, x, weight, padding, (True, False, False))[0]
    return _padded(dx, [-zeros for zeros in grid.pads]) if cropped else dx


def _grad_weight(
    problem: Problem, grid: Geometry, config: Config, memory_format: torch.memory_format, x: Tensor, dy: Tensor
) -> Tensor:
    if config.get("route") == "grouped":
        return _grad_weight_grouped(problem, grid, memory_format, x, dy)
    padding = grid.symmetric if config["pad"] == "implicit" else None
    if padding is None:
        x, padding = _padded(x, grid.pads), (0,) * problem.axes
    x = _laid_strictly(x, memory_format)
    dy = _laid_strictly(dy, memory_format)
    weight = stand_in(x, (problem.c_out, problem.c_in // problem.groups, *grid.size), memory_format)
    dw: Tensor = _backward(problem, grid, dy, x, weight, padding, (False, True, False))[1]
    return dw.flatten(2)


def _grad_weight_grouped(
    problem: Problem, grid: Geometry, memory_format: torch.memory_format, x: Tensor, dy: Tensor
) -> Tensor:
    """dw[c, t] = sum over pixels of x[pixel * stride + t * dilation] dy[pixel].

    That is a forward convolution of x by dy in which stride and dilation change places, one group an
    image and channel.
    """
    batch = problem.batch
    padded = _padded(x, grid.pads)
    source = _laid_strictly(padded.reshape(1, batch * problem.c_in, *padded.shape[2:]), memory_format)
    filters = _laid_strictly(dy.reshape(batch * problem.c_out, 1, *dy.shape[2:]), memory_format)
    padding = (0,) * problem.axes
    dw = _CONV[problem.axes](source, filters, None, grid.dilation, padding, problem.stride, batch * problem.c_in)
    for axis, count in enumerate(grid.size):
        dw = dw.narrow(2 + axis, 0, count)  # a stride that does not divide leaves positions no tap has
    return dw.reshape(batch, problem.c_out, 1, math.prod(grid.size)).sum(0)


def _padded(x: Tensor, pads: list[int]) -> Tensor:
    """``F.pad``, also where one side is cropped by more than there is before the other side grows."""
    extents = [extent for extent in reversed(x.shape[2:]) for _ in range(2)]
    if any(zeros + extent < 0 for zeros, extent in zip(pads, extents, strict=True)):
        x, pads = F.pad(x, [max(zeros, 0) for zeros in pads]), [min(zeros, 0) for zeros in pads]
    return F.pad(x, pads)


def _backward(
    problem: Problem, grid: Geometry, dy: Tensor, x: Tensor, weight: Tensor, padding: Sequence[int],
    mask: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
        dy, x, weight, None, problem.stride, padding, grid.dilation, False, (0,) * problem.axes, problem.groups, mask
    )
    return result
