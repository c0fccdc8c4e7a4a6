"""Symmetric kernels: the filter is its own image, so the layer commutes with the group."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, TapPattern
from adaptconv.errors import ConvArgumentError
from adaptconv.kernels.grid import FixedTaps, Grid
from adaptconv.kernels.symmetric import Symmetric

LAYERS = {1: AdaptiveConv1d, 2: AdaptiveConv2d, 3: AdaptiveConv3d}
CALLS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
Move = Callable[[Tensor], Tensor]


def turn(a: int, b: int) -> Move:
    return lambda x: torch.rot90(x, 1, (2 + a, 2 + b))


def flip(*axes: int) -> Move:
    return lambda x: x.flip([2 + a for a in axes])


# rank, base, group, axes, orbits, moves of the group
CASES: list[tuple[int, Any, str, Any, int, list[Move]]] = [
    (1, 5, "mirror", None, 3, [flip(0)]),
    (1, 4, "point", None, 2, [flip(0)]),
    (1, "101010101111101010101", "radial", None, 7, [flip(0)]),
    (2, 3, "rotation90", None, 3, [turn(0, 1)]),
    (2, 5, "rotation90", None, 7, [turn(0, 1)]),
    (2, 4, "rotation90", None, 4, [turn(0, 1)]),
    (2, Grid(3, 2), "dihedral", None, 3, [turn(0, 1), flip(0), flip(1)]),
    (2, 5, "dihedral", None, 6, [turn(0, 1), flip(0), flip(1)]),
    (2, (3, 5), "mirror", None, 6, [flip(0), flip(1)]),
    (2, (3, 5), "mirror", 1, 9, [flip(1)]),
    (2, 3, "point", None, 5, [flip(0, 1)]),
    (2, (4, 3), "point", (0,), 6, [flip(0)]),
    (2, 7, "radial", None, 10, [turn(0, 1), flip(0), flip(1)]),
    (2, (3, 5), "radial", None, 5, [flip(0), flip(1)]),
    (2, "010/111/010", "dihedral", None, 2, [turn(0, 1), flip(0)]),
    (2, TapPattern.partial((3, 3), (1, 1), (2, 2)), "rotation90", None, 5, [turn(0, 1)]),
    (3, 3, "rotation90", None, 4, [turn(0, 1), turn(1, 2), turn(0, 2)]),
    (3, 3, "rotation90", (1, 2), 9, [turn(1, 2)]),
    (3, (2, 3, 3), "dihedral", (1, 2), 6, [turn(1, 2), flip(1), flip(2)]),
    (3, 3, "mirror", (0, 2), 12, [flip(0), flip(2)]),
    (3, 3, "radial", None, 4, [turn(0, 1), turn(1, 2), flip(0)]),
]


def independent_orbits(taps: TapPattern, moves: list[Move]) -> list[set[int]]:
    """Classes of taps by moving a window in which every tap is written as its number."""
    window = torch.full(taps.window, -1)
    for t, offset in enumerate(taps.offsets):
        window[offset] = t
    classes = [{t} for t in range(len(taps))]
    of = dict(enumerate(classes))
    for move in moves:
        for mine, image in zip(
            window.flatten().tolist(), move(window[None, None])[0, 0].flatten().tolist(), strict=True
        ):
            assert (mine < 0) == (image < 0)
            if mine >= 0 and of[mine] is not of[image]:
                of[mine] |= of[image]
                for t in of[image]:
                    of[t] = of[mine]
    return list({id(c): c for c in of.values()}.values())


@pytest.mark.parametrize(
    ("rank", "base", "group", "axes", "orbits", "moves"),
    CASES,
    ids=lambda value: "moves" if isinstance(value, list) else str(value),
)
def test_the_layer_commutes_with_its_group(
    rank: int, base: Any, group: str, axes: Any, orbits: int, moves: list[Move]
) -> None:
    family = Symmetric(base, group, axes)
    for channels in ({"groups": 2}, {"groups": 1, "bias": False}):
        layer = LAYERS[rank](2, 4, family, dtype=torch.float64, padding=1, **channels)
        assert layer.weight.shape == (4, 2 // channels["groups"], orbits)
        x = torch.randn(2, 2, *(23,) if rank == 1 else (9,) * rank, dtype=torch.float64)
        dense = torch.zeros(4, 2 // channels["groups"], *layer.taps.window, dtype=torch.float64)
        for t, offset in enumerate(layer.taps.offsets):
            dense[(slice(None), slice(None), *offset)] = layer.weight.detach()[:, :, layer.family.orbits[t]]
        right = CALLS[rank](x, dense, layer.bias, padding=1, groups=channels["groups"])
        torch.testing.assert_close(layer(x), right, rtol=0, atol=1e-12)
        for move in moves:
            assert torch.equal(move(dense), dense)
            torch.testing.assert_close(layer(move(x)), move(layer(x)), rtol=0, atol=1e-12)
    if group != "radial":
        ties = {frozenset(c) for c in independent_orbits(layer.taps, moves)}
        found = [{t for t, o in enumerate(layer.family.orbits) if o == i} for i in range(orbits)]
        assert {frozenset(c) for c in found} == ties
        assert [min(c) for c in found] == sorted(min(c) for c in found)


def test_a_group_ties_no_more_than_it_says() -> None:
    layer = AdaptiveConv2d(1, 1, Symmetric(5, "rotation90"), padding=2, dtype=torch.float64)
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    assert float((layer(x.flip(2)) - layer(x).flip(2)).detach().abs().max()) > 1e-3
    layer = AdaptiveConv3d(1, 1, Symmetric(3, "rotation90", (1, 2)), padding=1, dtype=torch.float64)
    x = torch.randn(1, 1, 5, 5, 5, dtype=torch.float64)
    assert float((layer(turn(0, 1)(x)) - turn(0, 1)(layer(x))).detach().abs().max()) > 1e-3


def test_radial_ties_equal_distances_and_no_others() -> None:
    family = Symmetric(11, "radial").bound(2)
    distance = [(i - 5) ** 2 + (j - 5) ** 2 for i, j in family.taps.offsets]
    for (d, o), (e, p) in itertools.combinations(zip(distance, family.orbits, strict=True), 2):
        assert (d == e) == (o == p)
    at = dict(zip(family.taps.offsets, family.orbits, strict=True))
    assert at[8, 9] == at[10, 5]  # 3^2 + 4^2 = 5^2, which no rotation by 90 degrees relates
    dihedral = Symmetric(11, "dihedral").bound(2)
    at = dict(zip(dihedral.taps.offsets, dihedral.orbits, strict=True))
    assert at[8, 9] != at[10, 5]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradients_add_up_over_an_orbit(rank: int) -> None:
    layer = LAYERS[rank](2, 2, Symmetric(3, "radial"), padding=1, dtype=torch.float64)
    x = torch.randn(1, 2, *(5, 4, 3)[:rank], dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, layer.weight, layer.bias), fast_mode=rank > 1)
    assert torch.autograd.gradgradcheck(call, (x, layer.weight, layer.bias), fast_mode=True)


def test_it_starts_as_a_layer_of_as_many_taps() -> None:
    layer = AdaptiveConv2d(16, 32, Symmetric(5, "dihedral"))
    bound = (16 * 25) ** -0.5
    largest = float(layer.weight.detach().abs().max())
    assert 0.95 * bound < largest <= bound
    assert float(layer.bias.detach().abs().max()) <= bound


def test_copies_checkpoints_and_frozen_layers() -> None:
    layer = AdaptiveConv2d(2, 4, Symmetric("101/010/101", "dihedral"), padding=1, stride=2)
    assert layer.weight.shape == (4, 2, 2)
    x = torch.randn(2, 2, 9, 9)
    right = layer(x)
    other = AdaptiveConv2d(2, 4, Symmetric("101/010/101", "dihedral"), padding=1, stride=2)
    other.load_state_dict(layer.state_dict(), strict=True)
    for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), right)
        assert copied.family == layer.family and hash(copied.family) == hash(layer.family)
    frozen = copy.deepcopy(layer).freeze()
    assert isinstance(frozen.family, FixedTaps) and frozen.weight.shape == (4, 2, 5)
    torch.testing.assert_close(frozen(x), right)


def test_compiles_and_exports_whole() -> None:
    layer = AdaptiveConv2d(2, 2, Symmetric(3, "rotation90"), padding=1)
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
        (r"tap \(0, 0\) to \(2, 0\), where the pattern .* has no tap|tap \(0, 0\) to \(0, 2\)",
         {"base": "100/010/001", "group": "rotation90"}),
        (r"the mirror image along axis 0 takes tap \(0, 1\) to \(2, 1\)", {"base": "010/010/000", "group": "mirror"}),
        (r"the point reflection in axes \(0, 1\) takes tap \(0, 0\) to \(2, 2\)",
         {"base": "100/010/000", "group": "point"}),
        (r"the exchange of axes 0 and 1 takes tap \(0, 1\) to \(1, 0\)", {"base": "010/010/010", "group": "radial"}),
        (r"the mirror image along axis 1 takes tap", {"base": "110/110", "group": "mirror"}),
        (r"needs equal extents there, got window \(3, 5\)", {"base": (3, 5), "group": "rotation90"}),
        (r"needs equal extents there, got window \(3, 5\)", {"base": Grid(3, (1, 2)), "group": "dihedral"}),
        ("at least two axes to rotate in", {"base": 3, "group": "rotation90", "axes": (1,)}),
        ("group must be one of 'mirror', 'point', 'rotation90', 'dihedral', 'radial'", {"base": 3, "group": "rotate"}),
        ("leave axes at None", {"base": 3, "group": "radial", "axes": (0,)}),
        ("axes must be ints from 0 to 1", {"base": 3, "group": "mirror", "axes": 2}),
        ("axes must be ints from 0 to 1", {"base": 3, "group": "mirror", "axes": (True,)}),
        ("axes must be ints from 0 to 1", {"base": 3, "group": "mirror", "axes": "01"}),
        ("axes must differ from each other", {"base": 3, "group": "mirror", "axes": (0, 0)}),
        ("axes must be ints from 0 to 1", {"base": 3, "group": "mirror", "axes": ()}),
        ("needs taps with 2 axes", {"base": "101", "group": "mirror"}),
        ("at least one tap", {"base": "000/000/000", "group": "mirror"}),
        ("has a footprint", {"base": "3x3d2x2*0.5,1,0.5x0.5,1,0.5", "group": "mirror"}),
        ("size must be an int or 2 ints", {"base": (3, 3, 3), "group": "mirror"}),
    ],
)  # fmt: skip
def test_what_is_not_symmetric_is_refused(says: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConvArgumentError, match=says):
        AdaptiveConv2d(2, 2, Symmetric(**arguments))


def test_one_axis_does_not_rotate() -> None:
    with pytest.raises(ConvArgumentError, match="use 'mirror'"):
        AdaptiveConv1d(2, 2, Symmetric(3, "rotation90"))
