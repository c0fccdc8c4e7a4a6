"""What every kernel family promises, the same for all: one file over families x axes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import adaptconv
from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, pinned
from adaptconv.backends import BACKENDS
from adaptconv.kernels import (
    Family,
    FixedTaps,
    Grid,
    Interpolated,
    LearnableSpacing,
    Masked,
    PartiallyDilated,
    Symmetric,
)

LAYER: dict[int, Any] = {1: AdaptiveConv1d, 2: AdaptiveConv2d, 3: AdaptiveConv3d}
TORCHS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
EXTENT = {1: 19, 2: 11, 3: 8}


@dataclass(frozen=True, slots=True)
class Kind:
    """A family as a user writes it.

    Attributes:
        name: says what is special about it.
        make: the family for a number of axes.
        twice: whether second derivatives exist everywhere that matters.
        axes: ranks it is for.
    """

    name: str
    make: Callable[[int], Family]
    twice: bool = True
    axes: tuple[int, ...] = (1, 2, 3)


KINDS = (
    Kind("grid", lambda axes: Grid(3, 2)),
    Kind("fixed", lambda axes: FixedTaps.of({1: "1011", 2: "10/11", 3: "10/01//00/11"}[axes])),
    Kind("partial", lambda axes: PartiallyDilated(island=3, wing=1, dilation=2)),
    Kind("partial-of-two", lambda axes: PartiallyDilated(island=3, wing=1, dilation=2, two_parameters=True)),
    Kind("interpolated", lambda axes: Interpolated(2)),
    Kind("interpolated-cut", lambda axes: Interpolated(3 if axes < 3 else 2, fade=False)),
    Kind("interpolated-learnt", lambda axes: Interpolated(2, learn_footprint=True)),
    *(
        Kind(f"spacing-{v}", lambda axes, v=v: LearnableSpacing(3, 5 if axes < 3 else 3, v))
        for v in ("v0", "v1", "max", "gauss")
    ),
    Kind("spacing-last-axis", lambda axes: LearnableSpacing(2, 5, dense=(2,) * (axes - 1)), axes=(2, 3)),
    Kind("spacing-shared", lambda axes: LearnableSpacing(2, 5 if axes < 3 else 3, shared=True)),
    Kind("masked", lambda axes: Masked(3, mask=torch.arange(3**axes).reshape((3,) * axes) % 2 == 0)),
    Kind("masked-density", lambda axes: Masked(3, density=0.5)),
    Kind("masked-straight-through", lambda axes: Masked(3, threshold=0.1, gradient="straight-through"), twice=False),
    Kind("symmetric-mirror", lambda axes: Symmetric(3, "mirror")),
    Kind("symmetric-radial", lambda axes: Symmetric(3, "radial")),
    Kind("symmetric-rotation", lambda axes: Symmetric(3, "rotation90"), axes=(2, 3)),
)  # fmt: skip
EACH = [pytest.param(kind, axes, id=f"{kind.name}-{axes}d") for kind in KINDS for axes in kind.axes]
FLAT = [pytest.param(kind, id=kind.name) for kind in KINDS if 2 in kind.axes]


def layer_of(kind: Kind, axes: int, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    torch.manual_seed(len(kind.name) + axes)
    settings = {"padding": "same", "groups": 2, **more}
    return LAYER[axes](4, 4, kind.make(axes), dtype=dtype, **settings)


def input_of(axes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 4, *(EXTENT[axes] - i for i in range(axes)), dtype=dtype)


def by_hand(layer: Any, x: Tensor) -> Tensor:
    """The layer's kernel written into its window, through torch."""
    return TORCHS[x.dim() - 2](x, layer.kernel.dense(), layer.bias, layer.stride, layer.padding, 1, layer.groups)


@pytest.mark.parametrize(("kind", "axes"), EACH)
def test_a_layer_is_the_convolution_with_its_kernel(kind: Kind, axes: int) -> None:
    x = input_of(axes)
    for more in ({}, {"stride": 2, "padding": 1, "bias": False}, {"groups": 4}, {"groups": 1, "padding": "valid"}):
        layer = layer_of(kind, axes, **more)
        dense = layer.kernel.dense()
        assert tuple(dense.shape) == (4, 4 // layer.groups, *layer.kernel.taps.window)
        assert dense.any(), "an all-zero kernel"
        torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer(x[0]), by_hand(layer, x)[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "axes"), EACH)
