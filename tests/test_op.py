"""The torch.library ops by themselves: torch's own checks, derivatives and torch.func, whatever plan they carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import adaptconv
from adaptconv import TapPattern, ops, pinned, trilinear
from adaptconv.compile import rewrite as rewrite  # defines adaptconv::place
from adaptconv.problem import Direction
from tests.cases import ON_CPU, Case, case

GRID = case("grid", "2x2d1x2", (3, 4), channels=(2, 2), groups=2, batch=2, pad=1, bias=True)
RING = case("ring", "111/101/111", (4, 3), channels=(2, 2), groups=2, batch=1, pad=1, bias=True)
SPREAD = case("spread", "2x2d2x1*0.5,1,0.5x1,-0.5", (5, 4), channels=(2, 2), batch=1, pad=((3, 1), (1, 0)), bias=True)
NAMES = tuple(backend.name for backend in ON_CPU)
CARRIED = (*NAMES, f"{ops.OPAQUE}native", f"{ops.OPAQUE}dual", "auto")


def flat(c: Case) -> list[int]:
    return [zeros for pair in c.padding for zeros in pair]


def problem_of(c: Case, dtype: torch.dtype) -> Any:
    return c.problem(Direction.FORWARD, dtype)


def text_of(carried: str, c: Case, dtype: torch.dtype) -> str:
    """The plan text under which a case runs: by one backend, in the graph or apart from it, or left to run time."""
    if carried == "auto":
        return ops.auto_plan()
    with pinned(carried.removeprefix(ops.OPAQUE)):
        text = trilinear.plan_all(problem_of(c, dtype), True, True).text
    return f"{ops.OPAQUE}{text}" if carried.startswith(ops.OPAQUE) else text


def served(carried: str) -> Case:
    """A case that the backend takes in every direction."""
    backends = [b for b in ON_CPU if b.name == carried.removeprefix(ops.OPAQUE)]
    every = [c for c in (GRID, RING, SPREAD) if not any(b.rejects(c.problem(d)) for b in backends for d in Direction)]
    return every[-1 if "factored" in carried else 0]


def operands(c: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    problem = problem_of(c, dtype)
    shapes = (problem.input_shape, problem.weight_shape, (c.c_out,))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def op(c: Case, text: str) -> Callable[..., Tensor]:
    """adaptconv::conv of a case as a function of its tensors."""

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        result: Tensor = torch.ops.adaptconv.conv(x, w, b, c.taps, list(c.stride), flat(c), c.groups, text)
        return result

    return run


def right(c: Case) -> Callable[..., Tensor]:
    """The same in torch's operations alone, the kernel written out."""
    taps = TapPattern.parse(c.taps)

    def run(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        padded = F.pad(x, [zeros for pair in reversed(c.padding) for zeros in pair])
        return F.conv2d(padded, adaptconv.Kernel(w, taps).dense(), b, c.stride, groups=c.groups)

    return run


# ---- torch's own checks --------------------------------------------------------------------------


@pytest.mark.parametrize("carried", [name for name in CARRIED if name not in ("gather", "auto")])
def test_the_op_passes_torchs_checks_whatever_it_carries(carried: str) -> None:
    c = served(carried)
    rest = (c.taps, list(c.stride), flat(c), c.groups, text_of(carried, c, torch.float32))
    torch.library.opcheck(torch.ops.adaptconv.conv.default, (*operands(c, torch.float32), *rest))


@pytest.mark.parametrize("carried", CARRIED)
def test_the_op_has_first_and_second_derivatives(carried: str) -> None:
    c = served(carried)
    run = op(c, text_of(carried, c, torch.float64))
    assert gradcheck(run, operands(c), fast_mode=True, check_forward_ad=not carried.startswith(("opaque", "auto")))
    assert gradgradcheck(run, operands(c), fast_mode=True)


@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_direction_by_itself_carries_a_plan(name: str, direction: Direction) -> None:
    c = served(name)
    x, w, _ = operands(c)
    dy = right(c)(*operands(c)).detach().requires_grad_()
    a, b = {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}[direction]
    text = text_of(name, c, torch.float64)
    rest = (c.taps, list(c.stride), flat(c), list(c.spatial), c.groups, "contiguous", text)
    if name in ("gather", "dual"):  # it takes seconds
        torch.library.opcheck(torch.ops.adaptconv.direction.default, (str(direction), a, b, None, *rest))

    def run(a: Tensor, b: Tensor) -> Tensor:
        result: Tensor = torch.ops.adaptconv.direction(str(direction), a, b, None, *rest)
        return result

    assert gradcheck(run, (a, b), fast_mode=True)
    assert gradgradcheck(run, (a, b), fast_mode=True)


def test_placing_columns_passes_torchs_checks() -> None:
    weight = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    columns = [1, -1, 0, -1]
    torch.library.opcheck(torch.ops.adaptconv.place.default, (weight, columns))
    assert gradcheck(lambda w: torch.ops.adaptconv.place(w, columns), weight)
    assert gradgradcheck(lambda w: torch.ops.adaptconv.place(w, columns), weight)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cpp"])
def test_a_plan_of_torch_operations_asks_the_host_for_nothing(name: str) -> None:
    """Neither forward nor backward reads a value or moves data: what CUDA graphs need."""
    c = served(name)
    run = op(c, text_of(name, c, torch.float64))

    def step(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        y = run(x, w, b)
        return (y, *torch.autograd.grad(y.square().sum(), (x, w, b)))

    graph = make_fx(step, tracing_mode="fake")(*operands(c)).graph
    called = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert len(called) > 3
    asks = ("_local_scalar_dense", "item", "nonzero", "_to_copy", "is_nonzero", "equal.default", "unique")
    assert not [target for target in called if any(f"aten.{word}" in target for word in asks)]


# ---- torch.func ----------------------------------------------------------------------------------


@pytest.fixture
def _no_fallback() -> Iterator[None]:
    """Vmap refuses an op it has no rule for, instead of calling it once an element."""
    before = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(before)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: grad(lambda *t: f(*t).square().sum(), (0, 1, 2)),
    "grad of grad": lambda f: grad(lambda *t: grad(lambda *s: f(*s).pow(3).sum(), 1)(*t).sum(), (0, 1)),
    "jacrev": lambda f: jacrev(f, (0, 1, 2)),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "hessian": lambda f: jacrev(grad(lambda *t: f(*t).square().sum(), 1), 1),
    "jvp": lambda f: lambda x, w, b: jvp(f, (x, w, b), (x + 1, w - 1, 2 * b)),
    "forward over reverse": lambda f: lambda x, w, b: jvp(grad(lambda v: f(x, v, b).square().sum()), (w,), (w + 1,)),
}


@pytest.mark.usefixtures("_no_fallback")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("carried", ["native", "gather", "cpp", "opaque:dual", "auto"])
def test_derivatives_by_torch_func(carried: str, transform: str) -> None:
    c = served(carried)
    tensors = [t.detach() for t in operands(c)]
    mine = TRANSFORMS[transform](op(c, text_of(carried, c, torch.float64)))(*tensors)
    torch.testing.assert_close(mine, TRANSFORMS[transform](right(c))(*tensors))


IN_DIMS = [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0), (2, None, None), (-1, 1, 0)]


