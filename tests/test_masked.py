"""Masked kernels: fixed masks, densities and thresholds, and their gradients."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, TapPattern
from adaptconv.errors import ConvArgumentError
from adaptconv.kernels.grid import FixedTaps
from adaptconv.kernels.masked import Masked

LAYERS = {1: AdaptiveConv1d, 2: AdaptiveConv2d, 3: AdaptiveConv3d}
CALLS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
BOTH = ["masked", "straight-through"]
MODES: list[dict[str, Any]] = [
    {"mask": "shared"}, {"mask": "weights"}, {"mask": "rows"}, {"density": 0.3}, {"density": 1.0}, {"density": 1e-6},
    {"threshold": 0.1}, {"threshold": 0.0}, {"threshold": 1e6},
]  # fmt: skip


def family_of(axes: int, mode: dict[str, Any], gradient: str, c_in: int = 2, **settings: Any) -> Masked:
    size, kind = (3,) * axes, mode.get("mask")
    if kind is None:
        return Masked(3, **mode, gradient=gradient, **settings)
    generator = torch.Generator().manual_seed(3)
    if kind == "rows":
        mask = torch.ones(4, c_in, *size)
        mask[1] = 0
    else:
        mask = (torch.rand((4, c_in, *size) if kind == "weights" else size, generator=generator) < 0.4).float()
    mask[..., -1] = 0 if kind != "rows" else 1
    mask.flatten()[0] = 1
    return Masked(3, mask=mask, gradient=gradient, **settings)


def mask_by_hand(mode: dict[str, Any], layer: Any) -> Tensor:
    """Which weights count, by sorting or from the mask."""
    weight = layer.weight.detach()
    magnitude = weight.abs()
    if "mask" in mode:
        return layer.mask.expand_as(weight)
    if "threshold" in mode:
        return magnitude >= min(mode["threshold"], float(magnitude.max()))
    kept = max(1, round(mode["density"] * weight.numel()))
    return magnitude >= magnitude.flatten().sort(descending=True).values[kept - 1]


@pytest.mark.parametrize("gradient", BOTH)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_exact_and_with_the_gradient_it_says(axes: int, mode: dict[str, Any], gradient: str) -> None:
    layer = LAYERS[axes](
        4, 4, family_of(axes, mode, gradient, dilation=2), groups=2, padding="same", dtype=torch.float64
    )  # fmt: skip
    mask = mask_by_hand(mode, layer)
    assert mask.any()
    x = torch.randn(2, 4, *(9, 7, 6)[:axes], dtype=torch.float64, requires_grad=True)
    before = layer.weight.detach().clone()
    dense = (layer.weight.detach() * mask).requires_grad_()
    right = CALLS[axes](x, dense, layer.bias, padding="same", dilation=2, groups=2)
    found = layer(x)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    dy = torch.randn_like(found)
    mine = torch.autograd.grad(found, (x, layer.weight, layer.bias), dy)
    theirs = list(torch.autograd.grad(right, (x, dense, layer.bias), dy))
    if gradient == "masked":
        theirs[1] = theirs[1] * mask
    torch.testing.assert_close(mine, tuple(theirs), rtol=0, atol=1e-12)
    assert torch.equal(layer.weight, before)
    spread = torch.zeros(*dense.shape[:2], *layer.taps.window, dtype=torch.float64)
    spread[(slice(None), slice(None), *(slice(None, None, 2),) * axes)] = dense.detach()
    assert torch.equal(layer.kernel.dense(), spread)


def test_the_taps_are_what_is_live_in_any_channel() -> None:
    mask = torch.zeros(4, 2, 3, 3)
    mask[0, 1, 0, 1] = mask[3, 0, 2, 2] = 1
    per_weight = AdaptiveConv2d(2, 4, Masked(3, mask=mask))
    assert str(per_weight.taps) == "010/000/001~0.125"  # each channel pair holds an eighth of them, on average
    assert str(AdaptiveConv2d(2, 4, Masked(3, mask="010/000/001")).taps) == "010/000/001"
    assert str(AdaptiveConv2d(2, 4, Masked(3, mask="010/000/001", dilation=2)).taps) == "00100/00000/00000/00000/00001"
    full = TapPattern.grid((3, 3))
    straight = Masked(3, mask=mask, gradient="straight-through")
    for family, share in ((straight, 2 / 72), (Masked(3, density=0.5), 0.5), (Masked(3, threshold=0.1), 1)):
        assert AdaptiveConv2d(2, 4, family).taps == full.with_density(share)


@pytest.mark.parametrize(
    "mask",
    [
        "010/110/001",
        TapPattern.parse("010/110/001"),
        [[0, 1, 0], [1, 1, 0], [0, 0, 1]],
        ((False, True, False), (True, True, False), (False, False, True)),
        torch.tensor([[0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool),
        torch.tensor([[0, 2.5, 0], [-1, 1, 0], [0, 0, 1]]).numpy(),
    ],
    ids=["text", "pattern", "lists", "tuples", "tensor", "array"],
)
def test_a_mask_in_any_spelling(mask: Any) -> None:
    family = Masked(3, mask=mask)
    assert family == Masked(3, mask="010/110/001") and hash(family) == hash(Masked(3, mask="010/110/001"))
    layer = AdaptiveConv2d(1, 1, family)
    assert str(layer.taps) == "010/110/001"
    assert layer.mask.dtype is torch.bool
    assert "mask=<3x3, 4 live>" in repr(layer)


@pytest.mark.parametrize("mode", MODES[:4] + MODES[6:7], ids=str)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_masked_gradients_are_the_true_ones(axes: int, mode: dict[str, Any]) -> None:
    layer = LAYERS[axes](2, 4, family_of(axes, mode, "masked"), padding=1, dtype=torch.float64)
    with torch.no_grad():  # no two magnitudes, and no limit, so near that a small step crosses
        count = layer.weight.numel()
        layer.weight.copy_((torch.randperm(count) + 0.3).reshape(layer.weight.shape) / count - 0.5)
    x = torch.randn(1, 2, *(4, 3, 3)[:axes], dtype=torch.float64, requires_grad=True)
    buffers = {"mask": layer.mask} if "mask" in mode else {}

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias, **buffers}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias), fast_mode=axes > 1)
    assert torch.autograd.gradgradcheck(call, (x, layer.weight, layer.bias), fast_mode=True)


def test_straight_through_weights_come_back() -> None:
    layer = AdaptiveConv1d(1, 1, Masked(3, density=0.34, gradient="straight-through"), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[[0.5, 0.4, 0.1]]]))
    x = torch.zeros(1, 1, 3)
    x[..., 1] = 1.0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.2)
    assert layer(x).item() == 0
    (-layer(x)).sum().backward()
    optimizer.step()
    assert layer(x).item() == pytest.approx(0.6)


def test_ties_are_kept_and_nothing_is_ever_all_zero() -> None:
    layer = AdaptiveConv2d(2, 2, Masked(3, density=0.5), bias=False)
    nn.init.constant_(layer.weight, -2.0)
    assert bool((layer.kernel.dense() == -2).all())
    for family in (Masked(3, density=1e-9), Masked(3, threshold=1e9)):
        layer = AdaptiveConv2d(2, 2, family)
        dense = layer.kernel.dense()
        assert int((dense != 0).sum()) == 1
        assert float(dense.detach().abs().max()) == float(layer.weight.detach().abs().max())


@pytest.mark.parametrize("family", [Masked(3, density=0.2), Masked(3, threshold=0.1)], ids=str)
def test_a_nan_is_not_masked_away(family: Masked) -> None:
    layer = AdaptiveConv1d(2, 2, family)
    with torch.no_grad():
        layer.weight[0, 0, 0] = math.nan
    assert bool(layer(torch.ones(1, 2, 5)).isnan().any())


def test_a_dead_weight_may_be_anything_under_a_fixed_mask() -> None:
    mask = torch.ones(2, 2, 3)
    mask[0, 0, 1] = 0
    layer = AdaptiveConv1d(2, 2, Masked(3, mask=mask))
    with torch.no_grad():
        layer.weight[0, 0, 1] = math.inf
    y = layer(torch.randn(1, 2, 5))
    y.sum().backward()
    assert bool(y.isfinite().all()) and float(layer.weight.grad[0, 0, 1]) == 0


def test_it_starts_with_the_variance_of_a_dense_layer() -> None:
    wanted = 1 / 3  # of an output, for inputs of variance 1
    mask = torch.rand(256, 32, 3, 3) < 0.2
    for family in (
        Masked(3, mask=mask), Masked(3, mask="010/111/010"), Masked(3, density=0.1), Masked(3, density=1.0),
        Masked(3, threshold=0.0), Masked(3, mask=mask, gradient="straight-through"),
    ):  # fmt: skip
        layer = AdaptiveConv2d(32, 256, family)
        found = layer.kernel.dense().detach().double().square().sum(dim=(1, 2, 3)).mean()
        assert float(found) == pytest.approx(wanted, rel=0.05), family


def test_the_density_is_of_the_whole_layer() -> None:
    layer = AdaptiveConv2d(8, 8, Masked(3, density=0.25), groups=4)
    with torch.no_grad():
        layer.weight[:4] *= 100
    dense = layer.kernel.dense()
    assert int((dense != 0).sum()) == round(0.25 * layer.weight.numel())
    assert not dense[4:].any()


@pytest.mark.parametrize("gradient", BOTH)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_copies_checkpoints_and_frozen_layers(mode: dict[str, Any], gradient: str) -> None:
    layer = AdaptiveConv2d(2, 4, family_of(2, mode, gradient), padding=1)
    x = torch.randn(1, 2, 6, 6)
    right = layer(x)
    assert set(layer.state_dict()) == {"weight", "bias"} | ({"mask"} if "mask" in mode else set())
    other = AdaptiveConv2d(2, 4, family_of(2, mode, gradient), padding=1)
    other.load_state_dict(layer.state_dict(), strict=True)
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), right)
        assert copied.family == layer.family
    plain = nn.Conv2d(2, 4, 3, padding=1)
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other.weight, plain.weight)
    assert "mask" not in mode or torch.equal(other.mask, layer.mask)
    frozen = copy.deepcopy(layer).freeze()
    assert isinstance(frozen.family, FixedTaps)
    torch.testing.assert_close(frozen(x), right)
    assert not hasattr(frozen, "mask")


def test_without_gradients_a_changed_weight_is_seen() -> None:
    layer = AdaptiveConv1d(2, 2, Masked(3, density=0.5), bias=False)
    x = torch.randn(1, 2, 8)
    with torch.no_grad():
        first = layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), 2 * first)
        layer.weight.data.neg_()
        torch.testing.assert_close(layer(x), -2 * first)


def test_a_checkpoint_with_another_mask_is_refused() -> None:
    layer = AdaptiveConv2d(2, 4, Masked(3, mask="111/010/000"))
    state = AdaptiveConv2d(2, 4, Masked(3, mask="111/010/001")).state_dict()
    before = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"3, 3\) with 5 live .* with 4: build the layer with Masked\(size, mask="):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match="kills every weight"):
        layer.load_state_dict({**before, "mask": torch.zeros(3, 3, dtype=torch.bool)})
    with pytest.raises(RuntimeError, match=r"\(4, 2, 3, 3\) with 72 live"):
        layer.load_state_dict({**before, "mask": torch.ones(4, 2, 3, 3)})
    built = AdaptiveConv2d(2, 4, Masked(3, mask=state["mask"]))
    built.load_state_dict(state)
    assert str(built.taps) == "111/010/001"
    with pytest.raises(RuntimeError, match="has a fixed mask: build the layer with"):
        AdaptiveConv2d(2, 4, Masked(3, density=0.5)).load_state_dict(state)


def test_another_mask_by_setting_the_family() -> None:
    layer = AdaptiveConv2d(2, 4, Masked(3, mask="111/010/000"))
    weight = layer.weight
    layer.family = Masked(3, mask="000/010/111")
    assert layer.weight is weight
    assert torch.equal(layer.mask, torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1]]).bool())
    x = torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight * layer.mask, layer.bias))
    layer.family = Masked(3, density=0.5)
    assert layer.weight is weight and set(layer.state_dict()) == {"weight", "bias"}
    AdaptiveConv2d(2, 4, Masked(3, density=0.5)).load_state_dict(layer.state_dict())


def test_settings_change_without_the_weight() -> None:
    layer = AdaptiveConv2d(2, 4, Masked(3, density=0.25), padding=1)
    weight = layer.weight
    for family in (replace(layer.family, density=0.5), Masked(3, threshold=0.05, gradient="straight-through")):
        layer.family = family
        assert layer.weight is weight
        kept = int((layer.kernel.dense() != 0).sum())
        assert kept == (36 if family.density else int((weight.abs() >= 0.05).sum()))
    with pytest.raises(ConvArgumentError, match="make a new layer"):
        layer.family = Masked(3, mask="111/111/110")


def test_a_layer_made_on_meta_gets_its_mask_with_its_values() -> None:
    with torch.device("meta"):
        layer = AdaptiveConv2d(2, 4, Masked(3, mask="111/010/000"))
    assert layer.weight.is_meta and layer.mask.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.mask, torch.tensor([[1, 1, 1], [0, 1, 0], [0, 0, 0]]).bool())
    assert layer.half().mask.dtype is torch.bool


@pytest.mark.parametrize(
    ("mode", "gradient"),
    [(MODES[0], "masked"), (MODES[1], "masked"), (MODES[1], "straight-through"), (MODES[3], "masked"),
     (MODES[6], "straight-through")],
    ids=str,
)  # fmt: skip
def test_compiles_and_exports_whole(mode: dict[str, Any], gradient: str) -> None:
    layer = AdaptiveConv2d(2, 4, family_of(2, mode, gradient), padding=1)
    x = torch.randn(1, 2, 6, 6)
    right = layer(x)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), layer.weight), torch.autograd.grad(right.square().sum(), layer.weight)
    )
    exported = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(exported.module(check_guards=False)(x), right)


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("exactly one of mask, density and threshold; got none", {}),
        (r"exactly one of .*; got \['mask', 'density'\]", {"mask": "111/111/111", "density": 0.5}),
        (r"exactly one of .*; got \['density', 'threshold'\]", {"threshold": 0.1, "density": 0.5}),
        ("above 0 and at most 1; got 0", {"density": 0}),
        ("above 0 and at most 1; got 1.5", {"density": 1.5}),
        ("above 0 and at most 1; got -0.1", {"density": -0.1}),
        ("density must be a number and not NaN, got nan", {"density": math.nan}),
        ("density must be a number and not NaN, got True", {"density": True}),
        ("density must be a number and not NaN, got '0.5'", {"density": "0.5"}),
        ("threshold must be a number and not NaN, got nan", {"threshold": math.nan}),
        ("finite magnitude of at least 0; got inf", {"threshold": math.inf}),
        ("finite magnitude of at least 0; got -1", {"threshold": -1}),
        ("gradient must be one of 'masked', 'straight-through'; got 'ste'", {"density": 0.5, "gradient": "ste"}),
        ("kills every weight", {"mask": "000/000/000"}),
        ("kills every weight", {"mask": torch.zeros(4, 2, 3, 3)}),
        ("has NaN in it", {"mask": torch.full((3, 3), math.nan)}),
        ("rectangular array of 0 and 1, got list", {"mask": [[1, 1, 1], [1, 1]]}),
        (r"\[3, 3\], shared by all channels, or \[C_out, C_in/groups, 3, 3\], one value a weight; got \[5, 5\]",
         {"mask": torch.ones(5, 5)}),
        (r"shared by all channels, or .*; got \[9\]", {"mask": torch.ones(9)}),
        (r"\[3, 3\], shared by all channels, or \[4, 2, 3, 3\], one value a weight; got \[4, 1, 3, 3\]",
         {"mask": torch.ones(4, 1, 3, 3)}),
        ("dilation must be at least 1", {"density": 0.5, "dilation": 0}),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(says: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        AdaptiveConv2d(2, 4, Masked(3, **arguments))
