"""adapt and restore: the same modules, parameters, hooks and numbers, there and back."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, pinned
from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.swap import adapt, restore

PLAIN: list[Any] = [(nn.Conv1d, AdaptiveConv1d, 1), (nn.Conv2d, AdaptiveConv2d, 2), (nn.Conv3d, AdaptiveConv3d, 3)]
plain = pytest.mark.parametrize(("theirs", "ours", "axes"), PLAIN, ids=["1d", "2d", "3d"])


class Block(nn.Module):
    """A residual block, its two convolutions dilated."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding="same", dilation=dilation)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class Net(nn.Module):
    """A small ResNet, one block of it used twice, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, stride=2, padding=2)
        shared = Block(8, 2)
        self.blocks = nn.Sequential(Block(8, 1), shared, shared)
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(F.relu(self.one(self.blocks(self.stem(x)))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def snapshot(model: nn.Module) -> list[tuple[nn.Module, type, dict[str, Any]]]:
    return [(module, type(module), dict(module.__dict__)) for module in model.modules()]


def assert_as_before(model: nn.Module, before: list[tuple[nn.Module, type, dict[str, Any]]]) -> None:
    assert len(list(model.modules())) == len(before)
    for now, (module, cls, state) in zip(model.modules(), before, strict=True):
        assert now is module and type(now) is cls
        assert list(now.__dict__) == list(state)
        assert all(now.__dict__[name] is value for name, value in state.items())


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    y = model(x)
    return y, list(torch.autograd.grad(y.square().sum(), list(model.parameters())))


# ---- torch's own layers -----------------------------------------------------------------------------


def test_a_net_stays_itself_in_all_but_the_class_of_its_convolutions() -> None:
    model = Net().double().eval()
    before, keys, x = snapshot(model), list(model.state_dict()), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    parameters, named = list(model.parameters()), dict(model.named_parameters())
    expected, slopes = gradients(model, x)
    assert adapt(model) is model
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 7 and all(type(m) is AdaptiveConv2d for m in convolutions)
    assert [module for module, _, _ in before] == list(model.modules())
    assert model.blocks[1] is model.blocks[2] and model.two.weight is model.one.weight
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert dict(model.named_parameters()).keys() == named.keys()
    for backend in ("native", "gather", "dense"):
        with pinned(backend):
            y, mine = gradients(model, x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(mine, slopes)
        assert model.stem.plans.forward.choice.backend == backend
    assert restore(model) is model
    assert_as_before(model, before)
    assert torch.equal(model(x), expected)


@plain
@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 2, "padding": 1, "bias": False},
        {"groups": 2, "dilation": 2, "padding": "same"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 2, "padding_mode": "reflect", "stride": 2},
        {"padding": "same", "padding_mode": "replicate", "dtype": torch.float64},
        {"dtype": torch.complex64, "padding": 1},
    ],
    ids=str,
)
def test_a_convolution_alone(theirs: Any, ours: Any, axes: int, settings: dict[str, Any]) -> None:
    layer = theirs(4, 6, 3, **settings)
    x = torch.randn(2, 4, *(7,) * axes, dtype=settings.get("dtype"))
    before, expected = snapshot(layer), layer(x)
    assert adapt(layer) is layer and type(layer) is ours
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[0]), expected[0])
    assert repr(layer).startswith(f"AdaptiveConv{axes}d(4, 6, kernel_size=")
    restore(layer)
    assert_as_before(layer, before)


def test_an_optimizer_goes_on_with_the_same_parameters() -> None:
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (model, twin)]
    for step in range(4):
        if step == 1:
            adapt(model)
        if step == 3:
            restore(model)
        x = torch.randn(2, 3, 12, 12)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for (name, mine), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


def test_hooks_stay_and_can_be_removed() -> None:
    layer, seen = nn.Conv2d(2, 2, 3), []
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("forward")),
        layer.register_forward_pre_hook(lambda *_: seen.append("before")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    adapt(layer)
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert seen == ["before", "forward", "backward"]
    late = layer.register_forward_hook(lambda *_: seen.append("late"))
    for handle in handles:
        handle.remove()
    restore(layer)
    seen.clear()
    layer(x)
    assert seen == ["late"]
    late.remove()
    layer(x)
    assert seen == ["late"]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_of_an_adapted_net_are_adapted_and_go_back_by_themselves(way: Any, called: bool) -> None:
    model, x = adapt(Net().eval()), torch.randn(1, 3, 12, 12)
    if called:
        model(x)
    other = way(model)
    assert torch.equal(other(x), model(x))
    assert type(other.stem) is AdaptiveConv2d and other.two.weight is other.one.weight
    restore(other)
    assert type(other.stem) is nn.Conv2d and other.stem.__dict__.keys() == nn.Conv2d(1, 1, 1).__dict__.keys()
    assert type(model.stem) is AdaptiveConv2d
    torch.testing.assert_close(other(x), model(x))


def test_twice_is_once_and_own_layers_are_not_undone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3), AdaptiveConv2d(2, 2, 3), AdaptiveConv2d(2, 2, taps="101/010/101"))
    before = snapshot(model)
    adapt(model)
    once = snapshot(model)
    adapt(model)
    assert_as_before(model, once)
    restore(model)
    assert_as_before(model, before)
    restore(model)
    assert_as_before(model, before)


def test_what_happens_in_between_stays() -> None:
    layer = adapt(nn.Conv2d(2, 2, 3))
    with torch.no_grad():
        layer.weight.fill_(2.0)
    layer.eval().double()
    layer.note = "kept"
    restore(layer)
    assert type(layer) is nn.Conv2d and not layer.training and layer.note == "kept"
    assert layer.weight.dtype is torch.float64 and float(layer.weight.detach().min()) == 2.0


def test_a_frozen_kernel_cannot_go_back(caplog: pytest.LogCaptureFixture) -> None:
    model = adapt(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)))
    with torch.no_grad():
        model[0].weight[:, :, 1, 1] = 0
    x = torch.randn(1, 2, 7, 7)
    expected = model(x)
    model[0].freeze()  # type: ignore[operator]
    restore(model)
    assert type(model[0]) is AdaptiveConv2d and type(model[1]) is nn.Conv2d
    assert "left 0 adaptive: its kernel is now FixedTaps" in caplog.text
    torch.testing.assert_close(model(x), expected)


def test_inside_dataparallel_and_in_train_mode() -> None:
    model = nn.DataParallel(Net())
    adapt(model)
    assert type(model.module.stem) is AdaptiveConv2d and model.training
    assert model(torch.randn(2, 3, 12, 12)).shape == (2, 5)
    replica = model.module.stem._replicate_for_data_parallel()
    assert type(replica) is AdaptiveConv2d


def test_compiled_before_and_after() -> None:
    torch._dynamo.reset()
    model, x = Net().eval(), torch.randn(1, 3, 12, 12)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = compiled(x)
    adapt(model)
    torch.testing.assert_close(compiled(x), expected)
    restore(compiled)
    torch.testing.assert_close(compiled(x), expected)
    assert type(model.stem) is nn.Conv2d


# ---- layers whose weight is made, and layers left alone ----------------------------------------------

MADE: dict[str, Any] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": lambda m: torch.nn.utils.weight_norm(m),
    "old spectral_norm": lambda m: torch.nn.utils.spectral_norm(m),
    "pruned": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "pruned for good": lambda m: prune.remove(prune.random_unstructured(m, "weight", 0.5), "weight"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", MADE)
@plain
def test_a_weight_that_is_made_is_made_in_every_call(theirs: Any, ours: Any, axes: int, name: str) -> None:
    layer = MADE[name](theirs(4, 4, 3, padding=1, dtype=torch.float64)).eval()
    cls, keys, x = type(layer), list(layer.state_dict()), torch.randn(2, 4, *(6,) * axes, dtype=torch.float64)
    adapt(layer)
    assert isinstance(layer, ours) and list(layer.state_dict()) == keys
    assert is_parametrized(layer) == (cls is not theirs)
    layer(x)  # old hooks make the weight here
    for _ in range(2):
        expected = getattr(F, f"conv{axes}d")(x, layer.weight, layer.bias, padding=1)
        with pinned("gather"):
            torch.testing.assert_close(layer(x), expected)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.5)
        layer(x)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    expected = layer(x)
    restore(layer)
    assert type(layer).__name__ == cls.__name__ and type(layer).__mro__[1:] == cls.__mro__[1:]
    assert not isinstance(layer, ours)
    torch.testing.assert_close(layer(x), expected)


def test_parametrizations_may_come_and_go_in_between() -> None:
    x = torch.randn(1, 2, 5, 5)
    early = adapt(parametrizations.weight_norm(nn.Conv2d(2, 2, 3)))
    expected = early(x)
    torch.testing.assert_close(copy.deepcopy(early)(x), expected)
    remove_parametrizations(early, "weight")
    assert type(early) is AdaptiveConv2d
    torch.testing.assert_close(early(x), expected)
    assert type(restore(early)) is nn.Conv2d
    torch.testing.assert_close(early(x), expected)

    late = parametrizations.weight_norm(adapt(nn.Conv2d(2, 2, 3)))
    expected = late(x)
    restore(late)
    assert type(late).__name__ == "ParametrizedConv2d" and not isinstance(late, AdaptiveConv2d)
    torch.testing.assert_close(late(x), expected)
    remove_parametrizations(late, "weight")
    assert type(late) is nn.Conv2d
    torch.testing.assert_close(late(x), expected)


class Own(nn.Conv2d):
    """A user's layer, which does something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Marked(Tensor):
    """A weight of a kind of its own."""


