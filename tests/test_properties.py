"""Hypothesis: any geometry, layout and dtype equals torch; the algebra of taps holds; keys tell problems apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import adaptconv
from adaptconv import BackendRejected, Kernel, TapPattern, pinned
from adaptconv.backends import BACKENDS, Choice
from adaptconv.backends.base import Config
from adaptconv.problem import Device, Direction, Problem, same_padding
from adaptconv.records import parse_key
from adaptconv.reference import reference, relative_error
from tests.cases import ON_CPU

OURS: dict[int, Callable[..., Tensor]] = {1: adaptconv.conv1d, 2: adaptconv.conv2d, 3: adaptconv.conv3d}
TORCHS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SMALL = {1: 14, 2: 9, 3: 5}


def per_axis(axes: int, low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*(st.integers(low, high) for _ in range(axes)))


# ---- calls ---------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a torch convolution that torch accepts."""
    axes = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    ins, outs = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = draw(per_axis(axes, 1, 4 if axes < 3 else 2))
    dilation = draw(per_axis(axes, 1, 3))
    stride = draw(st.one_of(st.integers(1, 3), per_axis(axes, 1, 3)))
    padding: Any = draw(st.one_of(st.integers(0, 4), per_axis(axes, 0, 4), st.sampled_from(["same", "valid"])))
    if padding == "same":
        stride = 1
    spatial = draw(per_axis(axes, 1, SMALL[axes]))
    pads = (padding,) * axes if isinstance(padding, int) else padding if isinstance(padding, tuple) else (0,) * axes
    for extent, k, d, p in zip(spatial, size, dilation, pads, strict=True):
        assume(padding == "same" or extent + 2 * p >= (k - 1) * d + 1)
    return {
        "axes": axes,
        "input": (draw(st.integers(0, 3)), ins * groups, *spatial),
        "weight": (outs * groups, ins, *size),
        "bias": draw(st.booleans()),
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "dtype": draw(st.sampled_from(DTYPES)),
        "input_layout": draw(st.sampled_from(["contiguous", "channels_last", "strided", "unbatched", "flipped"])),
        "weight_layout": draw(st.sampled_from(["contiguous", "contiguous", "channels_last", "strided"])),
        "seed": draw(st.integers(0, 1 << 16)),
    }


def laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "channels_last" and t.dim() > 3:
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    if layout == "strided":
        return torch.stack((t, t + 1), dim=-1)[..., 0]
    if layout == "flipped":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "unbatched" and t.shape[0]:
        return t[0]
    return t


@settings(max_examples=250)
@given(
    call=calls(),
    way=st.sampled_from([None, None, *[b.name for b in ON_CPU if b.name not in ("dual", "factored", "cpp")]]),
)
def test_every_call_is_torchs(call: dict[str, Any], way: str | None) -> None:
    axes, dtype = call["axes"], call["dtype"]
    torch.manual_seed(call["seed"])
    x = laid_out(torch.randn(call["input"], dtype=torch.float64).to(dtype), call["input_layout"])
    w = laid_out(torch.randn(call["weight"], dtype=torch.float64).to(dtype), call["weight_layout"])
    b = torch.randn(call["weight"][0], dtype=torch.float64).to(dtype) if call["bias"] else None
    rest = (call["stride"], call["padding"], call["dilation"], call["groups"])
    theirs = TORCHS[axes](x, w, b, *rest)
    exact = TORCHS[axes](x.double(), w.double(), None if b is None else b.double(), *rest)
    if way is None:
        ours = OURS[axes](x, w, b, *rest)
    else:
        with pinned(way):
            ours = OURS[axes](x, w, b, *rest)
    assert ours.dtype is theirs.dtype
    assert ours.shape == theirs.shape
    if axes > 1 or call["weight_layout"] == "contiguous":
        same_strides(ours, theirs)
    floor = 4 * torch.finfo(dtype).eps
    assert relative_error(ours, exact) <= max(2 * relative_error(theirs, exact), floor)


def same_strides(ours: Tensor, theirs: Tensor) -> None:
    """Equal strides wherever a stride means anything: not along an axis of one element, nor of nothing."""
    if not theirs.numel():
        return
    mine = [step for step, extent in zip(ours.stride(), ours.shape, strict=True) if extent > 1]
    right = [step for step, extent in zip(theirs.stride(), theirs.shape, strict=True) if extent > 1]
    assert mine == right, f"strides {ours.stride()} against torch's {theirs.stride()} for {tuple(ours.shape)}"


