"""Partially dilated kernels: taps and both forms."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, TapPattern
from adaptconv.convert import to_compact
from adaptconv.errors import ConvArgumentError
from adaptconv.kernels.grid import FixedTaps
from adaptconv.kernels.partial import PartiallyDilated

LAYERS = {1: AdaptiveConv1d, 2: AdaptiveConv2d, 3: AdaptiveConv3d}
CALLS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
EXTENTS = {1: (26,), 2: (13, 12), 3: (5, 9, 10)}
SETTINGS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (1, {"island": 5, "wing": 4, "dilation": 2}, {"groups": 4}),
    (1, {"island": 3, "wing": 2, "dilation": 3}, {"stride": 2, "padding": 4}),
    (1, {"island": 7, "wing": 0, "dilation": 2}, {"bias": False}),
    (2, {"island": 3, "wing": 1, "dilation": 2}, {"groups": 2, "padding": "same"}),
    (2, {"island": (3, 1), "wing": (1, 2), "dilation": (3, 2)}, {"padding": (1, 2), "padding_mode": "circular"}),
    (3, {"island": (1, 3, 3), "wing": (1, 1, 0), "dilation": (1, 2, 2)}, {"groups": 4, "padding": "same"}),
]


def layer_of(axes: int, family: dict[str, Any], settings: dict[str, Any], two: bool) -> Any:
    return LAYERS[axes](4, 4, PartiallyDilated(**family, two_parameters=two), dtype=torch.float64, **settings)


def centred(weight: Tensor, dilation: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """A kernel written into the middle of a window, position by position."""
    dense = weight.new_zeros(*weight.shape[:2], *window)
    for place in itertools.product(*map(range, weight.shape[2:])):
        where = tuple(
            (w - ((s - 1) * d + 1)) // 2 + i * d
            for i, s, d, w in zip(place, weight.shape[2:], dilation, window, strict=True)
        )
        dense[(slice(None), slice(None), *where)] = weight[(slice(None), slice(None), *place)]
    return dense


def test_the_pattern_is_the_named_one() -> None:
    family = PartiallyDilated(island=5, wing=4, dilation=2).bound(1)
    assert str(family.taps) == "101010101111101010101"
    assert str(PartiallyDilated(island=(3, 1), wing=(1, 1), dilation=(2, 2)).bound(2).taps) == (
        TapPattern.from_mask(
            # rows: wing, island, centre, island, wing; the island is one column wide
            [[1, 0, 1, 0, 1], [0, 0, 1, 0, 0], [1, 0, 1, 0, 1], [0, 0, 1, 0, 0], [1, 0, 1, 0, 1]]
        ).text
    )
    assert family.bound(1) is family
    assert family == PartiallyDilated([5], (4,), [2]).bound(1)  # type: ignore[arg-type]
    assert hash(family) == hash(PartiallyDilated((5,), (4,), (2,)))


@pytest.mark.parametrize("two", [False, True], ids=["compact", "two"])
@pytest.mark.parametrize(("axes", "family", "settings"), SETTINGS, ids=str)
def test_exact_against_the_dense_kernel(axes: int, family: dict[str, Any], settings: dict[str, Any], two: bool) -> None:
    layer = layer_of(axes, family, settings, two)
    taps, window = layer.taps, layer.taps.window
    if two:
        steps = layer.family.dilation
        dense = centred(layer.weight.detach(), (1,) * axes, window) + centred(layer.wing_weight.detach(), steps, window)
    else:
        dense = torch.zeros(*layer.weight.shape[:2], *window, dtype=torch.float64)
        for t, offset in enumerate(taps.offsets):
            dense[(slice(None), slice(None), *offset)] = layer.weight.detach()[:, :, t]
    torch.testing.assert_close(layer.kernel.dense(), dense, rtol=0, atol=1e-15)
    x = torch.randn(2, 4, *EXTENTS[axes], dtype=torch.float64)
    padded, padding = x, settings.get("padding", 0)
    if settings.get("padding_mode"):
        padded, padding = F.pad(x, [p for q in reversed(padding) for p in (q, q)], mode=settings["padding_mode"]), 0
    right = CALLS[axes](padded, dense, layer.bias, settings.get("stride", 1), padding, 1, settings.get("groups", 1))
    torch.testing.assert_close(layer(x), right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_gradients_of_both_parameters(axes: int) -> None:
    layer = LAYERS[axes](2, 2, PartiallyDilated(3, 1, 2, two_parameters=True), padding=1, dtype=torch.float64)
    x = torch.randn(1, 2, *(5, 4, 4)[:axes], dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, wings: Tensor, bias: Tensor) -> Tensor:
        tensors = {"weight": weight, "wing_weight": wings, "bias": bias}
        return torch.func.functional_call(layer, tensors, (x,))

    operands = (x, layer.weight, layer.wing_weight, layer.bias)
    assert torch.autograd.gradcheck(call, operands, fast_mode=axes > 1)
    assert torch.autograd.gradgradcheck(call, operands, fast_mode=True)


@pytest.mark.parametrize("two", [False, True], ids=["compact", "two"])
def test_every_tap_starts_with_the_variance_of_a_layer_of_as_many_taps(two: bool) -> None:
    layer = AdaptiveConv2d(64, 64, PartiallyDilated(3, 2, 2, two_parameters=two))
    taps = len(layer.taps)
    assert taps == 25 + 9 - 1  # the centre is in both; the step skips the rest of the island
    wanted = 1 / (3 * 64 * taps)
    found = layer.kernel.weight.detach().double().square().mean(dim=(0, 1))
    torch.testing.assert_close(found, torch.full_like(found, wanted), rtol=0.12, atol=0)
    assert float(layer.bias.detach().abs().max()) <= (64 * taps) ** -0.5


def test_two_parameters_that_never_share_a_tap_but_the_centre_differ_in_count() -> None:
    compact = AdaptiveConv1d(4, 4, PartiallyDilated(5, 4, 2), groups=4)
    two = AdaptiveConv1d(4, 4, PartiallyDilated(5, 4, 2, two_parameters=True), groups=4)
    assert [tuple(p.shape) for p in compact.parameters()] == [(4, 1, 13), (4,)]
    assert sorted(tuple(p.shape) for p in two.parameters()) == [(4,), (4, 1, 5), (4, 1, 11)]
    assert compact.family.identity
    assert not two.family.identity


@pytest.mark.parametrize(("axes", "family", "settings"), SETTINGS, ids=str)
def test_to_compact_keeps_the_function(axes: int, family: dict[str, Any], settings: dict[str, Any]) -> None:
    layer = layer_of(axes, family, settings, two=True)
    x = torch.randn(2, 4, *EXTENTS[axes], dtype=torch.float64)
    before, dense = layer(x), layer.kernel.dense().detach()
    assert to_compact(layer) is layer
    assert torch.equal(layer.kernel.dense(), dense)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-13)
    assert layer.family == PartiallyDilated(**family).bound(axes)
    assert set(dict(layer.named_parameters())) == {"weight"} | ({"bias"} if layer.bias is not None else set())
    layer(x).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.shape == (4, 4 // layer.groups, len(layer.taps))
    fresh = layer_of(axes, family, settings, two=False)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert to_compact(layer) is layer


def test_to_compact_keeps_what_was_frozen_frozen_and_refuses_what_it_does_not_know() -> None:
    layer = AdaptiveConv1d(2, 2, PartiallyDilated(3, 1, 2, two_parameters=True)).requires_grad_(False)
    assert not to_compact(layer).weight.requires_grad
    with pytest.raises(ConvArgumentError, match="PartiallyDilated"):
        to_compact(AdaptiveConv1d(2, 2, 3))
    with pytest.raises(ConvArgumentError, match="PartiallyDilated"):
        to_compact(nn.Conv1d(2, 2, 3))  # type: ignore[type-var]
    normed = AdaptiveConv1d(2, 2, PartiallyDilated(3, 1, 2, two_parameters=True))
    nn.utils.parametrizations.weight_norm(normed, "wing_weight")
    with pytest.raises(ConvArgumentError, match="parametrized"):
        to_compact(normed)


@pytest.mark.parametrize("two", [False, True], ids=["compact", "two"])
def test_copies_checkpoints_and_frozen_layers(two: bool) -> None:
    layer = AdaptiveConv1d(4, 6, PartiallyDilated(3, 2, 3, two_parameters=two), padding=3, groups=2)
    x = torch.randn(2, 4, 20)
    right = layer(x)
    other = AdaptiveConv1d(4, 6, PartiallyDilated(3, 2, 3, two_parameters=two), padding=3, groups=2)
    other.load_state_dict(layer.state_dict(), strict=True)
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), right)
        assert copied.family == layer.family
    wrong = AdaptiveConv1d(4, 6, PartiallyDilated(3, 2, 3, two_parameters=not two), padding=3, groups=2)
    with pytest.raises(RuntimeError, match="two_parameters=" + str(two)):
        wrong.load_state_dict(layer.state_dict())
    frozen = copy.deepcopy(layer).freeze()
    assert isinstance(frozen.family, FixedTaps)
    torch.testing.assert_close(frozen(x), right)


def test_compiles_and_exports_whole() -> None:
    layer = AdaptiveConv1d(4, 4, PartiallyDilated(3, 2, 2, two_parameters=True), padding="same", groups=4)
    x = torch.randn(2, 4, 16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    right, found = layer(x), compiled(x)
    torch.testing.assert_close(found, right)
    parameters = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), parameters), torch.autograd.grad(right.square().sum(), parameters)
    )
    layer.eval()
    exported = torch.export.export(layer, (x.detach(),))
    torch.testing.assert_close(exported.module(check_guards=False)(x.detach()), right)


def test_autocast_narrows_the_sum_not_the_summands() -> None:
    layer = AdaptiveConv1d(4, 4, PartiallyDilated(3, 2, 2, two_parameters=True), padding="same", groups=4)
    x = torch.randn(2, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        right = F.conv1d(x, layer.kernel.dense(), layer.bias, padding="same", groups=4)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, right)


@pytest.mark.parametrize(
    ("says", "family"),
    [
        ("island must be odd", {"island": 4, "wing": 1, "dilation": 2}),
        ("island must be at least 1", {"island": 0, "wing": 1, "dilation": 2}),
        ("wing must be at least 0", {"island": 3, "wing": -1, "dilation": 2}),
        ("dilation must be at least 1", {"island": 3, "wing": 1, "dilation": 0}),
        ("island must be an int or 2 ints", {"island": (3, 3, 3), "wing": 1, "dilation": 2}),
        ("wing must be an int or 2 ints", {"island": 3, "wing": 1.5, "dilation": 2}),
    ],
)
def test_settings_out_of_range_are_refused(says: str, family: dict[str, Any]) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        AdaptiveConv2d(2, 2, PartiallyDilated(**family))
