"""Derivatives: gradcheck to second order, the torch ops' own checks, autocast, torch.func, frozen operands."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import adaptconv
from adaptconv import Kernel, TapPattern, ops, pinned
from adaptconv.backends import BACKENDS, Backend
from adaptconv.problem import Direction
from tests.cases import ON_CPU, Case, case

CONV: dict[int, Callable[..., Tensor]] = {1: adaptconv.conv1d, 2: adaptconv.conv2d, 3: adaptconv.conv3d}
SMALL = (
    case("1d", "3d2", (7,), channels=(2, 2), batch=2, stride=2, pad=2, bias=True),
    case("1d-partial", "1011101", (8,), channels=(2, 2), groups=2, batch=1, pad=3, bias=True),
    case("2d", "2x2d1x2", (3, 4), channels=(2, 4), groups=2, batch=2, pad=1, bias=True),
    case("2d-strided", "2x3", (5, 4), channels=(2, 2), batch=1, stride=(2, 1), pad=((0, 1), (1, 1))),
    case("2d-ring", "111/101/111", (4, 3), channels=(2, 2), groups=2, batch=1, pad=1, bias=True),
    case("2d-spread", "2x2d2x1*0.5,1,0.5x1,-0.5", (5, 4), channels=(2, 2), batch=1, pad=((3, 1), (1, 0)), bias=True),
    case("3d", "2x1x2", (2, 2, 3), channels=(1, 2), batch=1, pad=(1, 0, 0), bias=True),
    case("3d-corners", "10/00//00/01", (2, 3, 2), channels=(2, 1), batch=1, pad=((1, 0), (0, 1), (1, 0))),
)
SPREAD = next(c for c in SMALL if c.name == "2d-spread")
WAYS = (None, *ON_CPU)
ONE_GRID = tuple(way for way in WAYS if way is None or way.name not in ("dual", "factored", "cpp"))


def leaves(c: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    problem = c.problem(Direction.FORWARD)
    shapes = [problem.input_shape, problem.weight_shape, (c.c_out,)][: 3 if c.bias else 2]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def call(c: Case) -> Callable[..., Tensor]:
    """The case as a function of its tensors."""
    axes, taps = len(c.spatial), TapPattern.parse(c.taps)

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return CONV[axes](x, Kernel(w, taps), b, c.stride, c.padding, 1, c.groups)

    return run


def through(way: Backend | None) -> AbstractContextManager[None]:
    return nullcontext() if way is None else pinned(way.name)


def declines(way: Backend | None, c: Case) -> bool:
    return way is not None and any(way.rejects(c.problem(d)) is not None for d in Direction)


@pytest.mark.parametrize("c", SMALL, ids=lambda c: c.name)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name if way else "default")
def test_first_and_second_derivatives(way: Backend | None, c: Case) -> None:
    if declines(way, c):
        with pytest.raises(adaptconv.BackendRejected), through(way):
            call(c)(*leaves(c))
        return
    with through(way):
        assert gradcheck(call(c), leaves(c), fast_mode=True)
        assert gradgradcheck(call(c), leaves(c), fast_mode=True)


@pytest.mark.parametrize("config", ["layout=channels_last", "pad=explicit", "route"])
def test_second_derivatives_under_other_knobs(config: str) -> None:
    c = case("d", "3x3", (4, 5), channels=(2, 2), groups=2, batch=2, pad=1)
    knob, _, value = config.partition("=")
    for setting in [value] if value else ["adjoint", "grouped"]:
        declared = [d for d in Direction if any(setting in k.values for k in BACKENDS[0].space(c.problem(d)).knobs)]
        assert declared, setting
        if knob == "route":  # one name, another value in each direction: through the plan's own text
            routes = {d: setting if d in declared else "native" for d in Direction}
            config_of = {d: f"layout=asis,pad=implicit,route={route}" for d, route in routes.items()}
            config_of[Direction.FORWARD] = "layout=asis,pad=implicit"
            text = "|".join(f"native@1{{{config_of[d]}}}" for d in Direction)

            def run(x: Tensor, w: Tensor, text: str = text) -> Tensor:
                result: Tensor = torch.ops.adaptconv.conv(x, w, None, c.taps, [1, 1], [1, 1, 1, 1], 2, text)
                return result

            assert gradcheck(run, leaves(c), fast_mode=True)
            assert gradgradcheck(run, leaves(c), fast_mode=True)
            continue
        with pinned("native", **{knob: setting}):
            assert gradcheck(call(c), leaves(c), fast_mode=True)
            assert gradgradcheck(call(c), leaves(c), fast_mode=True)


# ---- the torch ops ---------------------------------------------------------------------------------

GATHERED = "|".join(["gather@1{workspace_mib=32}"] * 3)


def op_arguments(c: Case, plan: str, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
    flat = [zeros for pair in c.padding for zeros in pair]
    x, w, *bias = leaves(c, dtype)
    return (x, w, bias[0] if bias else None, c.taps, list(c.stride), flat, c.groups, plan)


@pytest.mark.parametrize("plan", ["auto", GATHERED], ids=["auto", "static"])
@pytest.mark.parametrize("c", [*SMALL[:5], SPREAD], ids=lambda c: c.name)
def test_the_op_passes_torchs_own_checks(c: Case, plan: str) -> None:
    text = ops.auto_plan() if plan == "auto" else plan
    torch.library.opcheck(torch.ops.adaptconv.conv.default, op_arguments(c, text))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("c", [SMALL[0], SMALL[2], SMALL[3], SMALL[4], SPREAD], ids=lambda c: c.name)
def test_the_direction_op_passes_torchs_own_checks(c: Case, direction: Direction, layout: str) -> None:
    axes = len(c.spatial)
    if layout == "channels_last" and axes != 2:
        return
    problem = c.problem(direction)
    shapes = {
        Direction.FORWARD: (problem.input_shape, problem.weight_shape),
        Direction.GRAD_INPUT: (problem.output_shape, problem.weight_shape),
        Direction.GRAD_WEIGHT: (problem.input_shape, problem.output_shape),
    }[direction]
    a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
    bias = torch.randn(c.c_out, requires_grad=True) if problem.bias else None
    flat = [zeros for pair in c.padding for zeros in pair]
    torch.library.opcheck(
        torch.ops.adaptconv.direction.default,
        (str(direction), a, b, bias, c.taps, list(c.stride), flat, list(c.spatial), c.groups, layout, ops.auto_plan()),
    )


def test_the_direction_op_has_derivatives_of_every_order() -> None:
    c = SMALL[4]
    flat = [zeros for pair in c.padding for zeros in pair]
    for direction in Direction:
        problem = c.problem(direction)
        shapes = {
            Direction.FORWARD: (problem.input_shape, problem.weight_shape),
            Direction.GRAD_INPUT: (problem.output_shape, problem.weight_shape),
            Direction.GRAD_WEIGHT: (problem.input_shape, problem.output_shape),
        }[direction]

        def run(a: Tensor, b: Tensor, direction: Direction = direction) -> Tensor:
            result: Tensor = torch.ops.adaptconv.direction(
                str(direction),
                a,
                b,
                None,
                c.taps,
                [1, 1],
                flat,
                list(c.spatial),
                c.groups,
                "contiguous",
                ops.auto_plan(),
            )
            return result

        operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        assert gradcheck(run, operands, fast_mode=True)
        assert gradgradcheck(run, operands, fast_mode=True)


@pytest.mark.parametrize("plan", ["", "native@1{}", "a|b", "-|-|-", "gather@1{workspace_mib=32}|-|-|-"])
def test_a_plan_that_cannot_be_read_is_refused_in_words(plan: str) -> None:
    x, w, bias, *rest = op_arguments(SMALL[2], plan)
    with pytest.raises(ValueError, match="plan"):
        torch.ops.adaptconv.conv(x, w, bias, *rest)


def test_a_plan_can_only_name_a_registered_backend() -> None:
    x, w, bias, *rest = op_arguments(SMALL[2], "nobody@1{}|-|-")
    with pytest.raises(ValueError, match="no backend is called 'nobody'; registered: native"):
        torch.ops.adaptconv.conv(x, w, bias, *rest)


@pytest.mark.parametrize(
    "choice", ["gather@1{workspace_mib=7}", "gather@1{}", "native@1{layout=asis,code=x}", "dual@1{}"]
)
def test_a_plan_that_does_not_fit_is_made_anew_and_said_so(choice: str, caplog: pytest.LogCaptureFixture) -> None:
    c = SMALL[2]
    x, w, bias, *rest = op_arguments(c, f"{choice}|-|-")
    y = torch.ops.adaptconv.conv(x, w, bias, *rest)
    torch.testing.assert_close(y, call(c)(x, w, bias))
    assert "does not fit" in caplog.text


# ---- what surrounds a call -----------------------------------------------------------------------


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ONE_GRID, ids=lambda way: way.name if way else "default")
def test_autocast_is_torchs(way: Backend | None, low: torch.dtype) -> None:
    x, w, b = torch.randn(2, 4, 9, 9), torch.randn(6, 4, 3, 3), torch.randn(6)
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    theirs_leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    with torch.autocast("cpu", dtype=low):
        with through(way):
            ours = adaptconv.conv2d(*leaves, padding=1)
        theirs = F.conv2d(*theirs_leaves, padding=1)
        wide = adaptconv.conv2d(x.double(), w.double(), b.double())
    assert ours.dtype is theirs.dtype is low
    assert wide.dtype is torch.float64
    tolerance = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours, theirs, **tolerance)
    ours.float().square().mean().backward()
    theirs.float().square().mean().backward()
    for mine, torchs in zip(leaves, theirs_leaves, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype is torch.float32
        torch.testing.assert_close(mine.grad, torchs.grad, **tolerance)


@pytest.mark.parametrize("c", SMALL, ids=lambda c: c.name)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name if way else "default")
def test_autocast_around_the_backward_alone_changes_nothing(way: Backend | None, c: Case) -> None:
    """Torch's own backward is exempt from autocast: what the forward met with counts."""
    if declines(way, c):
        return
    tensors = leaves(c, torch.float32)
    with through(way):
        plain = torch.autograd.grad(call(c)(*tensors).square().sum(), tensors)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autocast("cpu", enabled=False):
                loss = call(c)(*tensors).square().sum()
            inside = torch.autograd.grad(loss, tensors, create_graph=True)
            (again,) = torch.autograd.grad(inside[0].square().sum(), tensors[1])
        (twice,) = torch.autograd.grad(
            torch.autograd.grad(call(c)(*tensors).square().sum(), tensors, create_graph=True)[0].square().sum(),
            tensors[1],
        )
    for mine, theirs in zip((*inside, again), (*plain, twice), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("config", ["", "layout=channels_last", "pad=explicit"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name if way else "default")
def test_batches_of_gradients(way: Backend | None, config: str) -> None:
    """``is_grads_batched`` and ``vectorize`` go through torch's older vmap, which knows few operations."""
    c = SMALL[2] if way is None or way.name != "dual" else SMALL[4]
    if declines(way, c) or (config and (way is None or way.name != "native")):
        return
    x, w, bias = leaves(c)
    knobs = dict([config.split("=")]) if config else {}
    with pinned(way.name, **knobs) if way is not None else nullcontext():
        run = call(c)
        y = run(x, w, bias)
        g = torch.randn(3, *y.shape, dtype=y.dtype)
        together = torch.autograd.grad(y, (x, w, bias), g, is_grads_batched=True, retain_graph=True)
        for i in range(3):
            for mine, theirs in zip(
                together, torch.autograd.grad(y, (x, w, bias), g[i], retain_graph=True), strict=True
            ):
                torch.testing.assert_close(mine[i], theirs)

        def loss(x: Tensor, w: Tensor) -> Tensor:
            return run(x, w, bias).pow(3).sum()

        for vectorize in (True, False):
            blocks = torch.autograd.functional.hessian(loss, (x, w), vectorize=vectorize)
            flat = torch.cat([block.flatten() for row in blocks for block in row])
            if vectorize:
                kept = flat
        torch.testing.assert_close(kept, flat)


def test_a_layer_under_autocast_is_torchs() -> None:
    ours, theirs = adaptconv.AdaptiveConv2d(3, 4, 3), torch.nn.Conv2d(3, 4, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 6, 6)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.equal(ours(x), theirs(x))
    with torch.autocast("cpu", enabled=False):
        assert ours(x).dtype is torch.float32


@pytest.mark.parametrize("way", ONE_GRID, ids=lambda way: way.name if way else "default")
def test_torch_func(way: Backend | None) -> None:
    x, w = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)

    def loss(conv: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: conv(x, w, padding=1).square().sum()

    with through(way):
        mine = torch.func.grad(loss(adaptconv.conv1d), argnums=(0, 1))(x, w)
        each = torch.func.vmap(torch.func.grad(loss(adaptconv.conv1d), argnums=1), in_dims=(0, None))(x, w)
        mapped = torch.func.vmap(lambda v: adaptconv.conv1d(v, w))(x)
        _, pushed = torch.func.jvp(lambda v: adaptconv.conv1d(v, w), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(mine, torch.func.grad(loss(F.conv1d), argnums=(0, 1))(x, w))
    torch.testing.assert_close(
        each, torch.func.vmap(torch.func.grad(loss(F.conv1d), argnums=1), in_dims=(0, None))(x, w)
    )
    torch.testing.assert_close(mapped, F.conv1d(x, w))
    torch.testing.assert_close(pushed, F.conv1d(torch.ones_like(x), w))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name if way else "default")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "pinned"])
