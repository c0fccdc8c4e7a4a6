"""Learnable spacings: elements at real-valued positions, constructed, cached, frozen, shared."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d
from adaptconv.errors import ConvArgumentError
from adaptconv.kernels import shared_spacing
from adaptconv.kernels.construct import construct
from adaptconv.kernels.profiles import VERSIONS, WITH_SIGMA
from adaptconv.kernels.spacing import LearnableSpacing

LAYERS: dict[int, Any] = {1: AdaptiveConv1d, 2: AdaptiveConv2d, 3: AdaptiveConv3d}
CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
WINDOWS = {1: (5,), 2: (4, 5), 3: (3, 4, 5)}


def parameters(
    lead: tuple[int, ...], count: int, window: tuple[int, ...], version: str, seed: int = 0
) -> list[Tensor | None]:
    """Weight, P and SIG in float64, P inside the window and away from whole positions, where hats have corners."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, count)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = []
    for k in window:
        cell = torch.randint(0, k - 1, shape, generator=generator) - k // 2
        rows.append(cell + 0.2 + 0.6 * torch.rand(shape, generator=generator, dtype=torch.float64))
    position = torch.stack(rows)
    sigma = 0.1 + 0.15 * torch.rand(position.shape, generator=generator, dtype=torch.float64)
    return [weight, position, sigma if version in WITH_SIGMA else None]


def formula(
    weight: Tensor, position: Tensor, sigma: Tensor | None, window: tuple[int, ...], version: str
) -> Tensor:  # fmt: skip
    """The definition, one value at a time in the window, from whole windows an element."""
    values: Tensor | None = None
    for axis, k in enumerate(window):
        p = (position[axis] + k // 2).clamp(0, k - 1)
        distance = (torch.arange(k, dtype=p.dtype) - p[..., None]).abs()
        if version == "gauss":
            assert sigma is not None
            g = torch.exp(-0.5 * (distance / (sigma[axis].abs() + 0.27)[..., None]) ** 2)
        else:
            s = 1.0 if sigma is None else (sigma[axis].abs() + 1.0)[..., None]
            g = (s - distance).clamp(min=0)
        g = g.reshape(*g.shape[:-1], *(1,) * axis, k, *(1,) * (len(window) - 1 - axis))
        values = g if values is None else values * g
    assert values is not None
    inner = tuple(range(-len(window), 0))
    if version != "v0":
        values = values / values.sum(inner, keepdim=True)
    return (weight.reshape(*weight.shape, *(1,) * len(window)) * values).sum(weight.dim() - 1)


def learned(tensors: list[Tensor | None]) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors if t is not None]


