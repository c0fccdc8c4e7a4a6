"""A convolution as one differentiable function over three planned directions.

It is a trilinear form in (x, w, dy): each direction is the derivative of the others, so one
``autograd.Function`` serves all three and derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adaptconv import dispatch
from adaptconv.backends import Choice
from adaptconv.backends.base import laid_out
from adaptconv.backends.native import Native, is_plain
from adaptconv.dispatch import Plan, Source
from adaptconv.errors import ConvArgumentError
from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Direction, Padding, Problem
from adaptconv.taps import TapPattern

_NATIVE = Native()
_autocast = torch._C._is_any_autocast_enabled
_batched = torch._C._functorch.is_legacy_batchedtensor


@dataclass(frozen=True, slots=True)
class Plans:
    """The plans of one convolution: forward, and each gradient that will be asked for."""

    forward: Plan
    grad_input: Plan | None = None
    grad_weight: Plan | None = None

    def of(self, direction: Direction) -> Plan:
        """The plan of a direction, decided now if it was not asked for before (double backward)."""
        if direction is Direction.FORWARD:
            return self.forward
        decided = self.grad_input if direction is Direction.GRAD_INPUT else self.grad_weight
        return decided or dispatch.plan(self.forward.problem.facing(direction))

    @property
    def plain(self) -> bool:
        """Whether torch's own call, forward and backward, is what was planned."""
        return all(p is None or p.plain for p in (self.forward, self.grad_input, self.grad_weight))

    @property
    def text(self) -> str:
        """Canonical text of all three, '-' where a direction has no plan."""
        return "|".join("-" if p is None else p.text for p in (self.forward, self.grad_input, self.grad_weight))


def plan_all(forward: Problem, grad_input: bool, grad_weight: bool) -> Plans:
    """Plan each direction that is needed, independently."""
    return Plans(
        dispatch.plan(forward),
        dispatch.plan(forward.facing(Direction.GRAD_INPUT)) if grad_input else None,
        dispatch.plan(forward.facing(Direction.GRAD_WEIGHT)) if grad_weight else None,
    )


# What Python adds to an eager call that leaves torch's own, in microseconds, where the processor's caches have lost it
# as they do amid a network: thirty 1-D layers in a row took 11 to 36 longer each than the sum of what their kernels do,
# and 136 to 300 in a training step, in which torch answers both gradients in one call without Python.
_LEAVING_US = 15.0
_GRADIENT_US = 65.0  # each


def worth_leaving(plans: Plans) -> Plans:
    """The plans of an eager call: torch's own for all directions where leaving it gains less than it costs Python.

    On a CPU, and where the gains are known; on a GPU Python runs ahead of the kernels.
    """
    planned = [plan for plan in (plans.forward, plans.grad_input, plans.grad_weight) if plan is not None]
    gains_us = [plan.gain_us for plan in planned if not plan.plain]
    known_us = [gain_us for gain_us in gains_us if gain_us is not None]
    cost_us = _LEAVING_US + _GRADIENT_US * (len(planned) - 1)
    on_cpu = plans.forward.problem.device.kind == "cpu"
    if not gains_us or len(known_us) < len(gains_us) or sum(known_us) >= cost_us or not on_cpu:
        return plans
    why = f"all directions together gain {sum(known_us):.0f} us, which would cost {cost_us:.0f} us of Python"
    own = {plan.problem.direction: _torchs_own(plan, why) for plan in planned}
    if not all(plan.plain for plan in own.values()):
        return plans
    return Plans(own[Direction.FORWARD], own.get(Direction.GRAD_INPUT), own.get(Direction.GRAD_WEIGHT))


def _torchs_own(plan: Plan, why: str) -> Plan:
    choice = _NATIVE.default(plan.problem)
    plain = not _NATIVE.rejects(plan.problem) and is_plain(plan.problem, choice)
    return Plan(plan.problem, choice, plan.source, f"{plan.why}; {why}", gain_us=0.0, plain=plain)


def plans_from_text(forward: Problem, text: str) -> Plans:
    """Read ``Plans.text`` back for a problem, checked against this process's backends."""
    parts = text.split("|")
    if len(parts) != 3:
        raise ConvArgumentError(f"a plan text has three parts, 'forward|grad_input|grad_weight'; got {text!r}")
    read = [
        None
        if part == "-"
        else dispatch.plan_from_choice(forward.facing(direction), Choice.parse(part), Source.PINNED, "in the graph")
        for direction, part in zip(Direction, parts, strict=True)
    ]
    if read[0] is None:
        raise ConvArgumentError(f"a plan text needs a forward plan; got {text!r}")
    return Plans(read[0], read[1], read[2])


