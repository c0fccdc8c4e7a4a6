"""Interpolated kernels: few weights, upsampled by a footprint, computed in whatever way is cheap, and exactly."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, TapPattern, pinned
from adaptconv.errors import BackendRejected, ConvArgumentError
from adaptconv.kernels.footprints import Stencil
from adaptconv.kernels.interpolated import Interpolated

LAYERS: dict[int, Any] = {1: AdaptiveConv1d, 2: AdaptiveConv2d, 3: AdaptiveConv3d}
CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SQUARE = torch.tensor([[0.3, 0.5, -0.2], [0.6, 1.0, 0.4], [0.1, 0.7, 0.25]], dtype=torch.float64)  # no outer product
SKEWED = (0.25, -0.5, 1.0, 0.75, 0.125)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def interpolated(weight: Tensor, rounds: int, fade: bool) -> Tensor:
    """Linear interpolation by torch's own image resizing, zeros around the kernel where it fades out."""
    axes = weight.dim() - 2
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[axes]
    for _ in range(rounds):
        if fade:
            weight = F.pad(weight, (1, 1) * axes)
        size = [2 * n - 1 for n in weight.shape[2:]]
        weight = F.interpolate(weight, size, mode=mode, align_corners=True)
        if fade:
            weight = weight[(..., *(slice(1, -1),) * axes)]
    return weight