def test_vmap_over_memory_formats(way: Backend | None, layout: str) -> None:
    c = next(c for c in (case("vmap", "3x3", (6, 7), channels=(4, 4), groups=4, pad=1), SMALL[4], SPREAD)
             if not declines(way, c))  # fmt: skip
    tensors = leaves(c)
    x, w = tensors[0].detach(), tensors[1].detach()
    xs, ws = torch.stack([x, x + 1]), torch.stack([w, w - 1])
    if layout == "channels_last":
        xs = xs.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, xs.shape[:2])
    has_layouts = way is not None and way.name not in ("gather", "cpp")
    knobs = {"layout": "channels_last"} if layout == "pinned" and has_layouts else {}

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return call(c)(x, w).square().sum()

    with pinned(way.name, **knobs) if way is not None else nullcontext():
        mapped = torch.func.vmap(call(c))(xs, ws)
        grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(xs, ws)
    for i in range(2):
        torch.testing.assert_close(mapped[i], call(c)(xs[i], ws[i]))
        torch.testing.assert_close([g[i] for g in grads], list(torch.func.grad(loss, argnums=(0, 1))(xs[i], ws[i])))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name if way else "default")
@pytest.mark.parametrize("needs", list(itertools.product((0, 1), repeat=3)), ids=str)
def test_only_what_is_asked_for_gets_a_gradient(way: Backend | None, needs: tuple[int, int, int]) -> None:
    c = next(c for c in (SMALL[2], SMALL[4], SPREAD) if not declines(way, c))
    x, w, b = (t.detach().requires_grad_(bool(need)) for t, need in zip(leaves(c), needs, strict=True))
    with through(way):
        y = call(c)(x, w, b)
    assert y.requires_grad == any(needs)
    if not any(needs):
        return
    y.square().sum().backward()
    full = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    with pinned("dense"):
        call(c)(*full).square().sum().backward()
    for mine, right, need in zip((x, w, b), full, needs, strict=True):
        assert (mine.grad is not None) == bool(need)
        if need:
            torch.testing.assert_close(mine.grad, right.grad)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name if way else "default")