# ---- patterns ------------------------------------------------------------------------------------


@st.composite
def patterns(draw: st.DrawFn, least: int = 0) -> TapPattern:
    """Any taps in a window of 1 to 3 axes: scattered, or a grid somewhere in it."""
    axes = draw(st.integers(1, 3))
    window = draw(per_axis(axes, 1, {1: 12, 2: 6, 3: 4}[axes]))
    positions = list(itertools.product(*map(range, window)))
    if draw(st.booleans()):
        steps = draw(per_axis(axes, 1, 3))
        start = tuple(draw(st.integers(0, w - 1)) for w in window)
        chosen = list(itertools.product(*(range(o, w, d) for o, w, d in zip(start, window, steps, strict=True))))
    else:
        chosen = draw(st.lists(st.sampled_from(positions), unique=True, min_size=least, max_size=20))
    return TapPattern(tuple(chosen), window)


@st.composite
def maybe_spread(draw: st.DrawFn, least: int = 0) -> TapPattern:
    """Any taps, some each spread by a small filter, some with a density."""
    pattern = draw(patterns(least))
    sort = draw(st.sampled_from(["plain", "holes", "spread"]))
    if sort == "plain":
        return pattern
    if sort == "holes":
        return pattern.with_density(draw(st.floats(0, 1, exclude_min=True)))
    values = st.lists(st.sampled_from([0.5, 1.0, -0.25, 1 / 3, 1e-9]), min_size=1, max_size=3)
    return pattern.spread_by([draw(values) for _ in range(pattern.axes)])


@given(pattern=maybe_spread())
def test_text_says_a_pattern_and_only_that_pattern(pattern: TapPattern) -> None:
    assert TapPattern.parse(str(pattern)) == pattern
    assert hash(TapPattern.parse(str(pattern))) == hash(pattern)


@given(one=maybe_spread(), other=maybe_spread())
def test_patterns_are_equal_exactly_when_their_texts_are(one: TapPattern, other: TapPattern) -> None:
    assert (one == other) == (str(one) == str(other))
    same = (one.window, one.footprint, one.density, one.offsets) == (
        other.window, other.footprint, other.density, other.offsets
    )  # fmt: skip
    assert (one == other) == same


@given(share=st.floats(2**-10, 1), pattern=patterns())
def test_a_density_is_rounded_up_a_little(share: float, pattern: TapPattern) -> None:
    holes = pattern.with_density(share)
    assert share <= holes.density <= min(1, 1.5 * share)
    assert holes.with_density(holes.density) == holes
    assert holes.flipped().density == holes.subset(range(len(holes))).density == holes.density
    assert holes.union(pattern).density == 1
    assert holes.with_density(1) == pattern


@pytest.mark.parametrize("share", [0, -0.5, 1.01, float("nan")])
def test_a_density_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(adaptconv.errors.ConvArgumentError, match="density"):
        TapPattern.grid((3, 3)).with_density(share)
    with pytest.raises(adaptconv.errors.ConvArgumentError, match="density"):
        TapPattern.parse(f"3x3~{share}x")


@given(pattern=patterns())
def test_a_mask_says_the_same_pattern(pattern: TapPattern) -> None:
    mask = torch.zeros(pattern.window, dtype=torch.bool)
    for offset in pattern.offsets:
        mask[offset] = True
    assert TapPattern.from_mask(mask) == pattern
    assert TapPattern.from_mask(mask.tolist()) == pattern
    assert TapPattern.from_mask(mask.numpy()) == pattern


@given(pattern=patterns())
def test_a_cover_owns_every_tap_once_and_touches_nothing_else(pattern: TapPattern) -> None:
    cover = pattern.grids(32)
    assert cover is not None
    owners: list[int] = []
    for grid in cover:
        points = itertools.product(
            *(range(o, o + s * d, d) for o, s, d in zip(grid.origin, grid.size, grid.dilation, strict=True))
        )
        for point, tap in zip(points, grid.taps, strict=True):
            assert point in pattern.offsets, "a grid touches a hole"
            if tap >= 0:
                assert pattern.offsets[tap] == point
                owners.append(tap)
    assert sorted(owners) == list(range(len(pattern)))
    if pattern.single_grid() is not None:
        assert len(cover) == 1