def test_first_and_second_derivatives(kind: Kind, axes: int) -> None:
    layer = layer_of(kind, axes)
    if hasattr(layer, "P"):  # away from whole positions, the window's border and SIG = 0, where hats have corners
        nn.init.uniform_(layer.P, 0.1, 0.9)
        if hasattr(layer, "SIG"):
            nn.init.uniform_(layer.SIG, 0.1, 0.4)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(1, 4, *(EXTENT[axes] // 2 + 1 for _ in range(axes)), dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return result

    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    if kind.name.startswith("masked-straight"):  # not the derivative of what is computed, by intent
        dense = layer.kernel.weight
        grad = torch.autograd.grad(dense.sum(), layer.weight)[0]
        assert torch.equal(grad, torch.ones_like(grad))
        return
    assert gradcheck(run, (x, *values), fast_mode=True)
    if kind.twice:
        assert gradgradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize(("kind", "axes"), EACH)
def test_every_backend_that_accepts_the_taps_agrees(kind: Kind, axes: int) -> None:
    layer = layer_of(kind, axes)
    x = input_of(axes)
    right = by_hand(layer, x)
    ran = []
    for backend in BACKENDS:
        with pinned(backend.name):
            try:
                y = layer(x)
            except adaptconv.BackendRejected:
                continue
            torch.testing.assert_close(y, right, rtol=1e-10, atol=1e-12)
            ran.append(backend.name)
    assert "dense" in ran
    assert len(ran) > 1


@pytest.mark.parametrize(("kind", "axes"), EACH)
def test_state_dicts_copies_and_words(kind: Kind, axes: int) -> None:
    one, other = layer_of(kind, axes), LAYER[axes](4, 4, kind.make(axes), padding="same", groups=2, dtype=torch.float64)
    x = input_of(axes)
    right = one(x)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(other(x), right)
    assert next(iter(one.state_dict())) == "weight"
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again.family == one.family
        assert torch.equal(again(x), right)
        with torch.no_grad():
            again.weight.add_(1)
        assert torch.equal(one(x), right)
    text = repr(one)
    assert text.startswith(f"AdaptiveConv{axes}d(4, 4, ")
    assert "groups=2" in text
    assert one.family.bound(axes) == one.family
    assert hash(one.family) == hash(other.family)


@pytest.mark.parametrize(("kind", "axes"), EACH)
def test_freezing_keeps_the_function_and_leaves_plain_taps(kind: Kind, axes: int) -> None:
    layer = layer_of(kind, axes)
    x = input_of(axes)
    right = layer(x).detach()
    with torch.no_grad():
        layer(x)  # what this kept must not outlive the freezing
    frozen = layer.freeze()
    assert frozen is layer
    assert list(layer.state_dict()) in (["weight", "bias"], ["bias", "weight"])
    torch.testing.assert_close(layer(x), right, rtol=1e-10, atol=1e-12)
    assert layer.taps.footprint is None
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize(("kind", "axes"), EACH)
def test_traced_whole_in_training_and_in_eval(kind: Kind, axes: int) -> None:
    torch._dynamo.reset()
    layer = layer_of(kind, axes, torch.float32)
    x = input_of(axes, torch.float32).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mine = torch.autograd.grad(compiled(x).square().sum(), [x, *layer.parameters()])
    right = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FLAT)
def test_compiled_by_optimize_and_exported(kind: Kind) -> None:
    torch._dynamo.reset()
    layer = layer_of(kind, 2, torch.float32).eval()
    x = input_of(2, torch.float32)
    with torch.no_grad():
        right = layer(x)
        torch.testing.assert_close(adaptconv.optimize(copy.deepcopy(layer))(x), right, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(layer, (x,))
        torch.testing.assert_close(exported.module()(x), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", FLAT)
def test_autocast_narrows_the_call_and_not_the_making_of_the_kernel(kind: Kind) -> None:
    layer = layer_of(kind, 2, torch.float32)
    x = input_of(2, torch.float32)
    right = by_hand(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        kernel = layer.kernel
    assert y.dtype is torch.bfloat16
    assert kernel.weight.dtype is torch.float32
    torch.testing.assert_close(y.float(), right, rtol=3e-2, atol=3e-2)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("kind", FLAT)
def test_a_few_steps_of_training_make_a_layer_better(kind: Kind) -> None:
    torch.manual_seed(0)
    layer = layer_of(kind, 2, torch.float32)
    x = input_of(2, torch.float32)
    target = by_hand(layer_of(kind, 2, torch.float32), x).detach() + 0.3 * torch.randn(2, 4, 11, 10)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        layer.clamp_parameters()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", FLAT)
def test_one_family_serves_many_layers_and_shares_nothing(kind: Kind) -> None:
    family = kind.make(2)
    one, other = (AdaptiveConv2d(4, 4, family, padding="same") for _ in range(2))
    assert one.weight is not other.weight
    assert isinstance(one, nn.Conv2d)
    nn.init.trunc_normal_(one.weight, std=0.02)
    assert not torch.equal(one.weight, other.weight)
    with torch.device("meta"):
        assert AdaptiveConv2d(4, 4, family).weight.is_meta
    assert (
        AdaptiveConv2d(4, 4, family, dtype=torch.bfloat16)(torch.randn(1, 4, 16, 16).bfloat16()).dtype is torch.bfloat16
    )


@pytest.mark.parametrize("kind", FLAT)
def test_padding_modes_pad_by_the_window(kind: Kind) -> None:
    layer = layer_of(kind, 2, padding=1, padding_mode="circular")
    x = input_of(2)
    padded = F.pad(x, (1, 1, 1, 1), mode="circular")
    torch.testing.assert_close(layer(x), F.conv2d(padded, layer.kernel.dense(), layer.bias, groups=2))


@pytest.mark.parametrize("kind", FLAT)
def test_a_dilation_beside_a_family_is_refused(kind: Kind) -> None:
    if kind.name == "grid":
        assert AdaptiveConv2d(2, 2, Grid(3, 2)).dilation == (2, 2)
    with pytest.raises(ValueError, match="leave dilation at 1, got 2"):
        AdaptiveConv2d(2, 2, kind.make(2), dilation=2)
