"""A layer remembers its last call, and notices whatever could make it another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import adaptconv
from adaptconv import AdaptiveConv1d, AdaptiveConv2d, records, warm
from adaptconv.modules import _Adaptive

Changed = Callable[[_Adaptive, Tensor], Tensor]


def warmed(layer: _Adaptive, x: Tensor) -> None:
    for _ in range(3):
        layer(x)


def known(layer: _Adaptive, x: Tensor) -> bool:
    return warm.again(layer.__dict__, x, layer.weight, layer.bias) is not None


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "a pin": lambda: adaptconv.pinned("gather"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "threads": lambda: threads(torch.get_num_threads() + 1),
    "deterministic": deterministic,
    "no gradients": torch.no_grad,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_it_notices_what_surrounds_a_call(name: str) -> None:
    layer, x = AdaptiveConv2d(4, 4, 3, padding=1), torch.randn(2, 4, 9, 9)
    warmed(layer, x)
    assert known(layer, x)
    with SURROUNDINGS[name]():
        assert not known(layer, x)
        right = F.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(x), right)
        if name == "a pin":
            assert layer.plans is not None and layer.plans.forward.choice.backend == "gather"
        warmed(layer, x)
        assert known(layer, x), "what is the plan there is remembered there"
    assert not known(layer, x)
    assert torch.equal(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
    assert layer.plans is not None and layer.plans.forward.choice.backend == "native"


def _stride(layer: _Adaptive, x: Tensor) -> Tensor:
    layer.stride = (2, 2)
    return x


def _circular(layer: _Adaptive, x: Tensor) -> Tensor:
    layer.padding_mode = "circular"
    return x


def _half(layer: _Adaptive, x: Tensor) -> Tensor:
    layer.bfloat16()
    return x.bfloat16()


def _last(layer: _Adaptive, x: Tensor) -> Tensor:
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return x


def _database(layer: _Adaptive, x: Tensor) -> Tensor:
    records.advance()
    return x


def _window(layer: _Adaptive, x: Tensor) -> Tensor:
    layer.weight = nn.Parameter(torch.as_strided(layer.weight.detach(), (4, 4, 1, 1), layer.weight.stride()))
    layer.padding = (1, 1)
    return x


CHANGES: dict[str, Changed] = {
    "a smaller window of the weight": _window,
    "another shape": lambda layer, x: x[..., :8].contiguous(),
    "other strides": lambda layer, x: x.transpose(2, 3),
    "an input that wants its gradient": lambda layer, x: x.clone().requires_grad_(),
    "a frozen weight": lambda layer, x: (layer.weight.requires_grad_(False), x)[1],
    "another stride": _stride,
    "another way to pad": _circular,
    "another dtype": _half,
    "another format of the weight": _last,
    "a database that was written to": _database,
    "another device": lambda layer, x: (layer.to("meta"), x.to("meta"))[1],
    "a subclass of Tensor": lambda layer, x: nn.Parameter(x),
}


def _no_bias(layer: _Adaptive, x: Tensor) -> Tensor:
    layer.bias = None
    return x


CHANGES["no bias"] = _no_bias


@pytest.mark.parametrize("backend", ["native", "gather"])
@pytest.mark.parametrize("name", CHANGES)
def test_it_notices_what_changed(name: str, backend: str) -> None:
    layer, x = AdaptiveConv2d(4, 4, 3, padding=1), torch.randn(2, 4, 9, 9)
    with adaptconv.pinned(backend):
        warmed(layer, x)
        assert known(layer, x)
        x = CHANGES[name](layer, x)
        assert not known(layer, x)
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        right = F.conv2d(F.pad(x, (1, 1, 1, 1), mode), layer.weight, layer.bias, layer.stride)
        found = layer(x)
    assert found.shape == right.shape and found.dtype is right.dtype and found.device == right.device
    if not right.is_meta:
        torch.testing.assert_close(found, right, **({"rtol": 0.02, "atol": 0.01} if right.itemsize == 2 else {}))


def test_flags_of_float32_are_asked_for_where_the_plan_is_not_torchs_own() -> None:
    layer, x = AdaptiveConv2d(4, 4, 3, padding=1), torch.randn(2, 4, 9, 9)
    before = torch.get_float32_matmul_precision()
    for backend, notices in (("native", False), ("gather", True)):
        with adaptconv.pinned(backend):
            warmed(layer, x)
            torch.set_float32_matmul_precision("high")
            try:
                assert known(layer, x) != notices
            finally:
                torch.set_float32_matmul_precision(before)


def test_shapes_by_turns_are_never_remembered_nor_what_may_be_written_to() -> None:
    layer, x = AdaptiveConv1d(4, 4, 3), torch.randn(1, 4, 20)
    for _ in range(4):
        for end in (20, 15):
            layer(x[..., :end])
    assert warm._NAME not in layer.__dict__
    padded = AdaptiveConv1d(4, 4, 3, padding=1, padding_mode="circular")
    warmed(padded, x)
    taps = AdaptiveConv1d(4, 4, taps="101")
    warmed(taps, x)
    listed = AdaptiveConv1d(4, 4, 3)
    listed.stride = [1]  # type: ignore[assignment]
    warmed(listed, x)
    listed.stride[0] = 2  # type: ignore[index]
    assert listed(x).shape == (1, 4, 9)
    assert not any(warm._NAME in each.__dict__ for each in (layer, padded, taps, listed))


def test_a_smaller_window_at_the_same_strides_is_padded_anew() -> None:
    whole, x = torch.randn(4, 3, 5, 5), torch.randn(1, 3, 8, 8)
    layer = AdaptiveConv2d(3, 4, 5, padding="same", bias=False)
    layer.weight = nn.Parameter(whole[:, :, :, :])
    warmed(layer, x)
    layer.weight = nn.Parameter(whole[:, :, 1:4, 1:4])
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding="same"))


def test_autocast_elsewhere_lets_meta_tensors_be() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert AdaptiveConv2d(3, 4, 3)(torch.randn(1, 3, 8, 8)).is_meta


def test_copies_bare_weights_and_parametrized_ones() -> None:
    layer, x = AdaptiveConv1d(4, 4, 3, bias=False), torch.randn(1, 4, 20)
    warmed(layer, x)
    assert known(layer, x) and warm._NAME not in copy.deepcopy(layer).__dict__
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x), F.conv1d(x, layer.weight))
    layer.weight = nn.Parameter(torch.randn(4, 4, 5))
    layer.kernel_size = (5,)
    assert torch.equal(layer(x), F.conv1d(x, layer.weight))
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    warmed(layer, x)
    torch.testing.assert_close(layer(x), F.conv1d(x, layer.weight))
    restored = adaptconv.restore(adaptconv.adapt(nn.Sequential(nn.Conv1d(4, 4, 3))))
    assert not any(warm._NAME in m.__dict__ for m in restored.modules())


def test_transforms_and_traces_of_a_warm_layer() -> None:
    layer, x = AdaptiveConv1d(4, 4, 3), torch.randn(1, 4, 20)
    warmed(layer, x)
    with torch.no_grad():
        warmed(layer, x)
    right = F.conv1d(x, layer.weight, layer.bias)
    several = torch.func.vmap(layer)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(several[0], right)
    given = {name: p.detach() for name, p in layer.named_parameters()}
    gradient = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).sum())(given)
    torch.testing.assert_close(gradient["bias"], torch.full((4,), 18.0))
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(torch.ones(1, 4, 12)), F.conv1d(torch.ones(1, 4, 12), layer.weight, layer.bias))
    assert torch.fx.symbolic_trace(nn.Sequential(layer))(x).shape == right.shape
    exported = torch.export.export(nn.Sequential(layer), (x,)).module()
    torch.testing.assert_close(exported(x), right)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), right)
    assert layer.to("meta")(x.to("meta")).is_meta
