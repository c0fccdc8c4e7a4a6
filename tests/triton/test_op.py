"""The op around the kernels: what it declines, what happens where a kernel fails, and what torch asks of an op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adaptconv
from adaptconv import dispatch, records
from adaptconv.backends import backend_named
from adaptconv.backends.triton import op, runtime
from adaptconv.dispatch import Source
from adaptconv.errors import BackendRejected, KernelWarning
from adaptconv.problem import Device, Direction
from tests.cases import case
from tests.triton.harness import DEVICE, INTERPRETED, RUNS, operands

GROUPED = case("grouped", "3x3d2x2", (9, 8), channels=(32, 32), pad=2, bias=True)
DEPTHWISE = case("depthwise", "11x11", (12, 13), channels=(4, 4), groups=4, pad=5)
OF = {"sparse": GROUPED, "depthwise": DEPTHWISE, "banded": DEPTHWISE}


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    """No test inherits another's failures."""
    yield
    runtime._failed.clear()
    op.compute_of.cache_clear()


# ---- declining ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OF)
def test_without_triton_or_a_gpu_it_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, problem = backend_named(name), OF[name].problem(Direction.FORWARD, torch.float16)
    monkeypatch.setattr(runtime, "interpreting", lambda: False)
    assert "are for GPUs" in str(backend.rejects(problem))
    monkeypatch.setattr(runtime, "interpreting", lambda: True)
    monkeypatch.setattr(runtime, "_uninstalled", lambda: None)
    monkeypatch.setattr(runtime, "_old_numpy", lambda: None)
    assert backend.rejects(problem) is None
    monkeypatch.setattr(runtime, "_uninstalled", lambda: "Triton is not installed")
    assert backend.rejects(problem) == "Triton is not installed"
    with adaptconv.pinned(name), pytest.raises(BackendRejected, match="Triton is not installed"):
        dispatch.plan(problem)


@pytest.mark.parametrize("name", OF)
def test_float64_is_declined(name: str) -> None:
    reason = backend_named(name).rejects(OF[name].problem(Direction.FORWARD, torch.float64))
    assert reason is not None
    assert "float64" in reason


@pytest.mark.parametrize("name", OF)
def test_no_prediction_chooses_an_interpreted_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "interpreting", lambda: True)
    problem = OF[name].problem(Direction.FORWARD, torch.float16)
    assert dispatch.plan(problem).choice.backend != name


# ---- failing ------------------------------------------------------------------------------------


def _broken(name: str) -> Callable[..., Tensor]:
    def compute(*_: Any) -> Tensor:
        raise RuntimeError("out of resource: shared memory")

    return compute


@RUNS
@pytest.mark.parametrize("name", OF)
def test_a_kernel_that_fails_is_answered_by_another_and_told_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "compute_of", _broken)
    problem = OF[name].problem(Direction.FORWARD, torch.float16)
    backend = backend_named(name)
    config = backend.space(problem).default
    x, w, bias = operands(problem)
    dense = backend_named("dense")
    right = dense.run(problem, dense.space(problem).default, x, w, bias)
    before = records.epoch()
    with pytest.warns(KernelWarning, match="out of resource"):
        first = backend.run(problem, config, x, w, bias)
    torch.testing.assert_close(first, right)
    torch.testing.assert_close(backend.run(problem, config, x, w, bias), right)  # without another warning
    assert records.epoch() > before, "plans made before are forgotten"
    here = replace(problem, device=Device.of(DEVICE))
    assert "out of resource" in str(backend.failure(here, config))
    choice = backend.default(here)
    with pytest.raises(BackendRejected, match="out of resource"):
        dispatch.plan_from_choice(here, choice, Source.PINNED, "in the graph")


@RUNS
def test_running_out_of_memory_is_the_callers_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(name: str) -> Callable[..., Tensor]:
        def compute(*_: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        return compute

    monkeypatch.setattr(op, "compute_of", exhausted)
    problem = GROUPED.problem(Direction.FORWARD, torch.float16)
    backend = backend_named("sparse")
    with pytest.raises(torch.OutOfMemoryError):
        backend.run(problem, backend.space(problem).default, *operands(problem))
    assert backend.failure(problem, backend.space(problem).default) is None


# ---- what torch asks of an op --------------------------------------------------------------------


def _arguments(name: str, direction: Direction) -> tuple[Any, ...]:
    problem = OF[name].problem(direction, torch.float16)
    backend = backend_named(name)
    a, b, bias = operands(problem)
    pads = [zeros for pair in problem.padding for zeros in pair]
    return (
        str(backend.default(problem)), str(direction), a, b, bias, problem.taps.text, list(problem.spatial),
        list(problem.stride), pads, problem.groups, problem.layout,
    )  # fmt: skip


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("name", OF)
def test_the_op_is_sound(name: str, direction: Direction) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.adaptconv.triton_taps, _arguments(name, direction), test_utils=tests)


