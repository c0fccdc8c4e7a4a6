"""The drop-in for the dcls package has its names, checkpoints and numbers."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptconv.compat import dcls
from adaptconv.errors import ConvArgumentError
from adaptconv.kernels.profiles import VERSIONS, WITH_SIGMA
from adaptconv.modules import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d

logging.disable(logging.WARNING)  # the peer says on import and for every layer which of its extensions are missing
peer = pytest.importorskip("DCLS.construct.modules")
logging.disable(logging.NOTSET)

NAMES = ["Dcls1d", "Dcls2d", "Dcls3d", "Dcls3_1d", "Dcls2dK1d"]
AXES = {"Dcls1d": 1, "Dcls2d": 2, "Dcls3d": 3, "Dcls3_1d": 3, "Dcls2dK1d": 2, "Dcls2_1d": 2}
CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("Dcls1d", 7, {}),
    ("Dcls1d", (8,), {"groups": 2, "stride": 2, "padding": 3}),
    ("Dcls2d", 7, {"groups": 4, "padding": 3}),
    ("Dcls2d", (5, 9), {"groups": 2, "stride": 2, "padding": (2, 4)}),
    ("Dcls2d", (8, 5), {"padding": 2, "bias": False}),
    ("Dcls2d", (6, 8), {"padding": 3, "padding_mode": "circular"}),
    ("Dcls3d", 5, {"groups": 4, "padding": 2}),
    ("Dcls3d", (3, 5, 7), {"groups": 2, "stride": (1, 2, 1), "padding": 3}),
    ("Dcls3d", (4, 6, 5), {"padding": 3}),
    ("Dcls3_1d", 7, {"dense_kernel_size": (2, 3), "groups": 2, "padding": 2}),
    ("Dcls3_1d", (8,), {"dense_kernel_size": 3, "stride": 2, "padding": 4}),
    ("Dcls2dK1d", 7, {"padding": 2}),
    ("Dcls2dK1d", (8,), {"flat_dim": 1, "groups": 2, "stride": 2, "padding": 3}),
]
RUNS = [
    pytest.param(name, size, settings, version, id=f"{name}-{size}-{version}")
    for name, size, settings in CASES
    for version in VERSIONS
    if (name, version) != ("Dcls3_1d", "v0")  # the peer has none
]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def pair(name: str, **arguments: Any) -> tuple[Any, Any]:
    """The peer's layer and ours, of the same arguments and values."""
    torch.manual_seed(0)
    theirs, mine = (getattr(home, name)(4, 8, **arguments) for home in (peer, dcls))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, mine


