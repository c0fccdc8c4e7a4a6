"""Where an optimized model is used: control flow, checkpointing, graph breaks, autocast, torch.func."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import adaptconv
from adaptconv.compile import inductor
from adaptconv.compile.optimize import forget_compiled, log_of


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run rewritten graphs as they are: Inductor takes seconds."""
    monkeypatch.setattr(inductor, "_missing_toolchain", lambda inputs: "a test asked for it")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs uncompiled")
        yield


def hole(dilation: int = 2, **options: Any) -> nn.Conv1d:
    return nn.Conv1d(4, 4, 3, padding=dilation, dilation=dilation, **options)


class Two(nn.Module):
    """Two dilated convolutions; subclasses say how they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = hole(2), hole(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.other(F.relu(self.one(x)))
        return result


def check(net: nn.Module, x: Tensor, where: set[str], tolerance: float = 1e-4, **options: Any) -> Any:
    """Under a pin every site named is rewritten, and values and gradients stay; the log."""
    with adaptconv.pinned("gather"):
        fast = adaptconv.optimize(net, **options)
        ours = fast(x)
    theirs = net(x)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    log = log_of(fast)
    assert log is not None
    assert {site.where for site in log.sites if site.rewritten} == where
    assert all(str(site.plans.forward.choice).startswith("gather@") for site in log.sites if site.rewritten)
    if ours.requires_grad:
        mine = _gradients(net, ours)
        for a, b in zip(mine, _gradients(net, theirs), strict=True):
            torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)
    return log


def _gradients(net: nn.Module, y: Tensor) -> list[Tensor]:
    net.zero_grad()
    y.float().square().mean().backward()  # not autograd.grad: reentrant checkpoints refuse that
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


# ---- graphs in graphs ----------------------------------------------------------------------------


class Checkpointed(Two):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(super().forward, x, use_reentrant=self.reentrant)
        return result + x


@pytest.mark.parametrize(("reentrant", "dynamic"), [(True, False), (False, True)])
def test_activation_checkpointing(reentrant: bool, dynamic: bool) -> None:
    net = Checkpointed()
    net.reentrant = reentrant
    check(net, torch.randn(2, 4, 32, requires_grad=True), {"one", "other"}, dynamic=dynamic)


class Branches(Two):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda x: self.one(x).relu(), lambda x: self.other(x).sin(), (x,))
        return result


class Repeated(Two):
    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.while_loop import while_loop

        def body(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, self.one(x).tanh()

        result: Tensor = while_loop(lambda i, x: i < 3, body, (torch.tensor(0), x))[1]
        return result


class Scanned(Two):
    def forward(self, x: Tensor) -> Tensor:
        from torch._higher_order_ops.scan import scan

        def step(carried: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            y = self.one(carried + row).tanh()
            return y, y.clone()

        result: Tensor = scan(step, torch.zeros_like(x[:1]), x[:, None])[1]
        return result


@pytest.mark.usefixtures("_uncompiled")
def test_both_branches_of_a_condition() -> None:
    net = Branches()
    for x in (torch.rand(2, 4, 32), -torch.rand(2, 4, 32)):
        check(net, x, {"one", "other"})
        forget_compiled()


@pytest.mark.usefixtures("_uncompiled")
def test_the_bodies_of_loops() -> None:
    with torch.no_grad():
        check(Repeated(), torch.randn(2, 4, 32), {"one"})
    check(Scanned(), torch.randn(3, 4, 16), {"one"})


def test_a_region_compiled_once() -> None:
    class Regions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([hole() for _ in range(3)])

        @torch.compiler.nested_compile_region
        def block(self, layer: nn.Module, x: Tensor) -> Tensor:
            result: Tensor = layer(x).relu()
            return result

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self.block(layer, x)
            return x

    check(Regions(), torch.randn(2, 4, 32, requires_grad=True), {"layers.0"})  # the three share its code


class Broken(Two):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        torch._dynamo.graph_break()
        result: Tensor = self.other(x)
        return result


@pytest.mark.usefixtures("_uncompiled")
def test_a_graph_break_makes_two_graphs_in_one_report() -> None:
    log = check(Broken(), torch.randn(2, 4, 32), {"one", "other"})
    assert log.graphs == 2
    forget_compiled()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        adaptconv.optimize(Broken(), fullgraph=True)(torch.randn(2, 4, 32))


class Mixed(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.one(x)
            with torch.autocast("cpu", enabled=False):
                z = self.other(x)
        assert y.dtype is torch.bfloat16
        assert z.dtype is torch.float32
        return y.float() + z


@pytest.mark.usefixtures("_uncompiled")
def test_autocast_inside_the_model() -> None:
    log = check(Mixed(), torch.randn(2, 4, 32), {"one", "other"}, tolerance=3e-2)
    assert {site.where: site.problem.dtype for site in log.sites} == {"one": "bfloat16", "other": "float32"}


# ---- torch.func ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("own", [False, True], ids=["plain", "adaptive"])
def test_torch_func_over_an_optimized_model(own: bool) -> None:
    net = adaptconv.AdaptiveConv1d(4, 4, taps="10111", padding=2) if own else hole()
    x, doubled = torch.randn(3, 4, 16), {name: 2 * p for name, p in net.named_parameters()}
    with adaptconv.pinned("gather"):
        fast = adaptconv.optimize(net)
        ways: list[Callable[[Any, str], Any]] = [
            lambda f, prefix: functional_call(f, {prefix + name: p for name, p in doubled.items()}, (x,)),
            lambda f, prefix: grad(lambda x: f(x).square().sum())(x),
            lambda f, prefix: vmap(lambda sample: f(sample[None]))(x),
            lambda f, prefix: jacrev(f)(x),
            lambda f, prefix: jvp(f, (x,), (x + 1,)),
        ]
        for way in ways:
            torch.testing.assert_close(way(fast, "_orig_mod."), way(net, ""), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("own", [False, True], ids=["plain", "adaptive"])
def test_torch_func_inside_an_optimized_model(own: bool, dynamic: bool) -> None:
    class PerSample(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = adaptconv.AdaptiveConv1d(4, 4, taps="10111", padding=2) if own else hole()

        def forward(self, x: Tensor) -> Tensor:
            def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
                result: Tensor = functional_call(self.conv, parameters, (sample[None],)).square().sum()
                return result

            parameters = dict(self.conv.named_parameters())
            result: Tensor = vmap(grad(loss), (None, 0))(parameters, x)["weight"]
            return result

    net, x = PerSample(), torch.randn(3, 4, 16)
    with adaptconv.pinned("gather"):
        ours = adaptconv.optimize(net, dynamic=dynamic)(x)
    torch.testing.assert_close(ours, net(x), rtol=1e-4, atol=1e-4)