@given(pattern=patterns(least=1))
def test_a_single_grid_is_found_exactly_when_there_is_one(pattern: TapPattern) -> None:
    projections = [sorted({offset[axis] for offset in pattern.offsets}) for axis in range(pattern.axes)]
    even = all(len({b - a for a, b in itertools.pairwise(values)}) <= 1 for values in projections)
    full = math.prod(map(len, projections)) == len(pattern)
    assert (pattern.single_grid() is not None) == (bool(len(pattern)) and even and full)


@given(pattern=maybe_spread(least=1))
def test_flipping_a_spread_pattern_mirrors_what_it_spreads_to(pattern: TapPattern) -> None:
    plain, entries = pattern.spread()
    flipped, mirrored = pattern.flipped().spread()
    assert flipped == plain.flipped()
    last, end = len(pattern) - 1, len(plain) - 1
    assert sorted((last - own, end - place, value) for own, place, value in mirrored) == [
        (own, place, pytest.approx(value)) for own, place, value in entries
    ]
    assert pattern.flipped().flipped() == pattern


@given(pattern=patterns())
def test_flipping_twice_is_nothing_and_once_mirrors(pattern: TapPattern) -> None:
    assert pattern.flipped().flipped() == pattern
    mirrored = {tuple(w - 1 - i for i, w in zip(o, pattern.window, strict=True)) for o in pattern.offsets}
    assert set(pattern.flipped().offsets) == mirrored
    # Offsets stay sorted: mirroring reverses the order of the taps, which the adjoint's weight relies on.
    flipped = pattern.flipped().offsets
    assert [tuple(w - 1 - i for i, w in zip(o, pattern.window, strict=True)) for o in reversed(flipped)] == list(
        pattern.offsets
    )


@given(one=patterns(), other=patterns())
def test_a_union_has_the_taps_of_both_about_one_centre(one: TapPattern, other: TapPattern) -> None:
    alike = one.axes == other.axes
    if not alike or any((a - b) % 2 for a, b in zip(one.window, other.window, strict=False)):
        with pytest.raises(adaptconv.errors.ConvArgumentError):
            one.union(other)
        return
    union = one.union(other)
    assert union == other.union(one)

    def centred(p: TapPattern) -> set[tuple[int, ...]]:
        return {tuple(2 * i - (w - 1) for i, w in zip(o, p.window, strict=True)) for o in p.offsets}

    assert centred(union) == centred(one) | centred(other)


@given(data=st.data(), pattern=maybe_spread())
def test_live_taps_are_those_that_ever_read_the_input(data: st.DataObject, pattern: TapPattern) -> None:
    axes = pattern.axes
    spatial = data.draw(per_axis(axes, 1, 8))
    stride = data.draw(per_axis(axes, 1, 4))
    padding = tuple(zip(data.draw(per_axis(axes, 0, 9)), data.draw(per_axis(axes, 0, 9)), strict=True))
    outputs = [
        (extent + sum(pads) - window) // step + 1
        for extent, pads, window, step in zip(spatial, padding, pattern.window, stride, strict=True)
    ]
    assume(all(count > 0 for count in outputs))

    lengths = [1] * axes if pattern.footprint is None else list(map(len, pattern.footprint))

    def reads(first: tuple[int, ...]) -> bool:
        steps = itertools.product(*map(range, lengths))
        return any(reads_at(tuple(o + i for o, i in zip(first, step, strict=True))) for step in steps)

    def reads_at(offset: tuple[int, ...]) -> bool:
        return all(
            any(0 <= n * step + i - before < extent for n in range(count))
            for i, count, step, (before, _), extent in zip(offset, outputs, stride, padding, spatial, strict=True)
        )

    brute = tuple(t for t, offset in enumerate(pattern.offsets) if reads(offset))
    assert pattern.live(spatial, padding, stride) == brute