def place(layer: Any, kind: str) -> None:
    """Write positions of a kind, inside what the peer's own clamp allows, and widths of either sign."""
    torch.manual_seed(1)
    position = layer.P.data
    reach = torch.tensor([k // 2 for k in layer.dilated_kernel_size], dtype=position.dtype)
    reach = reach.reshape(-1, *(1,) * (position.dim() - 1))
    position.copy_((2 * torch.rand_like(position) - 1) * reach)
    if kind == "whole":
        position.round_()
    elif kind == "half":
        position.copy_(position.floor() + 0.5).clamp_(-reach, reach)
    elif kind == "edge":
        position.copy_(position.sign() * reach)
    if layer.version in WITH_SIGMA:
        layer.SIG.data.normal_(0, 0.5)


def results(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    torch.manual_seed(2)
    y.backward(torch.randn(y.shape).to(y.dtype))
    named = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **named}


def error(value: Tensor, right: Tensor) -> float:
    """max |value - right| / max |right|."""
    largest = float(right.abs().max())
    return float((value - right).abs().max()) / largest if largest else float(value.abs().max())


@pytest.mark.parametrize("kind", ["random", "whole", "half", "edge"])
@pytest.mark.parametrize(("name", "size", "settings", "version"), RUNS)
def test_numbers(name: str, size: Any, settings: dict[str, Any], version: str, kind: str) -> None:
    theirs, mine = pair(name, kernel_count=5, dilated_kernel_size=size, version=version, **settings)
    place(theirs, kind)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    torch.manual_seed(3)
    x = torch.randn(2, 4, *(12,) * AXES[name])
    single = results(theirs, x), results(mine, x)
    double = results(theirs.double(), x.double()), results(mine.double(), x.double())
    assert single[0].keys() == single[1].keys() >= {"weight", "P", *(["SIG"] if version in WITH_SIGMA else [])}
    for what, right in double[0].items():
        if not right.isfinite().all():
            assert double[1][what].isfinite().all()
            continue
        # Where positions are whole, v1's gradient is rounding around what 1e-7 leaves of it.
        vanishing = what == "P" and float(right.abs().max()) < 1e-4
        assert error(double[1][what], right) < (1e-4 if vanishing else 1e-9), what
        if vanishing:
            assert float(single[1][what].abs().max()) < 1e-4
            continue
        # An element outside an even window keeps a sum near 1e-7 there: no float32 has more of its gradient.
        own = error(single[0][what].double(), right)
        assert error(single[1][what], single[0][what]) < max(1e-5, 4 * own), what


@pytest.mark.parametrize("version", VERSIONS)
def test_derivatives_of_second_order_are_finite_where_the_peers_are_not(version: str) -> None:
    theirs, mine = pair("Dcls2d", kernel_count=4, dilated_kernel_size=5, version=version)
    place(theirs, "whole")
    mine.load_state_dict(theirs.state_dict())
    seconds = []
    for layer in (theirs.double(), mine.double()):
        torch.manual_seed(0)
        y = layer(torch.randn(1, 4, 8, 8, dtype=torch.float64)).square().sum()
        first = torch.autograd.grad(y, [layer.weight, layer.P], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [layer.weight, layer.P])
        seconds.append(second)
    for right, value in zip(*seconds, strict=True):
        assert value.isfinite().all()
        if right.isfinite().all():
            assert error(value, right) < 1e-8
        else:
            assert version == "gauss"


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_parameters(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(home, name).__init__).parameters for home in (dcls, peer))
    assert list(ours) == list(theirs)
    assert {n: p.default for n, p in ours.items()} == {n: p.default for n, p in theirs.items()}
    dense = {"dense_kernel_size": 3} if name == "Dcls3_1d" else {}
    for version in VERSIONS[name == "Dcls3_1d" :]:
        right, mine = pair(name, kernel_count=3, dilated_kernel_size=9, groups=2, version=version, **dense)
        assert {n: p.shape for n, p in mine.named_parameters()} == {n: p.shape for n, p in right.named_parameters()}
        for attribute in ("kernel_count", "dilated_kernel_size", "version", "stride", "padding", "groups", *dense):
            assert getattr(mine, attribute) == getattr(right, attribute), attribute


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoints_go_both_ways(name: str, version: str) -> None:
    if (name, version) == ("Dcls3_1d", "v0"):
        version = "v1"
    theirs, mine = pair(name, kernel_count=3, dilated_kernel_size=5, version=version)
    mine.reset_parameters()
    theirs.load_state_dict(mine.state_dict(), strict=True)
    x = torch.randn(2, 4, *(9,) * AXES[name])
    torch.testing.assert_close(mine(x), theirs(x))


def test_older_checkpoints_with_buffers_of_the_construction() -> None:
    mine = dcls.Dcls2d(4, 4, 3, dilated_kernel_size=5)
    state = mine.state_dict() | {"DCK.IDX": torch.zeros(2), "DCK.lim": torch.zeros(2)}
    twin = dcls.Dcls2d(4, 4, 3, dilated_kernel_size=5)
    twin.load_state_dict(state, strict=True)
    assert torch.equal(twin.P, mine.P)
    model = torch.nn.Sequential(twin)
    model.load_state_dict({f"0.{name}": value for name, value in state.items()}, strict=True)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*DCKX"):
        twin.load_state_dict(state | {"DCKX": torch.zeros(1)}, strict=True)
    with pytest.raises(RuntimeError, match="wrong checkpoint version"):
        dcls.Dcls2d(4, 4, 3, dilated_kernel_size=5, version="v1").load_state_dict(state)


@pytest.mark.parametrize("name", NAMES)
def test_initialisation(name: str) -> None:
    size = 9 if name in ("Dcls3_1d", "Dcls2dK1d", "Dcls1d") else (3, 9, 7)[: AXES[name]]
    torch.manual_seed(0)
    theirs, mine = (getattr(home, name)(32, 32, 6, dilated_kernel_size=size, version="gauss") for home in (peer, dcls))
    for name, own in mine.state_dict().items():
        right = theirs.state_dict()[name]
        assert own.shape == right.shape
        assert abs(float(own.std(correction=0) - right.std(correction=0))) < 0.1 * float(right.abs().max())
        assert abs(float(own.abs().max() - right.abs().max())) < 0.2 * float(right.abs().max())
        assert abs(float(own.mean() - right.mean())) < 0.3 * float(right.abs().max())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [(3, 9), (4, 6), (3, 5, 8)], ids=str)