def rebuilt(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    return inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None


# ---- the construction ---------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_construction_is_the_formula(version: str, axes: int) -> None:
    window = WINDOWS[axes]
    weight, position, sigma = parameters((3, 2), 4, window, version)
    assert weight is not None and position is not None
    for scale in (1.0, 3.0):  # three times as far: outside, read at the border
        here = position * scale
        torch.testing.assert_close(
            construct(weight, here, sigma, window, version), formula(weight, here, sigma, window, version)
        )


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_gradients_and_their_gradients(version: str, axes: int) -> None:
    window = WINDOWS[axes]
    inputs = tuple(learned(parameters((2, 1), 3, window, version)))

    def run(*inputs: Tensor) -> Tensor:
        return construct(*rebuilt(inputs), window, version)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("family", "axes"),
    [
        (LearnableSpacing(3, 5, dense=2), 2),
        (LearnableSpacing(2, 4, dense=(2, 1)), 3),
        (LearnableSpacing(3, 5, shared=True), 1),
        (LearnableSpacing(3, (4, 5), shared=True), 2),
        (LearnableSpacing(2, (2, 3, 4), shared=True), 3),
    ],
    ids=str,
)
def test_gradients_of_every_form(family: LearnableSpacing, axes: int, version: str) -> None:
    family = dataclasses.replace(family, version=version).bound(axes)
    weight, *others = family.slots(2, 2)
    torch.manual_seed(0)
    tensors = [torch.randn(weight.shape, dtype=torch.float64)]
    tensors += [-0.1 - 0.3 * torch.rand(slot.shape, dtype=torch.float64) for slot in others]
    inputs = tuple(t.requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(family.compact, inputs)
    assert torch.autograd.gradgradcheck(family.compact, inputs)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_gradient_passes_through_the_border(version: str) -> None:
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    sigma = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64) if version in WITH_SIGMA else None
    slopes = []
    for at in (-2.0, -7.0):
        position = torch.full((1, 1, 1, 1), at, dtype=torch.float64, requires_grad=True)
        kernel = construct(weight, position, sigma, (5,), version)
        slopes.append(torch.autograd.grad((kernel * torch.arange(5)).sum(), position)[0])
    assert torch.equal(*slopes)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_whole_positions_have_finite_derivatives_of_both_orders(version: str, axes: int) -> None:
    window = WINDOWS[axes]
    torch.manual_seed(0)
    weight, position, sigma = parameters((2, 2), 3, window, version)
    assert weight is not None and position is not None
    position = position.round()
    if version == "max":
        sigma = torch.zeros_like(position)
    inputs = learned([weight, position, sigma])
    kernel = construct(*rebuilt(tuple(inputs)), window, version)
    gradients = torch.autograd.grad((kernel * torch.randn_like(kernel)).sum(), inputs, create_graph=True)
    assert all(g.isfinite().all() for g in gradients)
    if version in ("v1", "max"):
        assert not gradients[1].any()
    else:
        assert gradients[1].any()
    second = torch.autograd.grad(sum((g * torch.randn_like(g)).sum() for g in gradients), inputs, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in second)


def test_at_whole_positions_v0_has_the_slope_to_the_right() -> None:
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    position = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    kernel = construct(weight, position, None, (5,), "v0")
    assert torch.autograd.grad((kernel * torch.tensor([0, 0, 1.0, 7.0, 0])).sum(), position)[0].item() == 6.0


def test_only_the_parameters_are_kept_for_backward() -> None:
    weight, position, sigma = (nn.Parameter(t) for t in parameters((8, 1), 6, (9, 9), "gauss") if t is not None)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        construct(weight, position, sigma, (9, 9))
    own = {t.data_ptr() for t in (weight, position, sigma)}
    assert kept and {t.data_ptr() for t in kept} <= own


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("version", VERSIONS)
def test_half_precision_is_computed_in_float32(version: str, dtype: torch.dtype) -> None:
    half = [None if t is None else t.to(dtype) for t in parameters((4, 2), 5, (7, 6), version)]
    wide = [None if t is None else t.double() for t in half]
    inputs, wider = learned(half), learned(wide)
    kernel = construct(*rebuilt(tuple(inputs)), (7, 6), version)
    right = construct(*rebuilt(tuple(wider)), (7, 6), version)
    assert kernel.dtype is dtype
    assert torch.equal(kernel, right.float().to(dtype)) or (kernel - right).abs().max() < torch.finfo(dtype).eps
    dk = torch.randn_like(kernel)
    mine, wanted = torch.autograd.grad(kernel, inputs, dk), torch.autograd.grad(right, wider, dk.double())
    for g, r in zip(mine, wanted, strict=True):
        assert g.dtype is dtype
        torch.testing.assert_close(g.double(), r, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("version", VERSIONS)
def test_autocast_narrows_neither_pass(version: str) -> None:
    inputs = learned([None if t is None else t.float() for t in parameters((4, 2), 5, (7, 6), version)])
    dk = torch.randn(4, 2, 7, 6)
    plain = construct(*rebuilt(tuple(inputs)), (7, 6), version)
    right = torch.autograd.grad(plain, inputs, dk)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = construct(*rebuilt(tuple(inputs)), (7, 6), version)
        gradients = torch.autograd.grad(kernel, inputs, dk)
    assert torch.equal(kernel, plain)
    assert all(torch.equal(g, r) for g, r in zip(gradients, right, strict=True))


def test_the_construction_goes_through_transforms() -> None:
    weight, position, sigma = parameters((3, 2), 4, (5, 4), "gauss")
    assert weight is not None and position is not None and sigma is not None
    several = torch.stack([position, position + 0.1, position - 0.3])
    mapped = torch.func.vmap(lambda p: construct(weight, p, sigma, (5, 4)))(several)
    for kernel, p in zip(mapped, several, strict=True):
        torch.testing.assert_close(kernel, construct(weight, p, sigma, (5, 4)))

    def energy(p: Tensor) -> Tensor:
        return construct(weight, p, sigma, (5, 4)).square().sum()

    leaf = position.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(energy)(position), torch.autograd.grad(energy(leaf), leaf)[0])
    per_sample = torch.func.vmap(torch.func.grad(energy))(several)
    torch.testing.assert_close(per_sample[0], torch.func.grad(energy)(position))