# ---- kernels -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(pattern=patterns(least=1), data=st.data())
def test_a_kernel_written_out_densely_is_the_same_convolution(pattern: TapPattern, data: st.DataObject) -> None:
    assume(len(pattern))
    axes = pattern.axes
    footprint = None
    if data.draw(st.booleans()):
        footprint = tuple(
            tuple(data.draw(st.lists(st.sampled_from([0.5, 1.0, -0.25]), min_size=1, max_size=3))) for _ in range(axes)
        )
    taps = pattern if footprint is None else pattern.spread_by(footprint)
    kernel = Kernel(torch.randn(2, 2, len(pattern), dtype=torch.float64), taps)
    dense, spread = kernel.dense(), kernel.spread()
    assert spread.taps.footprint is None
    assert tuple(dense.shape[2:]) == spread.taps.window
    assert torch.equal(Kernel.from_dense(dense, spread.taps).weight, spread.weight)
    holes = dense.clone()
    for offset in spread.taps.offsets:
        holes[(..., *offset)] = 0
    assert not holes.any(), "a weight outside the taps"
    x = torch.randn(1, 2, *(w + 2 for w in spread.taps.window), dtype=torch.float64)
    right = TORCHS[axes](x, dense)
    for way in ("dense", "gather" if taps.footprint is None else "dense"):
        with pinned(way):
            torch.testing.assert_close(OURS[axes](x, kernel), right)
    torch.testing.assert_close(OURS[axes](x, kernel), right)
    if footprint is not None:  # the taps first, then the footprint, is the same function
        plain = Kernel(kernel.weight, pattern).dense()
        smooth = torch.ones((), dtype=torch.float64)
        for values in footprint:
            smooth = smooth[..., None] * torch.tensor(values, dtype=torch.float64)
        pads = [0] * (2 * axes)
        for axis, values in enumerate(footprint):
            pads[2 * (axes - 1 - axis)] = pads[2 * (axes - 1 - axis) + 1] = len(values) - 1
        flipped = smooth.flip(tuple(range(axes)))[None, None]
        as_images = F.pad(plain.flatten(0, 1)[:, None], pads)
        torch.testing.assert_close(TORCHS[axes](as_images, flipped).reshape(dense.shape), dense)


@settings(max_examples=100)
@given(pattern=maybe_spread(), data=st.data())
def test_any_pattern_any_direction_any_backend(pattern: TapPattern, data: st.DataObject) -> None:
    axes = pattern.axes
    stride = data.draw(per_axis(axes, 1, 3))
    padding = tuple(zip(data.draw(per_axis(axes, 0, 3)), data.draw(per_axis(axes, 0, 3)), strict=True))
    spatial = tuple(
        max(1, w - sum(p)) + extra
        for w, p, extra in zip(pattern.window, padding, data.draw(per_axis(axes, 0, 4)), strict=True)
    )
    groups = data.draw(st.sampled_from([1, 2]))
    ins, outs = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    layout = data.draw(st.sampled_from(["contiguous", "channels_last", "mixed"] if axes > 1 else ["contiguous"]))
    direction = data.draw(st.sampled_from(list(Direction)))
    problem = Problem(
        direction, data.draw(st.integers(1, 3)), ins * groups, outs * groups, groups, spatial, pattern, stride, padding,
        "float64", layout, Device.of(torch.device("cpu")),
    )  # fmt: skip
    torch.manual_seed(0)
    x, w, dy = (
        torch.randn(shape, dtype=torch.float64)
        for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )
    a, b = {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}[direction]
    if not (a.numel() and b.numel()):
        return  # answered before any backend runs
    exact = reference(problem, a, b)
    for backend in BACKENDS:
        if backend.rejects(problem):
            continue
        config = data.draw(st.sampled_from(list(backend.space(problem))))
        result = backend.run(problem, config, a, b)
        assert result.shape == exact.shape
        assert torch.allclose(result, exact, rtol=1e-12, atol=1e-12), f"{backend.name} {config}"


# ---- keys and choices ----------------------------------------------------------------------------

BASE = Problem(
    Direction.FORWARD, 2, 4, 8, 2, (9, 10), TapPattern.parse("3x3"), (1, 2), ((1, 1), (0, 2)), "float32", "contiguous",
    Device("cpu", "AMD EPYC AVX512", 2),
)  # fmt: skip
OTHER: dict[str, list[Any]] = {
    "direction": [Direction.GRAD_INPUT, Direction.GRAD_WEIGHT],
    "batch": [1, 22],
    "c_in": [2, 44],
    "c_out": [4, 88],
    "groups": [1, 4],
    "spatial": [(10, 9), (9, 11), (91, 0)],
    "taps": [
        TapPattern.parse(t)
        for t in (
            "3x3d2x1",
            "3x3d1x2",
            "2x2*0.5,1x1,0.5",
            "2x2*0.5,1x1,0.25",
            "3x3*1x1,0.5",
            "111/111/111/000",
            "9x1",
            "1x9",
            "111/101/111",
        )
    ],
    "stride": [(2, 1), (1, 1), (12, 2)],
    "padding": [((1, 1), (2, 0)), ((1, 1), (1, 1)), ((0, 2), (1, 1)), ((11, 1), (0, 2))],
    "dtype": ["float64", "bfloat16"],
    "layout": ["channels_last", "mixed"],
    "device": [Device("cpu", "AMD EPYC AVX512", 4), Device("cpu", "AMD EPYC AVX2", 2), Device("cuda", "H200", 0)],
    "bias": [True],
    "fp32_precision": ["matmul-high"],
    "deterministic": [True],
}