def test_clamping(size: tuple[int, ...], version: str) -> None:
    theirs, mine = pair(f"Dcls{len(size)}d", kernel_count=9, dilated_kernel_size=size, version=version)
    theirs.P.data.normal_(0, 20)
    mine.load_state_dict(theirs.state_dict())  # positions stay as they were saved
    assert torch.equal(mine.P, theirs.P)
    theirs.clamp_parameters()
    mine.clamp_parameters()
    assert torch.equal(mine.P, theirs.P)


def test_the_version_changes_at_run_time() -> None:
    theirs, mine = pair("Dcls1d", kernel_count=3, dilated_kernel_size=7)
    x = torch.randn(1, 4, 20)
    for version in ("max", "gauss", "max"):
        for layer in (theirs, mine):
            layer.version = version
            layer.DCK.version = version
        with torch.no_grad():
            torch.testing.assert_close(mine(x), theirs(x))
            torch.testing.assert_close(
                mine.DCK(mine.weight, mine.P, mine.SIG), theirs.DCK(theirs.weight, theirs.P, theirs.SIG)
            )
            for layer in (theirs, mine):
                layer.P.round_()
                layer.SIG *= 0
            torch.testing.assert_close(mine(x), theirs(x))
    assert mine.version == mine.DCK.version == mine.family.version == "max"
    plain = pair("Dcls1d", kernel_count=3, dilated_kernel_size=7, version="v1")
    mine.version = "v1"
    plain[0].load_state_dict({n: v for n, v in mine.state_dict().items() if n != "SIG"})
    torch.testing.assert_close(mine(x), plain[0](x))
    with pytest.raises(ConvArgumentError, match="unknown version 'v3'"):
        mine.version = "v3"
    with pytest.raises(ConvArgumentError, match="SIG"):
        plain[1].version = "gauss"


def test_positions_shared_by_the_layers_of_a_stage() -> None:
    layers = [pair("Dcls2d", kernel_count=3, dilated_kernel_size=5) for _ in range(2)]
    for one, two in zip(*layers, strict=True):
        two.P, two.SIG = one.P, one.SIG
    x = torch.randn(1, 4, 9, 9)
    for one, two in zip(*layers, strict=True):
        two(one(x)[:, :4]).square().sum().backward()
    theirs, mine = layers[0]
    assert error(mine.P.grad, theirs.P.grad) < 1e-5
    assert error(mine.SIG.grad, theirs.SIG.grad) < 1e-5


