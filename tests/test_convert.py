"""Layers made from layers: two convolutions as one, and what torch pruned."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d
from adaptconv.convert import from_convs, from_pruned, to_compact
from adaptconv.errors import ConvArgumentError
from adaptconv.kernels.grid import FixedTaps
from adaptconv.kernels.partial import PartiallyDilated

LAYERS = {1: AdaptiveConv1d, 2: AdaptiveConv2d, 3: AdaptiveConv3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

# ---- two convolutions as one ------------------------------------------------------------------------

PAIRS: list[tuple[int, dict[str, Any], dict[str, Any], type]] = [
    (1, {"kernel_size": 5, "padding": 2}, {"kernel_size": 11, "dilation": 2, "padding": 10}, PartiallyDilated),
    (1, {"kernel_size": 5, "padding": "same"}, {"kernel_size": 5, "dilation": 3, "padding": 6}, PartiallyDilated),
    (1, {"kernel_size": 3, "stride": 2}, {"kernel_size": 3, "dilation": 2, "stride": 2, "padding": 1},
     PartiallyDilated),
    (1, {"kernel_size": 1}, {"kernel_size": 3, "dilation": 4, "padding": 4}, PartiallyDilated),
    (1, {"kernel_size": 3, "padding": 3}, {"kernel_size": 3, "dilation": 1, "padding": 3}, PartiallyDilated),
    (1, {"kernel_size": 4, "padding": 1}, {"kernel_size": 2, "dilation": 5, "padding": 2}, FixedTaps),
    (1, {"kernel_size": 4, "padding": "same"}, {"kernel_size": 3, "dilation": 3, "padding": "same"}, FixedTaps),
    (1, {"kernel_size": 4, "padding": "same"}, {"kernel_size": 3, "dilation": 2, "padding": 2}, FixedTaps),
    (1, {"kernel_size": 4, "padding": "same"}, {"kernel_size": 2, "dilation": 1, "padding": "same"}, FixedTaps),
    (1, {"kernel_size": 9, "padding": 4}, {"kernel_size": 3, "dilation": 2, "padding": 2}, FixedTaps),
    (1, {"kernel_size": 3, "dilation": 2, "padding": 2}, {"kernel_size": 3, "dilation": 3, "padding": 3}, FixedTaps),
    (1, {"kernel_size": 3, "padding": "valid"}, {"kernel_size": 3, "dilation": 2, "padding": 1}, PartiallyDilated),
    (2, {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "dilation": 2, "padding": 2}, PartiallyDilated),
    (2, {"kernel_size": (3, 1), "padding": (1, 0)}, {"kernel_size": (3, 5), "dilation": (2, 1), "padding": 2},
     PartiallyDilated),
    (2, {"kernel_size": (2, 3), "padding": "same"}, {"kernel_size": 3, "dilation": (1, 3), "padding": "same"},
     FixedTaps),
    (2, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
     {"kernel_size": 3, "dilation": 2, "padding": 2, "padding_mode": "reflect"}, PartiallyDilated),
    (2, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
     {"kernel_size": 3, "dilation": 3, "padding": "same", "padding_mode": "circular"}, PartiallyDilated),
    (3, {"kernel_size": 3, "padding": 1}, {"kernel_size": (1, 3, 3), "dilation": (1, 2, 2), "padding": (0, 2, 2)},
     FixedTaps),
    (3, {"kernel_size": (1, 3, 3), "padding": "same"}, {"kernel_size": 3, "dilation": (2, 2, 3), "padding": "same"},
     PartiallyDilated),
]  # fmt: skip


@pytest.mark.parametrize(("axes", "first", "second", "kind"), PAIRS, ids=str)
@pytest.mark.parametrize(("groups", "biases"), [(1, (True, True)), (4, (True, False)), (2, (False, False))])
def test_from_convs_is_the_sum(
    axes: int, first: dict[str, Any], second: dict[str, Any], kind: type, groups: int, biases: tuple[bool, bool]
) -> None:
    dense, dilated = (
        CONVS[axes](4, 8, groups=groups, bias=bias, dtype=torch.float64, **settings)
        for settings, bias in zip((first, second), biases, strict=True)
    )
    state = torch.get_rng_state()
    layer = from_convs(dense, dilated)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn to be thrown away"
    assert type(layer.family) is kind
    assert (layer.bias is None) == (biases == (False, False))
    layers = [layer]
    if kind is PartiallyDilated:
        layers.append(from_convs(dense, dilated, two_parameters=True))
    for extent in (11, 14):
        x = torch.randn(2, 4, *(extent, 9, 10)[:axes], dtype=torch.float64)
        right = dense(x) + dilated(x)
        for one in layers:
            torch.testing.assert_close(one(x), right, rtol=0, atol=1e-12)


def test_from_convs_trains_as_the_sum_does() -> None:
    dense = nn.Conv1d(3, 3, 3, padding=1, groups=3, dtype=torch.float64)
    dilated = nn.Conv1d(3, 3, 5, padding=4, dilation=2, groups=3, dtype=torch.float64, bias=False)
    layer = from_convs(dense, dilated, two_parameters=True)
    assert layer.weight is not dense.weight
    sums = torch.optim.SGD([*dense.parameters(), *dilated.parameters()], lr=0.05, momentum=0.9)
    ours = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        x = torch.randn(2, 3, 12, dtype=torch.float64)
        for optimizer, y in ((sums, dense(x) + dilated(x)), (ours, layer(x))):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.wing_weight, dilated.weight)
    torch.testing.assert_close(layer.weight, dense.weight)
    compact = to_compact(copy.deepcopy(layer))
    torch.testing.assert_close(compact(x), dense(x) + dilated(x))


def test_from_convs_keeps_mode_dtype_and_what_was_frozen() -> None:
    dense = nn.Conv2d(2, 2, 3, padding=1).to(torch.bfloat16).eval().requires_grad_(False)
    dilated = AdaptiveConv2d(2, 2, 3, padding=2, dilation=2).to(torch.bfloat16).requires_grad_(False)
    layer = from_convs(dense, dilated)
    assert isinstance(layer, AdaptiveConv2d)
    assert not layer.training and layer.weight.dtype is torch.bfloat16
    assert not any(p.requires_grad for p in layer.parameters())


class Louder(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    conv = nn.Conv1d(4, 4, 3, padding=1)
    conv.register_forward_hook(lambda module, args, out: 2 * out)
    return conv


D = {"dilation": 2, "padding": 2}


@pytest.mark.parametrize(
    ("says", "dense", "dilated"),
    [
        (r"Give the dilated convolution padding=2", lambda: nn.Conv1d(4, 4, 3, padding=1),
         lambda: nn.Conv1d(4, 4, 3, dilation=2)),
        (r"Give the dilated convolution padding=1", lambda: nn.Conv1d(4, 4, 3), lambda: nn.Conv1d(4, 4, 3, **D)),
        (r"Give the dense convolution padding=3", lambda: nn.Conv1d(4, 4, 9, padding=1), lambda: nn.Conv1d(4, 4, 3)),
        (r"padding='same' on both", lambda: nn.Conv1d(4, 4, 4, padding=2), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("same groups", lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("same stride", lambda: nn.Conv1d(4, 4, 3, padding=1, stride=2), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("same in_channels", lambda: nn.Conv1d(2, 4, 3, padding=1), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("same out_channels", lambda: nn.Conv1d(4, 2, 3, padding=1), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("same padding_mode", lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"),
         lambda: nn.Conv1d(4, 4, 3, **D)),
        ("same dtype", lambda: nn.Conv1d(4, 4, 3, padding=1).double(), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("same device", lambda: nn.Conv1d(4, 4, 3, padding=1, device="meta"), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("as many axes", lambda: nn.Conv2d(4, 4, 3, padding=1), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("must be an nn.Conv1d", lambda: nn.ConvTranspose1d(4, 4, 3, padding=1), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("must be an nn.Conv1d", lambda: Louder(4, 4, 3, padding=1), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("must be an nn.Conv1d", lambda: AdaptiveConv1d(4, 4, taps="101", padding=1), lambda: nn.Conv1d(4, 4, 3, **D)),
        ("Remove parametrizations", lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, padding=1)),
         lambda: nn.Conv1d(4, 4, 3, **D)),
        ("has hooks", hooked, lambda: nn.Conv1d(4, 4, 3, **D)),
        ("make it permanent", lambda: nn.utils.prune.l1_unstructured(nn.Conv1d(4, 4, 3, padding=1), "weight", 0.5),
         lambda: nn.Conv1d(4, 4, 3, **D)),
    ],
)  # fmt: skip
def test_convolutions_that_do_not_agree_are_refused(says: str, dense: Any, dilated: Any) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        from_convs(dense(), dilated())


@pytest.mark.parametrize("first", [0, 1, 3, "same"])
@pytest.mark.parametrize("second", [0, 2, 5])
@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (3, 2), (3, 5)])
def test_the_advice_on_padding_is_right(first: Any, second: int, size: int, dilation: int) -> None:
    dense, dilated = nn.Conv1d(4, 4, 5, padding=first), nn.Conv1d(4, 4, size, dilation=dilation, padding=second)
    advice = None
    try:
        layer = from_convs(dense, dilated)
    except ConvArgumentError as error:
        advice = str(error)
    if advice is not None:
        which, padding = re.findall(r"Give the (dense|dilated) convolution padding=(\d+)", advice)[0]
        if which == "dense":
            dense = nn.Conv1d(4, 4, 5, padding=int(padding))
        else:
            dilated = nn.Conv1d(4, 4, size, dilation=dilation, padding=int(padding))
        layer = from_convs(dense, dilated)
    x = torch.randn(1, 4, 15)
    torch.testing.assert_close(layer(x), dense(x) + dilated(x))


@pytest.mark.parametrize(
    ("dense", "dilated"),
    [({"kernel_size": 4, "padding": "same"}, {"kernel_size": 3, "dilation": 2, "padding": "same"}),
     ({"kernel_size": 9, "padding": 4}, {"kernel_size": 3, "dilation": 2, "padding": 2})],
)  # fmt: skip
def test_two_parameters_where_no_family_has_them_are_refused(dense: dict[str, Any], dilated: dict[str, Any]) -> None:
    with pytest.raises(ConvArgumentError, match="leave two_parameters at False"):
        from_convs(nn.Conv1d(2, 2, **dense), nn.Conv1d(2, 2, **dilated), two_parameters=True)


# ---- what torch pruned ------------------------------------------------------------------------------


def custom(conv: Any) -> None:
    mask = torch.zeros_like(conv.weight)
    mask[..., 0] = 1
    mask[0] = 0
    mask[0, 0].flatten()[-1] = 1
    prune.custom_from_mask(conv, "weight", mask)


def twice(conv: Any) -> None:
    prune.l1_unstructured(conv, "weight", 0.4)
    prune.ln_structured(conv, "weight", 0.5, n=2, dim=0)


PRUNED: dict[str, Any] = {
    "l1_unstructured": lambda conv: prune.l1_unstructured(conv, "weight", 0.6),
    "random_structured_out": lambda conv: prune.random_structured(conv, "weight", 0.5, dim=0),
    "random_structured_in": lambda conv: prune.random_structured(conv, "weight", 0.5, dim=1),
    "custom_from_mask": custom,
    "twice": twice,
}


@pytest.mark.parametrize("way", PRUNED)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_from_pruned_computes_and_trains_the_same(axes: int, way: str) -> None:
    settings: dict[str, Any] = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}
    conv = CONVS[axes](4, 4, 3, dtype=torch.float64, bias=way != "twice", **settings)
    PRUNED[way](conv)
    twin = _twin(conv, axes, settings, way)
    layer = from_pruned(conv)
    assert isinstance(layer, LAYERS[axes])
    assert layer.weight is conv.weight_orig and layer.bias is conv.bias
    assert torch.equal(layer.mask, conv.weight_mask.bool())
    live = (conv.weight_mask != 0).flatten(2).any(0).any(0).sum()
    assert len(layer.taps) == int(live)
    mine = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        x = torch.randn(2, 4, *(9, 8, 7)[:axes], dtype=torch.float64)
        torch.testing.assert_close(layer(x), twin(x), rtol=0, atol=1e-12)
        for optimizer, y in ((mine, layer(x)), (theirs, twin(x))):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, twin.weight_orig, rtol=0, atol=1e-12)
    torch.testing.assert_close(conv(x), twin(x), rtol=0, atol=1e-12)  # the pruned layer goes on with the same weights


def _twin(conv: Any, axes: int, settings: dict[str, Any], way: str) -> Any:
    """A copy of a pruned layer, which torch cannot deepcopy: its weight is no leaf."""
    twin = CONVS[axes](4, 4, 3, dtype=torch.float64, bias=way != "twice", **settings)
    prune.custom_from_mask(twin, "weight", conv.weight_mask)
    twin.load_state_dict(conv.state_dict())
    return twin


def test_a_pruning_of_the_bias_that_prunes_nothing_is_no_obstacle() -> None:
    conv = nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular")
    prune.l1_unstructured(conv, "weight", 0.5)
    prune.custom_from_mask(conv, "bias", torch.ones(4))
    layer = from_pruned(conv)
    assert layer.bias is conv.bias_orig
    x = torch.randn(1, 2, 6, 6)
    torch.testing.assert_close(layer(x), conv(x))


def test_an_adaptive_layer_may_be_pruned_by_torch_too() -> None:
    conv = AdaptiveConv1d(2, 2, 3, padding=1)
    prune.l1_unstructured(conv, "weight", 0.5)
    x = torch.randn(1, 2, 6)
    torch.testing.assert_close(from_pruned(conv)(x), conv(x))


def pruned(conv: Any, **how: Any) -> Any:
    prune.l1_unstructured(conv, "weight", **how)
    return conv


def halved() -> Any:
    conv = nn.Conv1d(2, 2, 3)
    prune.custom_from_mask(conv, "weight", torch.full((2, 2, 3), 0.5))
    return conv


def biased() -> Any:
    conv = pruned(nn.Conv1d(2, 2, 3), amount=0.5)
    prune.l1_unstructured(conv, "bias", 1)
    return conv


def pruned_and_hooked() -> Any:
    conv = pruned(nn.Conv1d(2, 2, 3), amount=0.5)
    conv.register_forward_hook(lambda module, args, out: 2 * out)
    return conv


@pytest.mark.parametrize(
    ("says", "make"),
    [
        ("whose weight was pruned by torch.nn.utils.prune .* has weight, bias", lambda: nn.Conv1d(2, 2, 3)),
        ("must be an nn.Conv1d", lambda: pruned(nn.Linear(2, 2), amount=0.5)),
        ("must be an nn.Conv1d", lambda: pruned(nn.ConvTranspose1d(2, 2, 3), amount=0.5)),
        ("kills every weight", lambda: pruned(nn.Conv1d(2, 2, 3), amount=1.0)),
        ("values other than 0 and 1", halved),
        (r"the bias is pruned, .*remove\(conv, 'bias'\)", biased),
        ("has hooks", pruned_and_hooked),
    ],
)
def test_what_from_pruned_cannot_keep_is_refused(says: str, make: Any) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        from_pruned(make())