def test_a_key_differs_when_any_field_differs() -> None:
    assert set(OTHER) == {f.name for f in fields(Problem)}, "a new field needs a row here, and a place in the key"
    keys = {BASE.key()}
    for name, values in OTHER.items():
        for value in values:
            assert getattr(BASE, name) != value
            key = replace(BASE, **{name: value}).key()
            assert key not in keys, f"{name}={value} shares a key"
            keys.add(key)
    assert len(keys) == 1 + sum(map(len, OTHER.values()))


def test_a_density_counts_where_a_weight_of_one_channel_is_read() -> None:
    depthwise = replace(BASE, c_in=4, c_out=4, groups=4)
    holes = replace(depthwise, taps=depthwise.taps.with_density(0.3))
    assert holes.taps.density == 0.375
    assert "~0.375" in holes.key() and "~0.375" not in str(depthwise)
    assert holes.facing(Direction.GRAD_INPUT).taps == holes.taps
    assert holes.facing(Direction.GRAD_WEIGHT) == depthwise.facing(Direction.GRAD_WEIGHT)
    assert replace(holes, groups=2) == replace(depthwise, groups=2)
    features = parse_key(holes.key())
    assert (features.density, features.taps_class, features.taps) == (0.375, "holes", 9)
    assert features.family != parse_key(depthwise.key()).family


@settings(max_examples=200)
@given(data=st.data())
def test_keys_are_equal_exactly_when_problems_are(data: st.DataObject) -> None:
    def draw() -> Problem:
        changed = data.draw(st.lists(st.sampled_from(sorted(OTHER)), unique=True, max_size=3))
        return replace(BASE, **{name: data.draw(st.sampled_from(OTHER[name])) for name in changed})

    one, other = draw(), draw()
    assert (one == other) == (one.key() == other.key())
    parse_key(one.key())  # the database reads every key back


words = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
values = st.one_of(st.booleans(), st.integers(-(1 << 40), 1 << 40), words)


@given(backend=words, version=st.integers(0, 1 << 30), config=st.dictionaries(words, values, max_size=4))
def test_a_choice_is_its_text(backend: str, version: int, config: dict[str, Any]) -> None:
    choice = Choice(backend, version, Config(config))
    back = Choice.parse(str(choice))
    assert back == choice
    assert hash(back) == hash(choice)
    assert {k: type(v) for k, v in back.config.items()} == {k: type(v) for k, v in choice.config.items()}


@given(text=st.text(max_size=40))
def test_what_is_no_choice_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected 'backend@version"):
        Choice.parse(text)


def test_every_declared_configuration_survives_its_text() -> None:
    for backend in ON_CPU:
        for direction in Direction:
            problem = replace(BASE, direction=direction, groups=4, stride=(1, 1))
            if backend.rejects(problem):
                problem = replace(problem, taps=TapPattern.parse("111/101/111"))
            if backend.rejects(problem):
                problem = replace(problem, taps=TapPattern.parse("3x3d2x2*0.5,1,0.5x0.5,1,0.5"))
            assert backend.rejects(problem) is None
            space = backend.space(problem)
            assert space.default in space
            assert len(list(space)) == space.size == len(set(space))
            for config in space:
                choice = Choice(backend.name, backend.version, config)
                assert Choice.parse(str(choice)) == choice
                assert space.problem_with(config) is None


def test_same_padding_is_torchs() -> None:
    for size, dilation in itertools.product(range(1, 6), range(1, 4)):
        taps = TapPattern.grid(size, dilation)
        x, w = torch.randn(1, 1, 9, dtype=torch.float64), torch.randn(1, 1, size, dtype=torch.float64)
        padded = F.pad(x, list(same_padding(taps.window)[0]))
        theirs = F.conv1d(x, w, padding="same", dilation=dilation)
        torch.testing.assert_close(F.conv1d(padded, w, dilation=dilation), theirs)


def test_a_rejection_is_for_pins_only() -> None:
    x, w = torch.randn(1, 1, 8), torch.randn(1, 1, 3)
    with pytest.raises(BackendRejected, match="one regular grid"), pinned("dual"):
        adaptconv.conv1d(x, w)
    assert adaptconv.conv1d(x, w).shape == (1, 1, 6)