@pytest.mark.parametrize("version", VERSIONS)
def test_two_axes_of_which_the_last_is_learned(version: str) -> None:
    """There is no released peer: each row is a 1-D construction, its Gaussians |SIG| + 1 wide."""
    mine = dcls.Dcls2_1d(4, 8, 3, 2, 3, dense_kernel_size=2, dilated_kernel_size=7, groups=2, version=version)
    assert mine.weight.shape == (8, 2, 2, 3) and mine.P.shape == (1, 8, 2, 2, 3)
    assert mine.dense_kernel_size == (2,) and mine.dilated_kernel_size == (7,)
    place(mine, "random")
    row = peer.Dcls1d(2, 8, 3, dilated_kernel_size=7, version=version)
    x = torch.randn(1, 4, 10, 10)
    dense = []
    for at in range(2):
        state = {"weight": mine.weight[:, :, at], "P": mine.P[:, :, :, at]}
        if version in WITH_SIGMA:
            sigma = mine.SIG[:, :, :, at]
            state["SIG"] = sigma.abs() + 0.73 if version == "gauss" else sigma
        for name, value in state.items():
            getattr(row, name).data.copy_(value)
        dense.append(row.DCK(row.weight, row.P, row.SIG))
    right = torch.nn.functional.conv2d(x, torch.stack(dense, 2), mine.bias, 2, 3, 1, 2)
    torch.testing.assert_close(mine(x), right)


def test_the_layers_are_ours_besides() -> None:
    bases = {"Dcls1d": AdaptiveConv1d, "Dcls2d": AdaptiveConv2d, "Dcls3d": AdaptiveConv3d, "Dcls2_1d": AdaptiveConv2d}
    for name, base in bases.items():
        assert issubclass(getattr(dcls, name), base)
    layer = dcls.Dcls2d(4, 4, 3, dilated_kernel_size=(5, 7), padding="same", groups=2, use_implicit_gemm=False)
    assert repr(layer) == (
        "Dcls2d(4, 4, kernel_count=3, stride=(1, 1), padding='same', version=gauss, dilated_kernel_size=(5, 7), "
        "groups=2)"
    )
    x = torch.randn(1, 4, 9, 9)
    with torch.no_grad():
        right = layer(x)
        assert right.shape == x.shape
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), right) and twin.version == "gauss"
        assert len(layer.freeze(positions="nearest").taps) < 35
        assert "taps=" in repr(layer) and layer(x).shape == x.shape


def test_gradients_compile() -> None:
    torch.manual_seed(0)
    layer = dcls.Dcls1d(2, 4, 3, dilated_kernel_size=(7,), padding=3, version="v1")
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(1, 2, 12)
    torch.testing.assert_close(compiled(x), layer(x))
    grads = [torch.autograd.grad(call(x).square().sum(), list(layer.parameters())) for call in (compiled, layer)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("says", "name", "arguments"),
    [
        ("unknown version 'v2'", "Dcls2d", {"version": "v2"}),
        ("use_implicit_gemm must be True or False", "Dcls2d", {"use_implicit_gemm": "always"}),
        ("padding_mode", "Dcls2d", {"padding_mode": "mirror"}),
        ("window must be an int or 2 ints", "Dcls2d", {"dilated_kernel_size": (5,)}),
        ("flat_dim is the axis", "Dcls2dK1d", {"flat_dim": 2}),
        ("dilated_kernel_size must be an int or 1 ints", "Dcls2dK1d", {"dilated_kernel_size": (5, 1)}),
        ("groups", "Dcls1d", {"groups": 3}),
        ("dense must be an int or 2 ints", "Dcls3_1d", {"dense_kernel_size": (3,)}),
    ],
)
def test_wrong_arguments_are_refused(says: str, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=says):
        getattr(dcls, name)(4, 4, 1, **{"dilated_kernel_size": 5, **arguments})


def test_more_elements_than_positions_are_accepted_with_a_word() -> None:
    with pytest.warns(UserWarning, match="kernel_count=3 is the number of weights, dilated_kernel_size=.* the size"):
        mine = dcls.Dcls2d(4, 4, 3)
    right = peer.Dcls2d(4, 4, 3)
    right.load_state_dict(mine.state_dict())
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(mine(x), right(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dcls.Dcls2d(4, 4, 9, dilated_kernel_size=3)