def widened(weight: Tensor, stencil: Tensor, rounds: int, fade: bool) -> Tensor:
    """Any footprint, by the definition: each weight written out as the footprint around twice its place."""
    half = [extent // 2 for extent in stencil.shape]
    for _ in range(rounds):
        size = weight.shape[2:]
        margin = half if fade else [0] * len(half)
        wide = weight.new_zeros(*weight.shape[:2], *(2 * n - 1 + 2 * m for n, m in zip(size, margin, strict=True)))
        for place in itertools.product(*map(range, size)):
            for step in itertools.product(*map(range, stencil.shape)):
                at = [2 * i + j - h + m for i, j, h, m in zip(place, step, half, margin, strict=True)]
                if all(0 <= i < extent for i, extent in zip(at, wide.shape[2:], strict=True)):
                    wide[(..., *at)] += weight[(..., *place)] * stencil[step]
        weight = wide
    return weight


def outer(*filters: Any) -> Tensor:
    product = torch.ones((), dtype=torch.float64)
    for values in filters:
        product = product[..., None] * torch.as_tensor(values, dtype=torch.float64)
    return product


def made(axes: int, family: Interpolated, **settings: Any) -> Any:
    torch.manual_seed(3)
    return LAYERS[axes](4, 6, family, groups=2, **settings).double()


# ---- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fade", [True, False])
@pytest.mark.parametrize("rounds", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [(3,), (4,), (3, 3), (2, 5), (1, 3), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("learn", [False, True], ids=["fixed", "learnt"])
def test_the_kernel_is_the_plain_one_interpolated_as_an_image_is(
    size: tuple[int, ...], rounds: int, fade: bool, learn: bool
) -> None:
    layer = made(len(size), Interpolated(size, rounds, fade, learn_footprint=learn and rounds > 0))
    assert layer.weight.shape == (6, 2, *size)
    dense = layer.kernel.dense()
    reach = 2**rounds - 1 if fade else 0
    assert dense.shape[2:] == tuple((n - 1) * 2**rounds + 1 + 2 * reach for n in size) == layer.kernel_size
    torch.testing.assert_close(dense, interpolated(layer.weight, rounds, fade), **EXACT)


@pytest.mark.parametrize("fade", [True, False])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize(
    ("axes", "footprint", "stencil"),
    [
        (1, SKEWED, outer(SKEWED)),
        (2, SKEWED, outer(SKEWED, SKEWED)),
        (2, [SKEWED, (0.5, 1, 0.25)], outer(SKEWED, (0.5, 1, 0.25))),
        (2, ((1,), torch.tensor([0.5, 1.0, 0.25])), outer((1,), (0.5, 1, 0.25))),
        (2, SQUARE, SQUARE),
        (2, SQUARE.numpy(), SQUARE),
        (2, Stencil((3, 3), tuple(SQUARE.flatten().tolist())), SQUARE),
        (2, outer(SKEWED, (0.5, 1, 0.25)), outer(SKEWED, (0.5, 1, 0.25))),
        (3, SQUARE[:, None].expand(3, 3, 3) + 0.5 * SQUARE, SQUARE[:, None].expand(3, 3, 3) + 0.5 * SQUARE),
    ],
    ids=["1d", "one", "each", "bare axis", "tensor", "array", "stencil", "outer product", "3d"],
)
def test_any_footprint_is_spread_by_the_definition(
    axes: int, footprint: Any, stencil: Tensor, rounds: int, fade: bool
) -> None:
    family = Interpolated(3 if axes < 3 else 2, rounds, fade, footprint)
    layer = made(axes, family)
    expected = widened(layer.weight.detach(), stencil, rounds, fade)
    torch.testing.assert_close(layer.kernel.dense().detach(), expected, **EXACT)
    assert hash(family) == hash(Interpolated(family.size, rounds, fade, footprint))


def test_a_separable_footprint_is_kept_on_the_taps_even_if_given_as_a_tensor() -> None:
    for footprint in ("linear", (0.5, 1, 0.5), ((0.5, 1, 0.5), (0.5, 1, 0.5)), outer((0.5, 1, 0.5), (0.5, 1, 0.5))):
        layer = AdaptiveConv2d(2, 2, Interpolated(3, footprint=footprint))
        assert layer.taps == TapPattern.grid((3, 3), (2, 2)).spread_by(((0.5, 1, 0.5), (0.5, 1, 0.5)))
        assert layer.family.identity
    twice = AdaptiveConv2d(2, 2, Interpolated(3, 2)).taps
    ramp = (0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25)
    assert twice == TapPattern.grid((3, 3), (4, 4)).spread_by((ramp, ramp))
    assert AdaptiveConv2d(2, 2, Interpolated(3, footprint=(1,))).taps == TapPattern.grid((3, 3), (2, 2))


# ---- the layer ----------------------------------------------------------------------------------

FAMILIES = {
    "linear": Interpolated(3),
    "twice": Interpolated(3, 2),
    "cut": Interpolated(3, 2, fade=False),
    "even": Interpolated(2, footprint=SKEWED),
    "learnt": Interpolated(3, footprint=(0.4, 1.1, 0.3), learn_footprint=True),
    "learnt twice": Interpolated(3, 2, learn_footprint=True),
    "learnt cut": Interpolated(3, fade=False, learn_footprint=True),
    "plain": Interpolated(3, 0),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_layer_is_the_convolution_with_its_dense_kernel(axes: int, family: Interpolated) -> None:
    x = torch.randn(2, 4, *(11, 10, 9)[:axes], dtype=torch.float64)
    for settings in ({"padding": "same"}, {"padding": 3, "stride": 2}, {"padding": 8}, {"padding": 9, "stride": 3}):
        layer = made(axes, family, **settings)
        stride, padding = settings.get("stride", 1), settings["padding"]
        dense = layer.kernel.dense()
        expected = CONV[axes](x, dense, layer.bias, stride, padding, 1, 2)
        torch.testing.assert_close(layer(x), expected, **EXACT)
        torch.testing.assert_close(layer(x[0]), expected[0], **EXACT)
    wide = torch.randn(1, 4, *(17, 16, 15)[:axes], dtype=torch.float64)
    layer = made(axes, family, padding="valid", bias=False)
    torch.testing.assert_close(layer(wide), CONV[axes](wide, layer.kernel.dense(), groups=2), **EXACT)


@pytest.mark.parametrize(("size", "axes"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("c_out", [4, 8])
def test_an_inseparable_footprint_is_exact_in_steps_and_on_the_wide_kernel(size: int, axes: int, c_out: int) -> None:
    footprint = SQUARE if axes == 2 else torch.tensor([0.5, 1.0, 0.25])
    layer = LAYERS[axes](4, c_out, Interpolated(size, footprint=footprint), groups=4, padding=4, stride=2).double()
    stencil = footprint.double()
    dense = widened(layer.weight.detach(), stencil, 1, True)
    x = torch.randn(2, 4, *(9,) * axes, dtype=torch.float64)
    torch.testing.assert_close(layer(x), CONV[axes](x, dense, layer.bias, 2, 4, 1, 4), **EXACT)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
@pytest.mark.parametrize("name", ["linear", "learnt", "cut"])
def test_padding_modes_pad_the_wide_window(name: str, mode: str) -> None:
    layer = made(2, FAMILIES[name], padding=(3, 2), padding_mode=mode)
    x = torch.randn(1, 4, 9, 10, dtype=torch.float64)
    padded = F.pad(x, (2, 2, 3, 3), mode=mode)
    torch.testing.assert_close(layer(x), F.conv2d(padded, layer.kernel.dense(), layer.bias, groups=2), **EXACT)


@pytest.mark.parametrize("name", ["linear", "cut", "learnt", "learnt twice", "learnt cut"])
def test_first_and_second_derivatives(name: str) -> None:
    torch.manual_seed(0)
    layer = AdaptiveConv1d(2, 2, FAMILIES[name], padding=3, stride=2).double()
    names = [key for key, _ in layer.named_parameters()]
    x = torch.randn(1, 2, 13, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_gradients_of_a_learnt_footprint_are_those_through_the_dense_kernel(rounds: int) -> None:
    layer = made(2, Interpolated(3, rounds, learn_footprint=True), padding=4)
    x = torch.randn(2, 4, 12, 11, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.weight, layer.footprint, layer.bias)
    y = layer(x)
    expected = F.conv2d(x, layer.kernel.dense(), layer.bias, 1, 4, 1, 2)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("name", ["linear", "cut", "learnt"])
def test_autocast_convolves_in_bfloat16(name: str) -> None:
    layer = made(2, FAMILIES[name], padding=3).float()
    x = torch.randn(2, 4, 12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


# ---- initialisation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axes", "settings"),
    [
        (2, {}),
        (2, {"rounds": 2}),
        (2, {"fade": False}),
        (2, {"rounds": 2, "fade": False}),
        (2, {"footprint": SQUARE}),
        (2, {"footprint": SQUARE, "fade": False, "rounds": 2}),
        (2, {"learn_footprint": True}),
        (1, {"rounds": 3, "footprint": SKEWED, "fade": False}),
        (3, {}),
    ],
    ids=str,
)
def test_white_noise_comes_out_as_strong_as_from_a_plain_convolution(axes: int, settings: dict[str, Any]) -> None:
    # The energy of the kernel is the output's variance on white noise of variance 1.
    torch.manual_seed(0)
    c_out, c_in = 256, 64
    layer = LAYERS[axes](c_in, c_out, Interpolated(3, **settings), bias=False)
    naive = LAYERS[axes](c_in, c_out, Interpolated(3, rescale=False, **settings), bias=False)
    plain = LAYERS[axes](c_in, c_out, 3, bias=False)
    energy = {id(m): float(m.kernel.dense().detach().double().square().sum()) / c_out for m in (layer, naive, plain)}
    assert energy[id(plain)] == pytest.approx(1 / 3, rel=0.02)  # torch starts with variance 1 / (3 fan_in)
    assert energy[id(layer)] == pytest.approx(energy[id(plain)], rel=0.04)
    gain = layer.family._gain
    assert energy[id(naive)] == pytest.approx(energy[id(plain)] / gain**2, rel=0.04)
    assert abs(gain - 1) > 0.05


def test_the_output_itself_on_white_noise() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32, 40, 40)
    kinds: list[Any] = [3, Interpolated(3), Interpolated(3, rescale=False), Interpolated(3, 2, fade=False)]
    with torch.no_grad():
        plain, fixed, naive, cut = (float(AdaptiveConv2d(32, 256, kind, bias=False)(x).std()) for kind in kinds)
    assert fixed == pytest.approx(plain, rel=0.05)
    assert cut == pytest.approx(plain, rel=0.05)
    assert naive == pytest.approx(1.5 * plain, rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [{}, {"rounds": 2}, {"fade": False}, {"rounds": 2, "footprint": SQUARE, "fade": False}, {"footprint": SQUARE}],
    ids=str,
)
def test_smooth_input_comes_out_as_strong_where_that_is_asked_for(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = AdaptiveConv2d(64, 512, Interpolated(3, rescale="smooth", **settings), bias=False)
    plain = AdaptiveConv2d(64, 512, 3, bias=False)
    # On a constant image a kernel answers with its sum.
    theirs, ours = (m.kernel.dense().detach().double().sum((2, 3)).square().mean() for m in (plain, layer))
    assert float(ours) == pytest.approx(float(theirs), rel=0.05)


def test_the_gain_of_the_linear_footprint_is_as_documented() -> None:
    for axes, rounds, gain in ((2, 1, 1 / 1.5), (2, 2, 1 / 2.75), (1, 1, 1.5**-0.5), (3, 1, 1.5**-1.5), (2, 0, 1.0)):
        for rescale in (True, "white"):
            assert Interpolated(3, rounds, rescale=rescale).bound(axes)._gain == pytest.approx(gain, rel=1e-12)
    for axes, rounds, gain in ((2, 1, 1 / 4), (2, 2, 1 / 16), (1, 1, 1 / 2), (2, 0, 1.0)):
        assert Interpolated(3, rounds, rescale="smooth").bound(axes)._gain == pytest.approx(gain, rel=1e-12)
    layer = AdaptiveConv2d(4, 64, Interpolated(3, 2), groups=2)
    bound = (2 * 9) ** -0.5
    assert 0.9 * bound / 2.75 < float(layer.weight.detach().abs().max()) <= bound / 2.75
    assert layer.bias is not None
    assert 0.7 * bound < float(layer.bias.detach().abs().max()) <= bound


# ---- as a module --------------------------------------------------------------------------------


def test_a_plain_checkpoint_loads_and_is_interpolated() -> None:
    plain = nn.Conv2d(4, 6, 3).double()
    for family in (Interpolated(3), Interpolated(3, 2, fade=False), Interpolated(3, footprint=SQUARE)):
        layer = AdaptiveConv2d(4, 6, family).double()
        layer.load_state_dict(plain.state_dict(), strict=True)
        assert list(layer.state_dict()) == list(plain.state_dict())
        assert torch.equal(layer.weight, plain.weight)
        plain.load_state_dict(layer.state_dict(), strict=True)
    learnt = AdaptiveConv2d(4, 6, Interpolated(3, learn_footprint=True)).double()
    assert learnt.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["footprint"]
    torch.testing.assert_close(learnt.kernel.dense(), interpolated(plain.weight, 1, True), **EXACT)


def test_a_plain_kernel_may_grow_during_training() -> None:
    layer = AdaptiveConv2d(2, 3, Interpolated(3, 0), padding="same").double()
    weight = layer.weight
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.bias, padding=1), **EXACT)
    for rounds in (1, 2):
        layer.family = Interpolated(3, rounds)
        assert layer.weight is weight
        dense = interpolated(weight, rounds, True)
        torch.testing.assert_close(layer(x), F.conv2d(x, dense, layer.bias, padding="same"), **EXACT)


@pytest.mark.parametrize("name", ["linear", "cut", "learnt", "learnt cut"])
def test_copies_and_exports(name: str) -> None:
    layer = made(2, FAMILIES[name], padding=3).eval()
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        right = layer(x)
        assert torch.equal(layer(x), right)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.family == layer.family
            assert torch.equal(other(x), right)
            other.weight.zero_()
            assert torch.equal(other(x), other.bias[:, None, None].expand_as(right))
        assert torch.equal(layer(x), right)
        for strict in (True, False):
            program = torch.export.export(layer, (x,), strict=strict)
            torch.testing.assert_close(program.module()(x), right, **EXACT)


@pytest.mark.parametrize("name", ["linear", "cut", "learnt twice"])
def test_one_graph_trains_and_evaluates(name: str) -> None:
    layer = made(2, FAMILIES[name], padding=5, stride=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 12, 11, dtype=torch.float64)
    expected = layer(x)
    right = torch.autograd.grad(expected.square().sum(), tuple(layer.parameters()))
    y = compiled(x)
    torch.testing.assert_close(y, expected, **EXACT)
    gradients = torch.autograd.grad(y.square().sum(), tuple(layer.parameters()))
    torch.testing.assert_close(gradients, right, rtol=1e-10, atol=1e-10)
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, **EXACT)


def test_inductor_compiles_an_inseparable_footprint() -> None:
    layer = made(2, Interpolated(3, footprint=SQUARE), padding=3).eval()
    x = torch.randn(1, 4, 10, 10, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), **EXACT)


def test_freezing_leaves_the_wide_kernel() -> None:
    layer = made(2, Interpolated(3, footprint=(0.5, 1, 0), learn_footprint=True), padding=3)
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    right = layer(x)
    layer.freeze()
    assert list(layer.state_dict()) == ["bias", "weight"]
    assert layer.weight.shape == (6, 2, 36)  # the last row and column of the 7x7 window have no weight
    torch.testing.assert_close(layer(x), right, **EXACT)


def test_the_footprint_first_and_the_dense_kernel_agree() -> None:
    layer = made(2, Interpolated(3, 2), padding=7)
    x = torch.randn(2, 4, 14, 13, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("factored", "dense"):
        with pinned(backend):
            y = layer(x)
            assert layer.plans.forward.choice.backend == backend
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    with pinned("native"), pytest.raises(BackendRejected):
        layer(x)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "settings"),
    [
        ("rounds must be an int of at least 0, got -1", {"rounds": -1}),
        ("rounds must be an int of at least 0, got 1.5", {"rounds": 1.5}),
        ("rounds must be an int of at least 0, got True", {"rounds": True}),
        ("size must be at least 1", {"size": 0}),
        ("size must be an int or 2 ints", {"size": (3, 3, 3)}),
        ("a footprint is 'linear', or values; got 'cubic'", {"footprint": "cubic"}),
        ("odd lengths, so that there is a centre; got \\(2,\\)", {"footprint": (1, 1)}),
        ("odd lengths", {"footprint": ()}),
        ("odd lengths", {"footprint": torch.ones(3, 4)}),
        ("must be finite", {"footprint": (1, math.nan, 1)}),
        ("must not be all zero", {"footprint": (0, 0, 0)}),
        ("must not be all zero", {"footprint": torch.zeros(3, 3)}),
        ("has 3 filters, the kernel 2 axes", {"footprint": ((1,), (1,), (1,))}),
        (r"has shape \(3, 3, 3\), the kernel 2 axes", {"footprint": torch.ones(3, 3, 3)}),
        ("1 to 3 axes", {"footprint": torch.ones(1, 1, 1, 1)}),
        ("rectangular", {"footprint": (((1, 2, 3), (1, 2)),)}),
        ("one filter for all axes or one an axis", {"footprint": ((0.5, 1, 0.5), 1)}),
        ("made of numbers", {"footprint": ("a", "b", "c")}),
        ("1 to 3 axes", {"footprint": 3}),
        ("so many values, got 2", {"footprint": Stencil((3, 3), (1.0, 2.0))}),
        ("no round, no footprint to learn", {"rounds": 0, "learn_footprint": True}),
        ("all of one length", {"footprint": ((1,), (0.5, 1, 0.5)), "learn_footprint": True}),
        ("one filter an axis", {"footprint": SQUARE, "learn_footprint": True}),
        ("squares sum up to 0", {"size": 1, "fade": False, "footprint": (1, 0, 0)}),
        ("rescale must be True or 'white', 'smooth', or False; got 'rough'", {"rescale": "rough"}),
        ("sums up to zero", {"footprint": (-0.5, 1, -0.5), "rescale": "smooth"}),
        ("squares sum up to inf", {"footprint": (1e300,)}),
    ],
)
def test_settings_that_do_not_fit_are_refused(says: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        AdaptiveConv2d(2, 2, Interpolated(**{"size": 3, **settings}))


def test_a_call_that_does_not_fit_is_refused_in_words() -> None:
    layer = AdaptiveConv2d(2, 2, Interpolated(3, learn_footprint=True))
    with pytest.raises(ConvArgumentError, match=r"smaller than the kernel's window.*window \(7, 7\)"):
        layer(torch.randn(1, 2, 6, 9))
    with pytest.raises(ConvArgumentError, match="channels"):
        layer(torch.randn(1, 3, 9, 9))
    with pytest.raises(TypeError, match="must be a tensor, got list"):
        layer([1.0])
    with pytest.raises(ConvArgumentError, match="same"):
        layer(torch.randn(1, 2, 9, 9).double())
    with pytest.raises(ConvArgumentError, match="leave dilation at 1"):
        AdaptiveConv2d(2, 2, Interpolated(3), dilation=2)
    with pytest.raises(ConvArgumentError, match="not bound yet"):
        _ = Interpolated(3).taps


def test_a_learnt_footprint_goes_when_the_family_no_longer_learns_one() -> None:
    layer = AdaptiveConv2d(2, 2, Interpolated(3, learn_footprint=True), padding="same")
    layer.family = Interpolated(3)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    x = torch.randn(1, 2, 9, 9)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.kernel.dense(), layer.bias, padding="same"))