# ---- the layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_a_layer_convolves_with_its_constructed_kernel(axes: int, version: str) -> None:
    torch.manual_seed(1)
    window = WINDOWS[axes]
    layer = LAYERS[axes](4, 6, LearnableSpacing(3, window, version), 2, 2, groups=2, dtype=torch.float64)
    layer.P.data.uniform_(-2, 2)
    layer.clamp_parameters()
    x = torch.randn(2, 4, *(9,) * axes, dtype=torch.float64)
    sigma = layer.SIG if version in WITH_SIGMA else None
    dense = formula(layer.weight, layer.P, sigma, window, version)
    torch.testing.assert_close(layer.kernel.dense(), dense)
    torch.testing.assert_close(layer(x), CONV[axes](x, dense, layer.bias, 2, 2, 1, 2))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@pytest.mark.parametrize("version", VERSIONS)
def test_positions_along_the_last_axis_alone(version: str) -> None:
    layer = AdaptiveConv3d(2, 4, LearnableSpacing(2, 6, version, dense=(2, 3)), padding=1, dtype=torch.float64)
    assert layer.weight.shape == (4, 2, 2, 3, 2) and layer.P.shape == (1, 4, 2, 2, 3, 2)
    assert layer.kernel_size == (2, 3, 6)
    sigma = layer.SIG if version in WITH_SIGMA else None
    dense = formula(layer.weight, layer.P, sigma, (6,), version)
    x = torch.randn(1, 2, 5, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv3d(x, dense, layer.bias, padding=1))


def test_elements_start_near_the_centre_and_inside_the_window() -> None:
    torch.manual_seed(0)
    layer = AdaptiveConv2d(32, 32, LearnableSpacing(20, (3, 20)))
    bound = (32 * 20) ** -0.5
    assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
    assert layer.bias is not None and float(layer.bias.detach().abs().max()) <= bound
    assert float(layer.P[0].detach().abs().max()) == 1.0  # clamped on its own axis
    assert 1.5 < float(layer.P[1].detach().abs().max()) < 5
    assert 0.45 < float(layer.P[1].detach().std()) < 0.55
    assert (layer.SIG == 0.23).all()
    layer.P.data.fill_(100.0)
    layer.clamp_parameters()
    assert (layer.P[0] == 1).all() and (layer.P[1] == 9).all()
    layer.P.data.fill_(-100.0)
    layer.clamp_parameters()
    assert (layer.P[0] == -1).all() and (layer.P[1] == -10).all()
    assert not AdaptiveConv1d(2, 2, LearnableSpacing(3, 9, "max")).SIG.any()
    assert not hasattr(AdaptiveConv1d(2, 2, LearnableSpacing(3, 9, "v1")), "SIG")
    wide = AdaptiveConv2d(16, 16, LearnableSpacing(5, 9, dense=3)).P.detach()
    assert 3.5 < float(wide.max()) <= 4 and -4 <= float(wide.min()) < -3.5


def test_no_element_vanishes_in_a_window_of_even_size() -> None:
    for version in ("v0", "v1", "max"):
        layer = AdaptiveConv1d(1, 1, LearnableSpacing(1, 4, version))
        with torch.no_grad():
            layer.weight.fill_(1.0)
            for at in (-9.0, -2.0, 0.5, 1.0, 2.0, 9.0):
                layer.P.fill_(at)
                torch.testing.assert_close(layer.kernel.dense().sum(), torch.tensor(1.0))


