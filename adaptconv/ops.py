"""The torch.library ops that carry a plan through torch.compile.

``adaptconv::conv`` is traced through: AOTAutograd sees the torch operations of its plan. ``adaptconv::direction``
is opaque: for extents known only at run time, and for plans that Inductor would undo.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from adaptconv import dispatch, ranks, records, sharding
from adaptconv._version import __version__
from adaptconv.backends import BACKENDS
from adaptconv.backends.base import transformed
from adaptconv.backends.dense import Dense
from adaptconv.dispatch import Plan
from adaptconv.errors import BackendRejected, UnknownKnob
from adaptconv.pins import current_pin
from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Direction, Padding, Problem
from adaptconv.taps import TapPattern
from adaptconv.trilinear import (
    Plans,
    convolve,
    differentiated,
    execute,
    forward_problem,
    layout_of,
    plan_all,
    plans_from_text,
)

_LOG = logging.getLogger("adaptconv.ops")

AUTO = "auto:"  # before the digest of the database: a plan left to run time
OPAQUE = "opaque:"  # before a plan text: run it in an op of its own, out of Inductor's sight
_WATCHER: ContextVar[list[Plans] | None] = ContextVar("adaptconv_watcher", default=None)
_TORCHS: dict[int, Callable[..., Tensor]] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}

_LIBRARY = torch.library.Library("adaptconv", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(
    "conv(Tensor x, Tensor weight, Tensor? bias, str taps, SymInt[] stride, SymInt[] padding, int groups, str plan)"
    " -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(
    "direction(str direction, Tensor a, Tensor b, Tensor? bias, str taps, SymInt[] stride, SymInt[] padding,"
    " SymInt[] spatial, int groups, str layout, str plan) -> Tensor",
    tags=_TAGS,
)


def auto_plan() -> str:
    """The plan text that leaves the decision to later, named after everything that decision will rest on.

    Torch's caches on disk tell graphs apart by it, and a decision made while tracing is kept in them. So it names the
    rank too: how a DTensor is cut is traced into a graph, and the cache that AOTAutograd shares between processes does
    not know of it. A rank that took another's graph would answer wrong.
    """
    rank, world = ranks.rank_and_world()
    versions = [(backend.name, backend.version) for backend in BACKENDS]
    database, pin, threads = records.default_store().digest(), current_pin(), torch.get_num_threads()
    digest = hashlib.sha256(repr((__version__, versions, database, pin, threads)).encode()).hexdigest()[:16]
    return f"{AUTO}{digest}" + (f"@{rank}of{world}" if world > 1 else "")


# What torch.compiler.assume_constant_result sets; calling that would import dynamo, two seconds of it.
auto_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _pairs(padding: Sequence[int]) -> Padding:
    return tuple((padding[i], padding[i + 1]) for i in range(0, len(padding), 2))


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: str, stride: Sequence[int], padding: Sequence[int],
    groups: int, plan: str,
) -> Tensor:  # fmt: skip
    """adaptconv::conv, traced through: ``weight`` compact, ``padding`` as before, after an axis."""
    pattern = TapPattern.parse(taps)
    x, weight, bias = autocasted(x, weight, bias)
    if sharding.is_sharded(x, weight, bias):

        def local(a: Tensor, b: Tensor, c: Tensor | None, own_groups: int) -> Tensor:
            return _conv(a, b, c, taps, stride, padding, own_groups, plan)

        return sharding.convolve(local, pattern.axes, x, weight, bias, groups)  # type: ignore[arg-type]
    symbolic = any(not isinstance(extent, int) for extent in x.shape)
    if symbolic and (transformed() or _is_pinned_dense()):
        return _written_out(x, weight, bias, pattern, stride, _pairs(padding), groups)
    if (symbolic or plan.startswith(OPAQUE)) and not transformed():
        # Extents unknown while tracing are planned at run time, from the real ones.
        planned = auto_plan() if symbolic and not plan.startswith(AUTO) else plan
        result: Tensor = torch.ops.adaptconv.direction(
            str(Direction.FORWARD), x, weight, bias, taps, stride, padding, x.shape[2:], groups, layout_of(x, weight),
            planned,
        )  # fmt: skip
        return result
    problem = forward_problem(
        x, weight, pattern, stride, _pairs(padding), groups, bias is not None, layout_of(x, weight)
    )
    plans = _plans_of(problem, x, weight, plan)
    watcher = _WATCHER.get()
    if watcher is not None:
        watcher.append(plans)
    return convolve(plans, x, weight, bias)


@contextmanager
def watched() -> Iterator[list[Plans]]:
    """The plans of every ``adaptconv::conv`` that runs inside, as they come."""
    seen: list[Plans] = []
    token = _WATCHER.set(seen)
    try:
        yield seen
    finally:
        _WATCHER.reset(token)


def _is_pinned_dense() -> bool:
    pin = current_pin()
    return pin is not None and pin.backend == Dense.name


def _written_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: TapPattern, stride: Sequence[int], padding: Padding,
    groups: int,
) -> Tensor:  # fmt: skip
    """Dense-construct in torch operations that ask for no extent: what a graph for any size can be traced into."""
    grid, dilation = taps.single_grid(), (1,) * taps.axes
    if grid is not None and grid.extent == taps.window and taps.footprint is None:
        weight, dilation = weight.reshape(*weight.shape[:2], *grid.size), grid.dilation
    else:
        weight = _window(weight, taps)
    even = [before for before, _ in padding]
    if any(before != after for before, after in padding):
        x = torch.nn.functional.pad(x, [zeros for pair in reversed(padding) for zeros in pair])
        even = [0] * taps.axes
    return _TORCHS[taps.axes](x, weight, bias, stride, even, dilation, groups)


def _window(weight: Tensor, taps: TapPattern) -> Tensor:
    """A compact weight in its dense window, without an index tensor: torch.export before 2.15 loses those."""
    plain, entries = taps.spread()
    columns: dict[tuple[int, ...], Tensor] = {}
    for own, place, value in entries:
        column, where = weight.select(2, own), plain.offsets[place]
        column = column if value == 1 else column * value
        columns[where] = columns[where] + column if where in columns else column
    parts: list[Tensor] = []
    for hole, run in itertools.groupby(itertools.product(*map(range, taps.window)), lambda p: p not in columns):
        here = list(run)
        parts.append(
            weight.new_zeros((*weight.shape[:2], len(here))) if hole else torch.stack([columns[p] for p in here], 2)
        )
    return torch.cat(parts, 2).reshape(*weight.shape[:2], *taps.window)


def _plans_of(problem: Problem, x: Tensor, weight: Tensor, text: str) -> Plans:
    """The plans a graph carries, or today's where it carries none that fit.

    A plan made for the strides dynamo saw may name a layout that the strides met here do not offer.
    """
    if not text.startswith(AUTO):
        try:
            return plans_from_text(problem, text.removeprefix(OPAQUE))
        except (BackendRejected, UnknownKnob) as error:
            _LOG.warning("planning anew, the graph's plan does not fit: %s", error)
    grad = torch.is_grad_enabled()
    return plan_all(problem, grad and x.requires_grad, grad and weight.requires_grad)


def _problem_of(
    direction: Direction, a: Tensor, b: Tensor, bias: Tensor | None, taps: str, stride: Sequence[int],
    padding: Sequence[int], spatial: Sequence[int], groups: int, layout: str,
) -> Problem:  # fmt: skip
    c_out = b.shape[0] if direction is not Direction.GRAD_WEIGHT else b.shape[1]
    c_in = b.shape[1] * groups if direction is not Direction.GRAD_WEIGHT else a.shape[1]
    return Problem(
        direction, a.shape[0], c_in, c_out, groups, tuple(spatial), TapPattern.parse(taps), tuple(stride),
        _pairs(padding), str(a.dtype).removeprefix("torch."), layout, Device.of(a.device), bias is not None,
        fp32_precision(a.dtype, a.device), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _direction(direction: str, a: Tensor, b: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    *geometry, text = rest
    problem = _problem_of(Direction(direction), a, b, bias, *geometry)
    plan = dispatch.plan(problem) if text.startswith(AUTO) else _carried_plan(problem, text)
    result = execute(plan, a, b, bias)
    # Torch's weight gradient has the strides it was convolved in; the op promises contiguous ones.
    return result.contiguous() if problem.direction is Direction.GRAD_WEIGHT else result


@lru_cache(maxsize=4096)
def _carried_plan(problem: Problem, text: str) -> Plan:
    """The plan of a problem's direction in a graph's plan text."""
    return plans_from_text(problem.facing(Direction.FORWARD), text.removeprefix(OPAQUE)).of(problem.direction)


def _direction_transformed(direction: str, a: Tensor, b: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """adaptconv::direction under a transform of torch.func: the function that knows of them."""
    *geometry, text = rest
    problem = _problem_of(Direction(direction), a, b, bias, *geometry)
    forward = problem.facing(Direction.FORWARD)
    auto = text.startswith(AUTO)
    plans = plan_all(forward, False, False) if auto else plans_from_text(forward, text.removeprefix(OPAQUE))
    result = differentiated(plans, problem.direction, a, b, bias)
    return result.contiguous() if problem.direction is Direction.GRAD_WEIGHT else result


def _direction_fake(direction: str, a: Tensor, b: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    problem = _problem_of(Direction(direction), a, b, bias, *rest[:-1])
    if problem.direction is Direction.GRAD_WEIGHT:
        return a.new_empty(problem.weight_shape)
    forward = problem.direction is Direction.FORWARD
    shape = problem.output_shape if forward else problem.input_shape
    return a.new_empty(shape).contiguous(memory_format=problem.memory_format)


def _direction_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    direction, a, b, bias, *ctx.rest = inputs
    ctx.direction = Direction(direction)
    ctx.has_bias = bias is not None
    ctx.save_for_backward(a, b)


def _direction_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b, need_bias = ctx.needs_input_grad[1:4]

    def run(direction: Direction, left: Tensor, right: Tensor) -> Tensor:
        result: Tensor = torch.ops.adaptconv.direction(str(direction), left, right, None, *ctx.rest)
        return result

    wanted: dict[Direction, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        Direction.FORWARD: (lambda: run(Direction.GRAD_INPUT, g, b), lambda: run(Direction.GRAD_WEIGHT, a, g)),
        Direction.GRAD_INPUT: (lambda: run(Direction.FORWARD, g, b), lambda: run(Direction.GRAD_WEIGHT, g, a)),
        Direction.GRAD_WEIGHT: (lambda: run(Direction.GRAD_INPUT, b, g), lambda: run(Direction.FORWARD, a, g)),
    }
    first, second = wanted[ctx.direction]
    bias_grad = g.sum((0, *range(2, g.dim()))) if ctx.has_bias and need_bias else None
    return (None, first() if need_a else None, second() if need_b else None, bias_grad, *(None,) * len(ctx.rest))


_LIBRARY.impl("conv", _conv, "CompositeImplicitAutograd")
_LIBRARY.impl("direction", _direction, "CompositeExplicitAutograd")
# Under torch.func both run as Python at the top, where its transforms see every operation inside. Left to torch, vmap
# calls an op once an element and says so, grad refuses, and jvp drops the tangent.
_LIBRARY.impl("conv", _conv, "FuncTorchDynamicLayerFrontMode")
_LIBRARY.impl("direction", _direction_transformed, "FuncTorchDynamicLayerFrontMode")
torch.library.register_fake("adaptconv::direction", _direction_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "adaptconv::direction", _direction_backward, setup_context=_direction_setup, lib=_LIBRARY
)


def autocast_dtype(x: Any) -> torch.dtype | None:
    """What autocast, where it is on, narrows a convolution of this input to."""
    kind = x.device.type if isinstance(x, Tensor) else "meta"
    available = torch.amp.autocast_mode.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if available and torch.is_autocast_enabled(kind) else None


def autocasted(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Operands as torch's convolution would see them under autocast: narrowed unless float64."""
    dtype = autocast_dtype(x) if torch._C._is_any_autocast_enabled() else None
    if dtype is None:
        return x, w, bias

    def narrowed(t: Tensor) -> Tensor:
        if not isinstance(t, Tensor):  # refused later, with the rest
            return t
        return t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t

    return narrowed(x), narrowed(w), None if bias is None else narrowed(bias)