def _patched() -> nn.Module:
    layer = nn.Conv2d(2, 2, 3)
    inner = layer.forward
    layer.forward = lambda x: inner(x) * 2  # type: ignore[method-assign]
    return layer


def _subclassed() -> nn.Module:
    layer = nn.Conv2d(2, 2, 3)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Marked))
    return layer


LEFT: dict[str, tuple[Any, str]] = {
    "subclass": (lambda: Own(2, 2, 3), "no subclasses"),
    "parametrized subclass": (lambda: parametrizations.weight_norm(Own(2, 2, 3)), "no subclasses"),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 3), "no subclasses"),
    "lazy": (lambda: nn.LazyConv2d(2, 3), "no subclasses"),
    "quantized": (lambda: torch.ao.nn.quantized.Conv2d(2, 2, 3), "no subclasses"),
    "qat": (
        lambda: torch.ao.nn.qat.Conv2d(2, 2, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig("x86")),
        "no subclasses",
    ),
    "patched": (_patched, "its forward was replaced"),
    "tensor subclass": (_subclassed, "its weight is a Marked"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_plain_convolution_is_left_alone_and_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, reason = LEFT[name]
    model = nn.Sequential(nn.ReLU(), make(), nn.Conv2d(2, 2, 1))
    before = snapshot(model[1])
    with caplog.at_level(logging.INFO, "adaptconv.adapt"):
        adapt(model)
    assert_as_before(model[1], before)
    assert f"left 1 ({type(model[1]).__name__}) as it is: " in caplog.text and reason in caplog.text
    assert "adapted 1 Conv2d" in caplog.text
    assert "ReLU" not in caplog.text


def test_a_lazy_layer_is_adapted_once_it_knows_its_shape() -> None:
    model = adapt(nn.Sequential(nn.LazyConv2d(2, 3)))
    x = torch.randn(1, 4, 6, 6)
    expected = model(x)
    adapt(model)
    assert type(model[0]) is AdaptiveConv2d
    torch.testing.assert_close(model(x), expected)


def test_a_scripted_model_is_left_alone() -> None:
    model = torch.jit.script(nn.Sequential(nn.Conv2d(2, 2, 3)))
    x = torch.randn(1, 2, 5, 5)
    expected = model(x)
    adapt(model)
    assert torch.equal(model(x), expected)
    restore(model)


def test_nothing_to_adapt_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "adaptconv.adapt"):
        adapt(nn.Linear(2, 2))
    assert caplog.messages == ["adapted nothing"]
    for change in (adapt, restore):
        with pytest.raises(ConvTypeError, match=r"expected a torch\.nn\.Module, got str"):
            change("model")  # type: ignore[type-var]