@RUNS
def test_it_goes_through_vmap() -> None:
    x = torch.randn(2, 3, 4, 12, 13, device=DEVICE).half()
    w = torch.randn(4, 1, 11, 11, device=DEVICE).half()
    with adaptconv.pinned("depthwise"):
        many = torch.func.vmap(lambda one: adaptconv.conv2d(one, w, padding=5, groups=4))(x)
    right = torch.stack([F.conv2d(one.float(), w.float(), padding=5, groups=4) for one in x])
    torch.testing.assert_close(many.float(), right, rtol=2e-3, atol=2e-2)


# ---- through the public calls --------------------------------------------------------------------


def _layer(name: str) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    each = OF[name]
    generator = torch.Generator().manual_seed(0)
    size = (3, 3) if name == "sparse" else (11, 11)
    x = torch.randn((2, each.c_in, *each.spatial), generator=generator).to(DEVICE)
    w = torch.randn((each.c_out, each.c_in // each.groups, *size), generator=generator).to(DEVICE)
    settings: dict[str, Any] = {"groups": each.groups, "padding": 2 if name == "sparse" else 5}
    settings["dilation"] = 2 if name == "sparse" else 1
    return x, w, lambda x, w: adaptconv.conv2d(x, w, **settings), lambda x, w: F.conv2d(x, w, **settings)


@RUNS
@pytest.mark.parametrize("name", OF)
def test_both_orders_of_gradients_are_torchs(name: str) -> None:
    x, w, ours, theirs = _layer(name)
    dtype = torch.float16 if name == "banded" else torch.float32
    found = []
    for call, kind in ((ours, dtype), (theirs, torch.float64)):
        a, b = x.to(kind).requires_grad_(), w.to(kind).requires_grad_()
        pin = adaptconv.pinned(name) if call is ours else adaptconv.pinned("native")
        with pin:
            y = call(a, b)
            first = torch.autograd.grad(y.square().mean(), (a, b), create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b))
        found.append([t.detach().double() for t in (y, *first, *second)])
    for one, other in zip(*found, strict=True):
        error = (one - other).norm() / other.norm()
        assert error < (2e-2 if dtype is torch.float16 else 1e-5), error


@RUNS
@pytest.mark.parametrize("name", OF)
def test_a_compiled_call_keeps_it_as_one_node(name: str) -> None:
    x, w, ours, theirs = _layer(name)
    x, w = x.half(), w.half()
    with adaptconv.pinned(name):
        compiled = adaptconv.optimize(lambda a, b: torch.relu(ours(a, b)) * 2)
        y = compiled(x, w)
    right = torch.relu(theirs(x.double(), w.double())) * 2
    assert (y.double() - right).norm() / right.norm() < 2e-3


@RUNS
def test_autocast_narrows_what_it_gets() -> None:
    x, w, ours, theirs = _layer("sparse")
    with adaptconv.pinned("sparse"), torch.autocast(DEVICE.type, torch.bfloat16):
        y = ours(x, w)
    assert y.dtype is torch.bfloat16
    right = theirs(x.double(), w.double())
    assert (y.double() - right).norm() / right.norm() < 1e-2


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_the_interpreter_rounds_bfloat16_to_nearest_even() -> None:
    from adaptconv.backends.triton.interpreter import make_exact

    make_exact()
    import triton
    import triton.language as tl

    @triton.jit
    def product(a, b, c, n: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, n)
        place = i[:, None] * n + i[None, :]
        tl.store(c + place, tl.dot(tl.load(a + place), tl.load(b + place)).to(tl.bfloat16))

    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    c = torch.empty(32, 32, dtype=torch.bfloat16)
    product[(1,)](a, b, c, 32)
    assert torch.equal(c, (a.double() @ b.double()).bfloat16())


@RUNS
@pytest.mark.parametrize("name", OF)
def test_a_bias_may_have_any_stride(name: str) -> None:
    problem = replace(OF[name].problem(Direction.FORWARD, torch.float16), bias=True)
    a, b, bias = operands(problem)
    assert bias is not None
    backend = backend_named(name)
    run = partial(backend.run, problem, backend.space(problem).default, a, b)
    apart = torch.stack((bias, bias + 1), dim=1)[:, 0]
    assert not apart.is_contiguous()
    assert torch.equal(run(apart), run(bias))
    one = bias[:1].expand(problem.c_out)
    assert torch.equal(run(one), run(one.contiguous()))