def test_a_linear_version_says_how_many_taps_a_channel_can_touch() -> None:
    def share(version: str, **settings: Any) -> float:
        return AdaptiveConv2d(4, 4, LearnableSpacing(**settings, version=version), groups=4).taps.density

    assert share("v1", count=34, window=17) == 0.5  # 4 * 34 of 289
    assert share("v0", count=3, window=9, dense=3) == 0.75  # 2 * 3 of 9, in each of 3 rows
    assert share("v1", count=100, window=17) == 1
    assert share("max", count=34, window=17) == share("gauss", count=34, window=17) == 1  # as wide as SIG says
    layer = AdaptiveConv2d(64, 64, LearnableSpacing(12, window=11, version="v1"), groups=64)
    layer.weight.data.fill_(1.0)
    used = (layer.kernel.weight != 0).double().mean()
    assert 0 < used <= layer.taps.density


def test_the_version_changes_while_the_layer_lives() -> None:
    torch.manual_seed(0)
    layer = AdaptiveConv2d(2, 2, LearnableSpacing(3, 5), dtype=torch.float64)
    x = torch.randn(1, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        for version in ("max", "v1", "v0", "gauss", "v1", "max", "gauss"):
            layer.family = dataclasses.replace(layer.family, version=version)
            sigma = layer.SIG if version in WITH_SIGMA else None
            dense = formula(layer.weight, layer.P, sigma, (5, 5), version)
            torch.testing.assert_close(layer(x), F.conv2d(x, dense, layer.bias))
    flat = AdaptiveConv2d(2, 2, LearnableSpacing(3, 5, "v1"))
    with pytest.raises(ConvArgumentError, match="SIG"):
        flat.family = dataclasses.replace(flat.family, version="gauss")


def test_positions_may_be_shared_by_layers_and_written_in_place() -> None:
    torch.manual_seed(0)
    first, second = (AdaptiveConv1d(2, 2, LearnableSpacing(3, 7, "max")) for _ in range(2))
    second.P = first.P
    x = torch.randn(1, 2, 12)
    assert len({id(p) for p in [*first.parameters(), *second.parameters()]}) == 7
    (first(x).sum() + second(x).sum()).backward()
    together = first.P.grad.clone()
    first.P.grad = None
    first(x).sum().backward()
    alone = first.P.grad.clone()
    second(x).sum().backward()
    torch.testing.assert_close(first.P.grad, together)
    assert not torch.equal(alone, together)
    with torch.no_grad():
        before = second(x)
        first.P.uniform_(-3, 3)
        assert not torch.equal(second(x), before)
        first.P.round_()
        second.SIG.zero_()
        dense = second.kernel.dense()
        torch.testing.assert_close(second(x), F.conv1d(x, dense, second.bias))
        # Whole positions and no width: every element is one tap.
        places = (second.P[0] + 3).long()
        torch.testing.assert_close(dense, torch.zeros(2, 2, 7).scatter_add(2, places, second.weight))


def made(layer: Any) -> int:
    """Where the layer's kept weight lies: the same as long as nothing is constructed anew."""
    return int(layer.__dict__["_constructed"].weight.data_ptr())


def test_calls_without_gradients_construct_once() -> None:
    torch.manual_seed(0)
    layer, other = (AdaptiveConv2d(2, 2, LearnableSpacing(3, 5), padding=2) for _ in range(2))
    x = torch.randn(1, 2, 8, 8)

    def right() -> None:
        expected = F.conv2d(x, layer.kernel.dense(), layer.bias, padding=2)
        torch.testing.assert_close(layer(x), expected)
        kept = made(layer)
        torch.testing.assert_close(layer(x), expected)
        assert made(layer) == kept

    def trained() -> None:
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        with torch.enable_grad():
            layer(x).square().sum().backward()
        optimizer.step()

    def assigned() -> None:
        layer.P = other.P

    def switched() -> None:
        layer.family = dataclasses.replace(layer.family, version="max")

    def written() -> None:
        layer.P.data.add_(0.3)

    def rounded() -> None:
        layer.P.round_()

    changes = [trained, lambda: layer.load_state_dict(other.state_dict()), written, rounded, assigned, switched]
    changes.append(lambda: layer.SIG.data.fill_(0.7))
    with torch.no_grad():
        right()
        for change in changes:
            before = layer(x)
            change()
            right()
            assert not torch.equal(layer(x), before)
        layer.double()
        x = x.double()
        right()
        assert layer(x).dtype is torch.float64
    assert layer(x).requires_grad


@pytest.mark.parametrize("shared", [False, True])
def test_copies_are_layers_of_their_own(shared: bool) -> None:
    layer = AdaptiveConv2d(2, 24, LearnableSpacing(3, 5, shared=shared), padding=2)
    x = torch.randn(1, 2, 8, 8)
    with torch.no_grad():
        right = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.family == layer.family
            assert torch.equal(twin(x), right)
            twin.P.add_(1)
            assert not torch.equal(twin(x), right)
        assert torch.equal(layer(x), right)


# ---- freezing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_freezing_to_the_nearest_whole_positions(shared: bool) -> None:
    torch.manual_seed(3)
    layer = AdaptiveConv2d(2, 3, LearnableSpacing(4, (5, 6), "v1", shared=shared), padding=2, dtype=torch.float64)
    layer.P.data.uniform_(-4, 4)
    dense = torch.zeros(3, 2, 5, 6, dtype=torch.float64)
    for o, i, n in itertools.product(range(3), range(2), range(4)):
        row, column = (layer.P[(axis, i, n) if shared else (axis, o, i, n)].item() for axis in (0, 1))
        dense[o, i, min(max(round(row + 2), 0), 4), min(max(round(column + 3), 0), 5)] += layer.weight[o, i, n].item()
    x = torch.randn(1, 2, 9, 9, dtype=torch.float64)
    assert layer.freeze(positions="nearest") is layer
    torch.testing.assert_close(layer.kernel.dense(), dense)
    torch.testing.assert_close(layer(x), F.conv2d(x, dense, layer.bias, padding=2))
    assert len(layer.taps) == int((dense != 0).any(0).any(0).sum()) < 30
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_freezing_the_taps_that_are_touched() -> None:
    torch.manual_seed(3)
    layer = AdaptiveConv1d(2, 2, LearnableSpacing(2, 15, "v1"), padding=7)
    layer.P.data.uniform_(-6, 6)
    x = torch.randn(1, 2, 20)
    right, dense = layer(x), layer.kernel.dense()
    frozen = copy.deepcopy(layer).freeze()
    torch.testing.assert_close(frozen(x), right)
    assert len(frozen.taps) == int((dense != 0).any(0).any(0).sum()) < 15
    rough = copy.deepcopy(layer).freeze(positions="touched", tolerance=0.1)
    assert len(rough.taps) == int((dense.abs() > 0.1).any(0).any(0).sum()) < len(frozen.taps)
    with pytest.raises(ConvArgumentError, match="tap of this kernel is zero"):
        copy.deepcopy(layer).freeze(tolerance=100.0)
    for how in ({"positions": "near"}, {"positions": "nearest", "tolerance": 0.1}, {"way": 1}, {"tolerance": -1.0}):
        with pytest.raises(ConvArgumentError, match="positions='nearest'"):
            layer.freeze(**how)


# ---- errors and checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("count is the number of weights .* window the size of the kernel", {"count": 26, "window": 5}),
        ("wrong way round", {"count": 10, "window": 9, "dense": 3}),
        ("unknown version 'v2' .* 'v0', 'v1', 'max', 'gauss'", {"count": 3, "window": 5, "version": "v2"}),
        ("count, the number of elements, .* got 0", {"count": 0, "window": 5}),
        ("count, the number of elements, .* got 2.5", {"count": 2.5, "window": 5}),
        ("window must be an int or 2 ints", {"count": 3, "window": (5, 5, 5)}),
        ("window must be at least 1", {"count": 3, "window": 0}),
        ("leave dense out", {"count": 3, "window": 5, "dense": 3, "shared": True}),
        ("window .the last axis' alone", {"count": 3, "window": (5, 5), "dense": 3}),
        ("dense must be an int or 1 ints", {"count": 3, "window": 5, "dense": (3, 3)}),
    ],
)
def test_settings_that_do_not_fit_are_refused(says: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        AdaptiveConv2d(2, 2, LearnableSpacing(**arguments))


def test_operands_that_do_not_fit_are_refused() -> None:
    weight, position = torch.randn(2, 1, 3), torch.randn(2, 2, 1, 3)
    with pytest.raises(ConvArgumentError, match="needs SIG"):
        construct(weight, position, None, (5, 5), "gauss")
    with pytest.raises(ConvArgumentError, match="has no SIG"):
        construct(weight, position, position, (5, 5), "v1")
    with pytest.raises(ConvArgumentError, match=r"P is .axes, \*weight.shape. = \(1, 2, 1, 3\)"):
        construct(weight, position, None, (5,), "v1")
    with pytest.raises(ConvArgumentError, match="which 1-D kernels do not have"):
        AdaptiveConv1d(2, 2, LearnableSpacing(3, 5, dense=3))


def test_checkpoints_of_another_version_or_gone_wrong_are_refused() -> None:
    gauss, plain = (AdaptiveConv2d(2, 2, LearnableSpacing(3, 5, version)) for version in ("gauss", "v1"))
    with pytest.raises(
        RuntimeError, match=r"wrong checkpoint version: .* a SIG, .* 'v1'; checkpoints of max and gauss"
    ):
        plain.load_state_dict(gauss.state_dict())
    with pytest.raises(RuntimeError, match=r"wrong checkpoint version: .* no SIG, .* 'gauss'"):
        gauss.load_state_dict(plain.state_dict(), strict=False)
    gauss.clamp_parameters()
    AdaptiveConv2d(2, 2, LearnableSpacing(3, 5, "max")).load_state_dict(gauss.state_dict())
    state = gauss.state_dict()
    state["P"] = state["P"].clone()
    state["P"][0, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="P has values that are not finite"):
        gauss.load_state_dict(state)
    gauss.load_state_dict({"bias": torch.zeros(2)}, strict=False)
    assert not gauss.bias.any()


def test_positions_outside_the_window_are_clamped_when_loaded() -> None:
    layer, larger = AdaptiveConv1d(2, 2, LearnableSpacing(3, 5)), AdaptiveConv1d(2, 2, LearnableSpacing(3, 15))
    larger.P.data.fill_(1.5)
    larger.P.data[0, 0, 0] = torch.tensor([-7.0, 0, 6])
    with pytest.warns(UserWarning, match=r"2 of 12 positions .* outside window=\(5,\)"):
        layer.load_state_dict(larger.state_dict())
    assert layer.P[0, 0, 0].tolist() == [-2.0, 0.0, 2.0]


# ---- shared positions ---------------------------------------------------------------------------

STEPS: list[dict[str, Any]] = [
    {"groups": 2, "padding": "same"},
    {"stride": 2, "padding": 1, "bias": False},
    {"groups": 2, "padding": 3, "padding_mode": "circular"},
]


@pytest.mark.parametrize("settings", STEPS, ids=str)
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_shared_positions_in_steps_are_the_constructed_convolution(
    version: str, axes: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_spacing, "steps_are_less_work", lambda *shapes: True)
    torch.manual_seed(0)
    family = LearnableSpacing(3, WINDOWS[axes], version, shared=True)
    layer = LAYERS[axes](4, 6, family, dtype=torch.float64, **settings)
    layer.P.data.uniform_(-3, 3)
    assert layer.P.shape == (axes, 4 // layer.groups, 3)
    x = torch.randn(3, 4, *(7,) * axes, dtype=torch.float64, requires_grad=True)
    sigma = layer.SIG if version in WITH_SIGMA else None
    spread = [None if t is None else t.unsqueeze(1).expand(axes, *layer.weight.shape) for t in (layer.P, sigma)]
    dense = construct(layer.weight, spread[0], spread[1], WINDOWS[axes], version)
    torch.testing.assert_close(layer.kernel.dense(), dense)
    plain = LAYERS[axes](4, 6, WINDOWS[axes], dtype=torch.float64, **settings)
    del plain.weight
    plain.weight, plain.bias = dense, layer.bias
    y, expected = layer(x), plain(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer(x[0]), expected[0])
    dy = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    wanted = torch.autograd.grad(expected, inputs, dy)
    for mine, right in zip(torch.autograd.grad(y, inputs, dy), wanted, strict=True):
        torch.testing.assert_close(mine, right)
    monkeypatch.setattr(shared_spacing, "_CHUNK_BYTES", 1)  # a few images at a time, planes kept or made again
    for kept in (1 << 30, 0):
        monkeypatch.setattr(shared_spacing, "_KEPT_BYTES", kept)
        y = layer(x)
        torch.testing.assert_close(y, expected)
        for mine, right in zip(torch.autograd.grad(y, inputs, dy), wanted, strict=True):
            torch.testing.assert_close(mine, right)


def test_shared_positions_take_the_way_of_least_work() -> None:
    assert shared_spacing.steps_are_less_work((256, 256, 26), (23, 23), 1)
    assert not shared_spacing.steps_are_less_work((384, 1, 26), (23, 23), 384)  # depthwise: one output a channel
    layer = AdaptiveConv2d(4, 4, LearnableSpacing(3, 5, shared=True), groups=4, padding="same")
    x = torch.randn(2, 4, 9, 9)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.kernel.dense(), layer.bias, padding="same", groups=4))