# ---- layers of the dcls package ---------------------------------------------------------------------

DCLS: list[tuple[str, dict[str, Any], int]] = [
    ("Dcls1d", {"dilated_kernel_size": 7, "padding": 3}, 1),
    ("Dcls2d", {"dilated_kernel_size": (7, 5), "padding": (3, 2), "stride": 2}, 2),
    ("Dcls3d", {"dilated_kernel_size": 5, "bias": False}, 3),
    ("Dcls3_1d", {"dense_kernel_size": (3, 2), "dilated_kernel_size": (5,)}, 3),
    ("Dcls2dK1d", {"dilated_kernel_size": (5,)}, 2),
]
dcls_of = pytest.mark.parametrize(("name", "settings", "axes"), DCLS, ids=[name for name, _, _ in DCLS])


def peer(name: str, **settings: Any) -> Any:
    modules = pytest.importorskip("DCLS.construct.modules")
    return getattr(modules, name)(4, 6, kernel_count=3, groups=2, **settings)


@dcls_of
@pytest.mark.parametrize("version", ["v1", "max", "gauss"])
def test_dcls_layers_become_ours_and_go_back(name: str, settings: Any, axes: int, version: str) -> None:
    model = nn.Sequential(peer(name, version=version, **settings), nn.ReLU())
    layer: Any = model[0]
    random = torch.get_rng_state()
    x = torch.randn(2, 4, *(8,) * axes)
    torch.set_rng_state(random)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    seen: list[str] = []
    layer.register_forward_hook(lambda *_: seen.append("hook"))
    expected, slopes = gradients(model, x)
    before = snapshot(model)
    adapt(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert model[0] is layer and type(layer).__module__ == "adaptconv.compat.dcls" and type(layer).__name__ == name
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    y, mine = gradients(model, x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(mine, slopes, atol=1e-4, rtol=1e-4)
    assert seen == ["hook", "hook"]
    adapt(model)
    restore(model)
    assert_as_before(model, before)
    assert torch.equal(model(x), expected)


@dcls_of
def test_dcls_layers_keep_what_happened_in_between(name: str, settings: Any, axes: int) -> None:
    layer = peer(name, version="max", **settings)
    layer.note = "mine"
    adapt(layer)
    assert layer.note == "mine" and layer.kernel_count == 3 and layer.version == "max"
    layer.version = "gauss"
    layer.eval()
    layer.tag = 5
    other = copy.deepcopy(layer)
    x = torch.randn(2, 4, *(8,) * axes)
    expected = layer(x)
    for one in (layer, other):
        restore(one)
        assert type(one).__module__ == "DCLS.construct.modules"
        assert (one.version, one.DCK.version, one.note, one.tag) == ("gauss", "gauss", "mine", 5)
        assert not one.training and not one.DCK.training
        torch.testing.assert_close(one(x), expected)
    assert other.weight is not layer.weight


def test_dcls_layers_keep_shared_positions_and_an_optimizer() -> None:
    first, second = peer("Dcls2d", dilated_kernel_size=5), peer("Dcls2d", dilated_kernel_size=5)
    second.P, second.SIG = first.P, first.SIG
    model = nn.ModuleList([first, second])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapt(model)
    assert second.P is first.P and len(list(model.parameters())) == 6
    before = first.P.detach().clone()
    (first(torch.randn(1, 4, 8, 8)) + second(torch.randn(1, 4, 8, 8))).square().sum().backward()
    optimizer.step()
    assert not torch.equal(first.P, before)
    restore(model)
    assert second.P is first.P


def test_a_frozen_dcls_layer_cannot_go_back(caplog: pytest.LogCaptureFixture) -> None:
    layer = adapt(peer("Dcls2d", dilated_kernel_size=5, version="v1"))
    x = torch.randn(1, 4, 8, 8)
    expected = layer(x)
    layer.freeze()
    restore(layer)
    assert isinstance(layer, AdaptiveConv2d) and "its kernel is now FixedTaps" in caplog.text
    torch.testing.assert_close(layer(x), expected)


def test_a_dcls_layer_that_is_not_as_expected_is_left(caplog: pytest.LogCaptureFixture) -> None:
    layer = peer("Dcls2d", dilated_kernel_size=5)
    layer.extra = nn.Parameter(torch.zeros(1))
    before = snapshot(layer)
    with caplog.at_level(logging.INFO, "adaptconv.adapt"):
        adapt(layer)
    assert_as_before(layer, before)
    assert "left the model itself (Dcls2d) as it is: its tensors are" in caplog.text


def test_adapting_needs_no_dcls_package() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['DCLS'] = None\nfrom torch import nn\nfrom adaptconv.swap import adapt\n"
        "assert type(adapt(nn.Conv2d(1, 1, 1))).__name__ == 'AdaptiveConv2d'\n"
        "assert not any(name.startswith('DCLS.') for name in sys.modules)\n"
        "assert 'adaptconv.compat.dcls' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_adapted_model_is_recorded_by_torchs_older_tracers() -> None:
    model, x = Net().eval(), torch.randn(2, 3, 12, 12)
    right = model(x)
    adapt(model)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), right)
    graph = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(graph(x), right)
    assert "conv2d" in graph.code


def test_a_layer_with_taps_of_its_own_is_recorded_by_jit_and_not_by_fx() -> None:
    model, x = nn.Sequential(AdaptiveConv1d(2, 3, taps="1011")), torch.randn(1, 2, 9)
    torch.testing.assert_close(torch.jit.trace(model, x)(2 * x), model(2 * x))
    with pytest.raises(ConvArgumentError, match=r"torch\.export"):
        torch.fx.symbolic_trace(model)