def test_without_grad(way: Backend | None) -> None:
    c = next(c for c in (SMALL[2], SMALL[4], SPREAD) if not declines(way, c))
    tensors = leaves(c)
    with through(way):
        right = call(c)(*tensors).detach()
        with torch.no_grad():
            quiet = call(c)(*tensors)
        with torch.inference_mode():
            inferred = call(c)(*tensors)
        after = call(c)(*tensors)  # nothing cached in inference mode may poison a later backward
    assert not quiet.requires_grad
    assert inferred.is_inference()
    assert torch.equal(quiet, right)
    assert torch.equal(inferred, right)
    after.sum().backward()
    assert tensors[0].grad is not None


def test_inference_mode_first_does_not_poison_training() -> None:
    taps = TapPattern.parse("1100/0010/0101")  # constants of this pattern are made here for the first time
    w = torch.randn(2, 2, len(taps), requires_grad=True)
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    for name in ("dense", "gather"):
        with pinned(name):
            with torch.inference_mode():
                adaptconv.conv2d(torch.randn(1, 2, 6, 6), Kernel(torch.randn(2, 2, len(taps)), taps))
            adaptconv.conv2d(x, Kernel(w, taps)).sum().backward()
    assert w.grad is not None
    assert x.grad is not None


def test_directions_are_planned_each_for_itself() -> None:
    x, w = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(4, 1, 3, 3, requires_grad=True)
    plans = ("native@1{layout=asis,pad=implicit}", "gather@1{workspace_mib=4}",
             "dense@1{layout=asis,pad=explicit,route=grouped}")  # fmt: skip
    text = "|".join(plans)
    y = torch.ops.adaptconv.conv(x, w.flatten(2), None, "3x3", [1, 1], [1, 1, 1, 1], 4, text)
    dy = torch.randn_like(y)
    mine = torch.autograd.grad(y, (x, w), dy)
    right = torch.autograd.grad(F.conv2d(x, w, padding=1, groups=4), (x, w), dy)
    torch.testing.assert_close(mine, right)


def test_a_hook_and_a_retained_graph_see_the_same_gradients() -> None:
    x, w = torch.randn(2, 3, 9, requires_grad=True), torch.randn(3, 3, 3, requires_grad=True)
    with pinned("gather"):
        y = adaptconv.conv1d(x, w)
    first = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, w))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name if way else "planned")
def test_the_answer_may_be_changed_in_place(way: Backend | None) -> None:
    """As a ReLU that works in place does after a convolution."""
    for c in SMALL:
        if declines(way, c):
            continue
        operands = leaves(c)
        with through(way):
            changed = F.relu_(call(c)(*operands))
            kept = F.relu(call(c)(*operands))
        assert torch.equal(changed, kept)
        ours, theirs = torch.autograd.grad(changed.sum(), operands), torch.autograd.grad(kept.sum(), operands)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