@pytest.mark.usefixtures("_no_fallback")
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("carried", ["native", "gather", "cpp", "opaque:dual", "auto"])
def test_vmap_over_any_operand(carried: str, in_dims: tuple[int | None, ...]) -> None:
    c = served(carried)
    run = op(c, text_of(carried, c, torch.float64))
    many = [t.detach() if dim is None else torch.stack([t.detach(), t.detach() - 1, 2 * t.detach()], dim)
            for t, dim in zip(operands(c), in_dims, strict=True)]  # fmt: skip
    torch.testing.assert_close(vmap(run, in_dims, 1)(*many), vmap(right(c), in_dims, 1)(*many))

    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: f(*t).square().sum()

    each = vmap(grad(loss(run), (0, 1, 2)), in_dims)(*many)
    torch.testing.assert_close(each, vmap(grad(loss(right(c)), (0, 1, 2)), in_dims)(*many))


@pytest.mark.usefixtures("_no_fallback")
@pytest.mark.parametrize("carried", ["native", "gather", "cpp", "opaque:dual", "auto"])
def test_vmap_in_vmap(carried: str) -> None:
    c = served(carried)
    x, w, b = (t.detach() for t in operands(c))
    xs, ws, bs = torch.stack([x, x - 1]), torch.stack([w, w + 1, -w]), torch.stack([b, b + 1, -b])

    def nested(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        result: Callable[..., Tensor] = vmap(vmap(f, (0, None, None)), (None, 0, 0))
        return result

    run = op(c, text_of(carried, c, torch.float64))
    torch.testing.assert_close(nested(run)(xs, ws, bs), nested(right(c))(xs, ws, bs))


@pytest.mark.usefixtures("_no_fallback")
def test_gradients_of_a_layer_sample_by_sample() -> None:
    layer = adaptconv.AdaptiveConv1d(4, 4, taps="10111", padding=2)
    values, x = dict(layer.named_parameters()), torch.randn(3, 4, 9)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        result: Tensor = functional_call(layer, parameters, (sample[None],)).square().sum()
        return result

    each = vmap(grad(loss), (None, 0))(values, x)
    for i in range(3):
        alone = torch.autograd.grad(layer(x[i : i + 1]).square().sum(), tuple(values.values()))
        for name, gradient in zip(values, alone, strict=True):
            torch.testing.assert_close(each[name][i], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_forward_mode_in_eager_calls(name: str | None, frozen: bool) -> None:
    """A kernel that knows nothing of tangents must not lose them, also where no gradient is asked for."""
    c = served(name or "native")
    x, w, b = (t.detach().requires_grad_(not frozen) for t in operands(c))
    taps = TapPattern.parse(c.taps)

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return adaptconv.conv2d(x, adaptconv.Kernel(w, taps), b, c.stride, c.padding, 1, c.groups)

    through: AbstractContextManager[None] = nullcontext() if name is None else pinned(name)
    tangents = (x.detach() + 1, w.detach() - 1, 2 * b.detach())
    with through:
        mine = jvp(ours, (x, w, b), tangents)
        torch.testing.assert_close(mine, jvp(right(c), (x, w, b), tangents))
        only_bias = jvp(lambda b: ours(x, w, b), (b,), tangents[2:])
        torch.testing.assert_close(only_bias, jvp(lambda b: right(c)(x, w, b), (b,), tangents[2:]))
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, tangent) for t, tangent in zip((x, w, b), tangents, strict=True)]
            pushed = forward_ad.unpack_dual(ours(*duals)).tangent
    torch.testing.assert_close(pushed, mine[1])


@pytest.mark.parametrize("c", [GRID, RING, SPREAD], ids=lambda c: c.name)
def test_extents_unknown_under_a_transform_are_written_out(c: Case) -> None:
    """What plans at run time cannot run under torch.func; dense-construct asks for no extent."""
    x, w, b = (t.detach() for t in operands(c))
    x = torch.cat([x] * 5)  # extents that are equal would be one symbol
    run, torchs = op(c, ops.auto_plan()), right(c)

    def step(x: Tensor, w: Tensor, b: Tensor) -> Any:
        return grad(lambda v: run(x, v, b).square().sum())(w)

    graph = make_fx(step, tracing_mode="symbolic")(x, w, b)
    assert not [node for node in graph.graph.nodes if "adaptconv" in str(node.target)]
    for batch in (x, torch.cat([x, 2 * x])):
        expected = grad(lambda v, batch=batch: torchs(batch, v, b).square().sum())(w)
        torch.testing.assert_close(graph(batch, w, b), expected)