def execute(plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run a plan; empty operands are answered here, so that no backend meets one."""
    if a.numel() == 0 or b.numel() == 0:
        return _empty(plan.problem, a, bias)
    if _autocast():  # the operands are what they should be; a backward may run where the forward was exempt from it
        with torch._C._DisableAutocast():
            return plan.call(a, b, bias)
    return plan.call(a, b, bias)


def _empty(problem: Problem, like: Tensor, bias: Tensor | None) -> Tensor:
    shape = {
        Direction.FORWARD: problem.output_shape,
        Direction.GRAD_INPUT: problem.input_shape,
        Direction.GRAD_WEIGHT: problem.weight_shape,
    }[problem.direction]
    result = like.new_zeros(shape)
    if bias is not None:
        result = result + bias.reshape(-1, *(1,) * problem.axes)
    if problem.direction is Direction.GRAD_WEIGHT:
        return result
    return laid_out(result, problem.memory_format)


def _owned(result: Tensor) -> Tensor:
    """The result without the tensor it is a view of: who gets it may change it in place, as autograd does to add up."""
    return result.detach() if result._is_view() else result


class _Trilinear(torch.autograd.Function):
    """One direction of a convolution; its derivatives are the other two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(plans: Plans, direction: Direction, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        return _owned(execute(plans.of(direction), a, b, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.plans, ctx.direction, a, b, bias = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        """Forward-mode: the form is linear in each operand."""
        a, b = ctx.saved_tensors
        da, db, dbias = tangents[2:]
        parts: list[Tensor] = []
        if da is not None:
            parts.append(differentiated(ctx.plans, ctx.direction, da, b, None))
        if db is not None:
            parts.append(differentiated(ctx.plans, ctx.direction, a, db, None))
        if dbias is not None:
            problem: Problem = ctx.plans.forward.problem
            everywhere = dbias.reshape(-1, *(1,) * problem.axes).expand(problem.output_shape)
            parts.append(everywhere if parts else laid_out(everywhere, problem.memory_format))
        return sum(parts[1:], parts[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        need_a, need_b, need_bias = ctx.needs_input_grad[2:]
        apply = differentiated
        da: Tensor | None
        db: Tensor | None
        plans: Plans = ctx.plans
        if ctx.direction is Direction.FORWARD:  # a = x, b = w, g = dy
            bias_grad = g.sum((0, *range(2, g.dim()))) if ctx.has_bias and need_bias else None
            if need_a and need_b and _both_plain(plans):
                da, db = _native_backward(plans.forward.problem, g, a, b)
                return None, None, da, db, bias_grad
            da = apply(plans, Direction.GRAD_INPUT, g, b, None) if need_a else None
            db = apply(plans, Direction.GRAD_WEIGHT, a, g, None) if need_b else None
            return None, None, da, db, bias_grad
        if ctx.direction is Direction.GRAD_INPUT:  # a = dy, b = w, g = grad of dx
            da = apply(plans, Direction.FORWARD, g, b, None) if need_a else None
            db = apply(plans, Direction.GRAD_WEIGHT, g, a, None) if need_b else None
            return None, None, da, db, None
        # GRAD_WEIGHT: a = x, b = dy, g = grad of dw
        da = apply(plans, Direction.GRAD_INPUT, b, g, None) if need_a else None
        db = apply(plans, Direction.FORWARD, a, g, None) if need_b else None
        return None, None, da, db, None


# Function.apply inspects forward's signature at every call, 15 us of it, to fill in defaults; ours has none.
_APPLY_BELOW: Callable[..., Tensor] = super(torch.autograd.Function, _Trilinear).apply


def differentiated(plans: Plans, direction: Direction, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """Apply the function; under a torch.func transform by the long way, which knows of transforms."""
    if torch._C._are_functorch_transforms_active():
        result: Tensor = _Trilinear.apply(plans, direction, a, b, bias)
        return result
    if _batched(a) or _batched(b):
        return _one_by_one(plans, direction, a, b, bias)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:  # as in most backwards: nobody will ask for more
        return _owned(execute(plans.of(direction), a, b, bias))
    return _APPLY_BELOW(plans, direction, a, b, bias)


def _one_by_one(plans: Plans, direction: Direction, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """A batch of gradients, as ``is_grads_batched`` and ``vectorize`` make it: by torch's older vmap.

    It has no rules for much of what backends do, and no function of torch.func knows of it.
    """
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    while level > 0:  # an operand that has no batch at a level comes back with one of size 1
        lefts, rights = (torch._remove_batch_dim(t, level, 1, 0) for t in (a, b))
        size = max(lefts.shape[0], rights.shape[0])
        if size != 1:
            pairs = zip(lefts.expand(size, *lefts.shape[1:]), rights.expand(size, *rights.shape[1:]), strict=True)
            results = [differentiated(plans, direction, left, right, bias) for left, right in pairs]
            return torch._add_batch_dim(torch.stack(results), 0, level)
        a, b, level = lefts[0], rights[0], level - 1
    return _APPLY_BELOW(plans, direction, a, b, bias)


def _both_plain(plans: Plans) -> bool:
    return all(p is not None and p.plain for p in (plans.grad_input, plans.grad_weight))


def _native_backward(problem: Problem, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients in torch's one call; itself differentiable."""
    grid = problem.taps.single_grid()
    assert grid is not None, "a plain plan is a single grid"
    padding = [before for before, _ in problem.padding]
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, w.reshape(*w.shape[:2], *grid.size), None, problem.stride, padding, grid.dilation, False,
        [0] * problem.axes, problem.groups, (True, True, False),
    )  # fmt: skip
    return dx, dw.flatten(2)


def executor(plans: Plans) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """What convolves ``x [N, C_in, *spatial]`` with a compact ``w [C_out, C_in/groups, T]`` by these plans.

    All that can be settled once is settled here; the result is differentiable in the directions planned.
    """
    if plans.plain:
        return plans.forward.call

    def differentiable(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return differentiated(plans, Direction.FORWARD, x, w, bias)

    def inference(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        asked = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if asked or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return differentiable(x, w, bias)  # a kernel of ours knows nothing of tangents
        return _owned(execute(plans.forward, x, w, bias))

    return differentiable if plans.grad_input or plans.grad_weight else inference


def convolve(plans: Plans, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve once by these plans; see ``executor``."""
    return executor(plans)(x, w, bias)


# ---- memory formats ------------------------------------------------------------------------------


def suggests_channels_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Torch's own test of whether strides read as channels_last (4 or 5 dimensions)."""
    order = (1, 3, 2, 0) if len(shape) == 4 else (1, 4, 3, 2, 0)
    if len(shape) < 4 or strides[1] == 0:
        return False
    least = 0
    for d in order:
        if shape[d] == 0 or strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * max(shape[d], 1)
    return True


def layout_of(x: Tensor, w: Tensor) -> str:
    """Layout of a problem: channels_last if the input is, "mixed" if only the weight is.

    A compact weight ``[C_out, C_in/groups, T]`` counts as channels_last when its channels are
    adjacent and its taps are not.
    """
    if suggests_channels_last(x.shape, x.stride()):
        return "channels_last"
    if x.dim() < 4:
        return "contiguous"
    if w.dim() == 3:
        adjacent = w.stride(1) == 1 and w.shape[1] > 1 and w.stride(2) == w.shape[1] and w.shape[2] > 1
        return "mixed" if adjacent else "contiguous"
    return "mixed" if suggests_channels_last(w.shape, w.stride()) else "contiguous"


def forward_problem(
    x: Tensor, w: Tensor, taps: TapPattern, stride: Sequence[int], padding: Padding, groups: int,
    bias: bool, layout: str,
) -> Problem:  # fmt: skip
    """The FORWARD problem of batched operands, in the layout in which torch would answer them."""
    known = all(isinstance(extent, int) for extent in x.shape)
    if x.dim() == 5 and layout != "contiguous" and known and _answers_contiguous(x, w, taps, stride, padding, groups):
        layout = "contiguous"
    return Problem(
        Direction.FORWARD, x.shape[0], x.shape[1], w.shape[0], groups, tuple(x.shape[2:]), taps, tuple(stride), padding,
        str(x.dtype).removeprefix("torch."), layout, Device.of(x.device), bias,
        fp32_precision(x.dtype, x.device), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


_SLOW_3D = (torch._C._ConvBackend.Slow3d, torch._C._ConvBackend.SlowDilated3d)  # type: ignore[attr-defined]


def _answers_contiguous(
    x: Tensor, w: Tensor, taps: TapPattern, stride: Sequence[int], padding: Padding, groups: int
) -> bool:
    """Whether torch would run this 3-D convolution by its own loops, which know no channels_last."""
    grid = taps.single_grid()
    size: tuple[int, ...] = taps.window
    dilation: tuple[int, ...] = (1, 1, 1)
    if grid is not None and grid.extent == taps.window:
        size, dilation = grid.size, grid.dilation
    weight = w.new_empty(1).expand(*w.shape[:2], *size)  # only its shape is read
    geometry = (list(stride), [max(pair) for pair in padding], list(dilation), False, [0] * 3, groups)
    return torch._C._select_conv_backend(x, weight, None, *geometry, None) in _SLOW_3D
