"""AdaptiveConv1d, 2d and 3d stand wherever torch's layers stand, and know taps besides."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptconv
from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, Kernel, TapPattern, pinned
from adaptconv.errors import ConvArgumentError
from adaptconv.kernels import Grid, Interpolated, Symmetric

PAIRS = [(AdaptiveConv1d, nn.Conv1d, 1), (AdaptiveConv2d, nn.Conv2d, 2), (AdaptiveConv3d, nn.Conv3d, 3)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"dilation": 2, "padding": 2, "groups": 2},
    {"padding": "same"},
    {"padding": "valid", "dtype": torch.float64},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "replicate", "stride": 2},
    {"padding": "same", "dilation": 2, "padding_mode": "circular"},
]
RING = "111/101/111"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "axes"), PAIRS, ids=["1d", "2d", "3d"])
def test_same_seed_same_layer(ours: type, theirs: type, axes: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(7)
    mine = ours(4, 6, 3, **settings)
    torch.manual_seed(7)
    torchs = theirs(4, 6, 3, **settings)
    assert list(mine.state_dict()) == list(torchs.state_dict())
    for name, value in torchs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], value), name
    assert repr(mine) == "Adaptive" + repr(torchs)
    x = torch.randn(2, 4, *(7,) * axes, dtype=settings.get("dtype"), requires_grad=True)
    for way in (None, "gather"):
        with pinned(way) if way else pinned("native"):
            y = mine(x)
        expected = torchs(x)
        assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(mine(x[0]), torchs(x[0]))
        dy = torch.randn_like(expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))


@pytest.mark.parametrize(("ours", "theirs", "axes"), PAIRS, ids=["1d", "2d", "3d"])
def test_the_signature_is_torchs_and_taps(ours: type, theirs: type, axes: int) -> None:
    mine, torchs = inspect.signature(ours.__init__).parameters, inspect.signature(theirs.__init__).parameters
    assert [name for name in mine if name != "taps"] == list(torchs)
    for name, parameter in torchs.items():
        if name != "kernel_size":  # may be left out where taps are given
            assert mine[name].default == parameter.default, name
        assert mine[name].kind == parameter.kind, name
    assert mine["taps"].kind is inspect.Parameter.KEYWORD_ONLY
    layer = ours(2, 2, 3)
    assert isinstance(layer, theirs)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(theirs(2, 2, 3), name)


@pytest.mark.parametrize(("ours", "theirs", "axes"), PAIRS, ids=["1d", "2d", "3d"])
def test_checkpoints_go_both_ways(ours: type, theirs: type, axes: int) -> None:
    mine, torchs = ours(2, 4, 3, groups=2), theirs(2, 4, 3, groups=2)
    mine.load_state_dict(torchs.state_dict(), strict=True)
    x = torch.randn(1, 2, *(5,) * axes)
    torch.testing.assert_close(mine(x), torchs(x))
    nn.init.ones_(mine.weight)
    torchs.load_state_dict(mine.state_dict(), strict=True)
    torch.testing.assert_close(mine(x), torchs(x))


@pytest.mark.parametrize("kind", ["deepcopy", "pickle", "save"])
def test_a_copy_is_a_layer_of_its_own(kind: str) -> None:
    layer = AdaptiveConv2d(2, 4, padding=1, taps=RING)
    x = torch.randn(1, 2, 6, 6)
    right = layer(x)  # a prepared call is held now, and must stay behind
    if kind == "deepcopy":
        other = copy.deepcopy(layer)
    elif kind == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.taps == layer.taps
    assert torch.equal(other(x), right)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(layer(x), right)


@pytest.mark.parametrize(
    "taps",
    [
        RING,
        TapPattern.parse(RING),
        [[1, 1, 1], [1, 0, 1], [1, 1, 1]],
        torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1]]),
        torch.tensor([[2.5, 1, 1], [1, 0, 1], [1, 1, 1]]).numpy(),
    ],
    ids=["text", "pattern", "lists", "tensor", "array"],
)
def test_taps_in_any_spelling(taps: Any) -> None:
    layer = AdaptiveConv2d(4, 6, taps=taps, padding=1, stride=2, groups=2)
    assert layer.taps == TapPattern.parse(RING)
    assert layer.weight.shape == (6, 2, 8)
    assert layer.kernel_size == (3, 3)
    x = torch.randn(2, 4, 7, 8)
    dense = layer.kernel.dense()
    assert not dense[:, :, 1, 1].any()
    torch.testing.assert_close(layer(x), F.conv2d(x, dense, layer.bias, 2, 1, 1, 2))


def test_a_layer_with_taps_says_so_and_starts_as_a_layer_of_as_many_taps() -> None:
    layer = AdaptiveConv2d(3, 4, taps=RING, padding=1, groups=1, bias=False, padding_mode="circular")
    assert repr(layer) == (
        f"AdaptiveConv2d(3, 4, taps='{RING}', stride=(1, 1), padding=(1, 1), bias=False, padding_mode=circular)"
    )
    layer = AdaptiveConv1d(64, 64, taps="1011", groups=64)
    bound = 3**-0.5  # fan_in is one channel x 3 taps
    assert float(layer.weight.detach().abs().max()) <= bound
    assert float(layer.weight.detach().abs().max()) > 0.8 * bound
    assert layer.bias is not None
    assert float(layer.bias.detach().abs().max()) <= bound


def test_a_layer_with_taps_trains_like_the_dense_layer_it_thins() -> None:
    torch.manual_seed(0)
    layer = AdaptiveConv1d(2, 3, taps="10011", padding=2).double()
    dense = nn.Parameter(layer.kernel.dense().detach().clone())
    mask = (dense != 0).double()
    bias = nn.Parameter(layer.bias.detach().clone())
    mine = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD([dense, bias], lr=0.1, momentum=0.9)
    for _ in range(5):
        x = torch.randn(2, 2, 12, dtype=torch.float64)
        for optimizer, y in ((mine, layer(x)), (theirs, F.conv1d(x, dense * mask, bias, padding=2))):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.kernel.dense(), dense * mask)


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_pad_the_window_of_the_taps(mode: str) -> None:
    layer = AdaptiveConv2d(2, 2, taps="10001/00000/00100", padding=(1, 2), padding_mode=mode)
    x = torch.randn(1, 2, 6, 7)
    torch.testing.assert_close(layer(x), F.conv2d(F.pad(x, (2, 2, 1, 1), mode=mode), layer.kernel.dense(), layer.bias))


def test_pairs_of_padding_in_other_modes_than_zeros() -> None:
    layer = AdaptiveConv2d(2, 2, 3, padding=((1, 2), 1), padding_mode="circular")
    x = torch.randn(1, 2, 6, 7)
    right = F.conv2d(F.pad(x, (1, 1, 1, 2), mode="circular"), layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), right)


def test_a_layer_moves_between_dtypes_and_devices() -> None:
    layer = AdaptiveConv2d(2, 2, 3, padding=1)
    x = torch.randn(1, 2, 5, 5)
    layer(x)
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        layer = layer.to(dtype)
        assert layer(x.to(dtype)).dtype is dtype
    layer = layer.to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer.to("meta")(x.to("meta")).is_meta
    with torch.device("meta"):
        assert AdaptiveConv2d(2, 2, taps=RING).weight.is_meta
    with pytest.raises(RuntimeError, match=r"same|dtype"):
        AdaptiveConv2d(2, 2, 3)(x.double())


def test_the_plans_of_the_last_call_are_there_to_be_reported() -> None:
    layer = AdaptiveConv2d(2, 2, 3)
    assert layer.plans is None
    layer(torch.randn(1, 2, 5, 5))
    assert layer.plans is not None
    assert layer.plans.forward.problem.spatial == (5, 5)
    assert layer.plans.grad_input is None
    layer(torch.randn(1, 2, 6, 5, requires_grad=True))
    assert layer.plans.forward.problem.spatial == (6, 5)
    assert layer.plans.grad_input is not None
    with pinned("gather"):
        layer(torch.randn(1, 2, 6, 5))
    assert layer.plans.forward.choice.backend == "gather"


def test_an_empty_batch_and_a_layer_inside_a_model() -> None:
    model = nn.Sequential(AdaptiveConv1d(2, 4, 3, padding=1), nn.ReLU(), AdaptiveConv1d(4, 2, taps="101", padding=1))
    assert model(torch.randn(0, 2, 9)).shape == (0, 2, 9)
    assert model(torch.randn(2, 9)).shape == (2, 9)
    assert sum(p.numel() for p in model.parameters()) == 2 * 4 * 3 + 4 + 4 * 2 * 2 + 2


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        (r"either a kernel_size \(or a kernel family\) or taps=, and not both", {}),
        (r"either a kernel_size \(or a kernel family\) or taps=", {"kernel_size": 3, "taps": RING}),
        ("leave dilation at 1, got 2", {"taps": RING, "dilation": 2}),
        (r"leave dilation at 1, got \(1, 2\)", {"taps": RING, "dilation": (1, 2)}),
        (r"needs taps with 2 axes, got a window \(3,\)", {"taps": "101"}),
        ("at least one tap", {"taps": "000/000"}),
        ("cannot read tap pattern", {"taps": "ring"}),
        ("rectangular", {"taps": [[1, 1], [1]]}),
        ("groups", {"kernel_size": 3, "groups": 3}),
        ("groups", {"taps": RING, "groups": 0}),
        ("padding_mode", {"kernel_size": 3, "padding_mode": "mirror"}),
        ("padding", {"kernel_size": 3, "padding": "same", "stride": 2}),
        ("'same', 'valid'|valid", {"kernel_size": 3, "padding": "full"}),
    ],
)
def test_arguments_that_do_not_fit_are_refused_when_the_layer_is_made(says: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=says):
        AdaptiveConv2d(4, 4, **arguments)


def test_a_layer_refuses_a_wrong_input_as_torch_does() -> None:
    layer, theirs = AdaptiveConv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    for x in (torch.randn(1, 3, 8, 8), torch.randn(8, 8), torch.randn(1, 4, 2, 8), torch.randn(1, 4, 8, 8).double()):
        with pytest.raises(RuntimeError):
            theirs(x)
        with pytest.raises(ConvArgumentError, match=r"got|against"):
            layer(x)
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        layer([1.0])


def test_one_dilation_said_as_a_tuple_is_still_one() -> None:
    assert AdaptiveConv2d(2, 2, taps=RING, dilation=(1, 1)).dilation == (1, 1)
    assert AdaptiveConv2d(2, 2, taps=RING, dilation=[1, 1]).dilation is not None


def test_parametrizations_and_hooks_work_as_on_torchs_layer() -> None:
    layer = nn.utils.parametrizations.weight_norm(AdaptiveConv2d(2, 3, 3))
    theirs = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 3, 3))
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(layer(x), theirs(x))
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda module, args, out: seen.append(out))
    layer(x)
    assert len(seen) == 1


def test_a_kernel_may_be_used_without_a_layer() -> None:
    layer = AdaptiveConv2d(2, 3, taps=RING, padding=1)
    x = torch.randn(1, 2, 6, 6)
    kernel = Kernel(layer.weight, TapPattern.parse(RING))
    torch.testing.assert_close(adaptconv.conv2d(x, kernel, layer.bias, padding=1), layer(x))


def test_a_layer_takes_another_family_of_the_same_tensors_and_pads_by_its_window() -> None:
    layer = AdaptiveConv2d(2, 2, 3, padding="same", padding_mode="circular")
    weight, x = layer.weight, torch.randn(1, 2, 9, 9)
    for family, window in ((Interpolated(3), 7), (Grid(3, 3), 7), (Symmetric("3x3"), None), (Grid(3), 3)):
        if window is None:
            with pytest.raises(ConvArgumentError, match="make a new layer"):
                layer.family = family
            continue
        layer.family = family
        assert layer.family == family.bound(2)
        assert layer.weight is weight
        assert layer.kernel.taps.window == (window, window)
        padded = F.pad(x, (window // 2,) * 4, mode="circular")
        torch.testing.assert_close(layer(x), F.conv2d(padded, layer.kernel.dense(), layer.bias))
    assert repr(layer) == "Adaptive" + repr(nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"))


def test_a_kernel_may_be_a_pattern_or_its_text_but_not_a_class() -> None:
    assert AdaptiveConv2d(2, 2, RING).taps == AdaptiveConv2d(2, 2, TapPattern.parse(RING)).taps
    with pytest.raises(ConvArgumentError, match=r"Interpolated\(\.\.\.\), not the class"):
        AdaptiveConv2d(2, 2, Interpolated)