def test_shared_positions_refuse_another_number_of_channels() -> None:
    layer = AdaptiveConv2d(4, 64, LearnableSpacing(3, 7, shared=True), padding="same")
    for x in (torch.randn(1, 3, 9, 9), torch.randn(9, 9), torch.randn(1, 1, 4, 9, 9)):
        with pytest.raises(ConvArgumentError, match="expect an input with 4 channels and 2 spatial axes"):
            layer(x)


def test_shared_positions_train_under_autocast() -> None:
    torch.manual_seed(0)
    layer = AdaptiveConv2d(4, 64, LearnableSpacing(3, 7, shared=True), padding="same")
    assert shared_spacing.steps_are_less_work(layer.weight.shape, (7, 7), 1)
    x = torch.randn(2, 4, 10, 10)
    right = torch.autograd.grad(layer(x).float().square().mean(), list(layer.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().mean(), list(layer.parameters()))
    for g, r in zip(gradients, right, strict=True):
        assert g.dtype is torch.float32
        torch.testing.assert_close(g, r, rtol=0.05, atol=0.05 * float(r.abs().max()))


# ---- compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "shared"), [("gauss", False), ("v0", False), ("max", True)])
def test_layers_compile_whole(version: str, shared: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer = AdaptiveConv2d(4, 32, LearnableSpacing(2, 7, version, shared=shared), padding="same")
    if version == "max":
        layer.SIG.data.fill_(0.2)
    if version == "v0":
        layer.P.data.round_()
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    inputs = [x, *layer.parameters()]
    dy = torch.randn(2, 32, 9, 9)
    torch.testing.assert_close(compiled(x), layer(x))
    mine, right = (torch.autograd.grad(call(x), inputs, dy) for call in (compiled, layer))
    for g, r in zip(mine, right, strict=True):
        torch.testing.assert_close(g, r, rtol=1e-4, atol=1e-4)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))
        layer.P.uniform_(-2, 2)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("shared", [False, True])
def test_layers_export(shared: bool) -> None:
    layer = AdaptiveConv1d(4, 32, LearnableSpacing(3, 5, shared=shared), padding=2).eval()
    x = torch.randn(2, 4, 9)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for given in (x, torch.randn(5, 4, 9)):
        torch.testing.assert_close(program.module()(given), layer(given))


def test_a_layer_that_left_sigma_behind_loads_its_own_checkpoint_and_freezes_without_it() -> None:
    layer = AdaptiveConv2d(2, 2, LearnableSpacing(3, 5, "gauss"), padding="same", groups=2)
    layer.family = dataclasses.replace(layer.family, version="v1")
    state = layer.state_dict()
    assert "SIG" in state
    layer.load_state_dict(state, strict=True)
    layer.freeze()
    assert sorted(layer.state_dict()) == ["bias", "weight"]
