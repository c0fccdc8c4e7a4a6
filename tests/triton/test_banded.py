"""The banded backend's kernels against float64: shapes, knobs, layouts, and what it declines."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import adaptconv
from adaptconv.backends import Config, backend_named
from adaptconv.backends.triton.banded.backend import Banded
from adaptconv.backends.triton.banded.positions import HALF, positions
from adaptconv.backends.triton.banded.tiling import cut, exchanged, spread, tile_of, window
from adaptconv.kernel import Kernel
from adaptconv.problem import Device, Direction, Problem
from adaptconv.reference import reference, relative_error
from adaptconv.taps import TapPattern
from tests.cases import CASES, Case, case
from tests.triton.harness import DEVICE, RUNS, error_of, operands

pytestmark = pytest.mark.filterwarnings("error::adaptconv.errors.KernelWarning")  # a fallback is no answer here

BANDED = Banded()
HALVES = (torch.bfloat16, torch.float16)
H200 = Device("cuda", "NVIDIA H200", 0)


def depthwise(name: str, taps: str, spatial: tuple[int, ...], channels: int = 2, **more: object) -> Case:
    return case(name, taps, spatial, channels=(channels, channels), groups=channels, **more)  # type: ignore[arg-type]


HOLES = "/".join("1000000010010" if row % 3 else "0000100000001" for row in range(9))
PARTLY = "/".join("1100000011" if row in (0, 4, 12) else "0000000000" for row in range(13))
SHAPES = (
    depthwise("1d", "31", (40,), pad=15, bias=True),
    depthwise("1d-holes-dead", "9d4", (20,), channels=3, pad=16, bias=True),
    depthwise("1d-longer-than-a-tile", "105", (140,), pad=52),
    depthwise("1d-strided", "17", (61,), channels=3, stride=3, pad=((9, 2),), bias=True),
    depthwise("1d-taps-at-the-end", "000000000000011111111111", (40,)),
    depthwise("1d-taps-in-front", "1111111111000000000000000000", (50,), pad=((30, 3),)),
    depthwise("2d-wide-map", "13x13", (12, 24), pad=6, batch=33, bias=True),
    depthwise("2d-small-map", "27x27", (14, 14), pad=13, batch=5),
    depthwise("2d-odd-width", "11x11", (9, 13), channels=3, pad=((5, 4), (3, 7)), bias=True),
    depthwise("2d-long-and-thin", "51x5", (30, 9), pad=(25, 2), batch=3),
    depthwise("2d-strided", "17x13", (19, 21), channels=3, stride=(2, 2), pad=((8, 7), (6, 3)), bias=True),
    depthwise("2d-holes", HOLES, (16, 18), pad=(4, 6)),
    depthwise("2d-many-taps", "6x7", (10, 12), pad=3),
    depthwise("2d-row-of-pixels", "9x9", (1, 17), pad=4, batch=1),
    depthwise("2d-dilated", "7x7d3x3", (13, 18), channels=3, pad=9, bias=True),
    depthwise("2d-dilated-apart", "7x9d4x2", (11, 22), pad=((7, 17), (4, 9)), batch=3),
    depthwise("2d-dilated-rows-only", "5x9d7x1", (9, 14), pad=((15, 13), (4, 4)), bias=True),
    depthwise("2d-dilated-strided", "5x9d3x1", (23, 16), stride=(2, 1), pad=(6, 4), bias=True),
    depthwise("2d-dilated-strided-alike", "5x9d4x2", (25, 31), channels=3, stride=(6, 2), pad=((3, 11), (8, 5))),
    depthwise("2d-partly-dilated", PARTLY, (18, 20), pad=(5, 4)),
    depthwise("3d-dilated", "5x3x9d3x2x1", (11, 6, 17), pad=(6, 2, 4), bias=True),
    depthwise("3d-dilated-strided", "3x3x9d2x3x1", (7, 13, 9), stride=(3, 2, 1), pad=(2, 4, 5)),
    depthwise("3d", "3x3x9", (5, 6, 17), pad=(1, 1, 4), bias=True),
    depthwise("3d-strided", "3x9x3", (7, 13, 9), stride=(2, 1, 3), pad=(1, 4, 0)),
)
FIRST, SMALL, THIN, VOLUME = SHAPES[0], SHAPES[7], SHAPES[9], SHAPES[-2]
DILATED, DILATED_AND_STRIDED = SHAPES[14], SHAPES[18]
TILED = depthwise("2d-tiled", "11x13", (9, 14), pad=((5, 4), (6, 6)), batch=3)


def bound(problem: Problem) -> float:
    """Two roundings of the result, and the growth of a float32 sum."""
    terms = len(problem.taps)
    if problem.direction is Direction.GRAD_WEIGHT:
        terms = problem.batch * torch.Size(problem.out_spatial).numel()
    unit = torch.finfo(problem.torch_dtype).eps / 2
    return float(2**0.5 * unit + 0.5 * torch.finfo(torch.float32).eps / 2 * terms**0.5)


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_shape(shape: Case, direction: Direction) -> None:
    for dtype in HALVES if shape is FIRST else HALVES[:1]:
        problem = shape.problem(direction, dtype)
        strided = direction is Direction.GRAD_INPUT and any(step > 1 for step in shape.stride)
        assert (BANDED.unsuited(problem) is not None) == strided, BANDED.unsuited(problem)
        if not strided:
            assert error_of(BANDED, problem, BANDED.space(problem).default) <= bound(problem)


@RUNS
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s.spatial) == 2], ids=lambda shape: shape.name)
def test_upright(shape: Case, direction: Direction) -> None:
    problem = shape.problem(direction, torch.float16)
    config = Config(BANDED.space(problem).default, axis="upright", tile="64x1x16")
    if shape.stride[-1] == 1 and not BANDED.unsuited(problem):
        assert error_of(BANDED, problem, config) <= bound(problem)


FORWARD_TILES = (
    "64x1x16", "128x2x8", "64x4x16", "128x8x16", "256x1x64", "64x16x16", "64x14x14", "128x9x14", "64x4x14", "256x2x32",
)  # fmt: skip
WEIGHT_TILES = ("1x16", "2x8", "4x16", "8x16", "16x8", "2x64", "2x32")


@RUNS
@pytest.mark.parametrize("axis", ["last", "before", "upright"])
@pytest.mark.parametrize("tile", FORWARD_TILES)
def test_every_kind_of_tile(tile: str, axis: str) -> None:
    _, _, wide = tile_of(Config(tile=tile))
    problem = SMALL.problem(Direction.FORWARD, torch.bfloat16)
    stages = 2 if wide == 14 else 3
    assert error_of(BANDED, problem, Config(tile=tile, axis=axis, warps=4, stages=stages)) <= bound(problem)


@RUNS
@pytest.mark.parametrize("tile", WEIGHT_TILES)
def test_every_kind_of_tile_of_the_weight_gradient(tile: str) -> None:
    problem = TILED.problem(Direction.GRAD_WEIGHT, torch.bfloat16)
    for axis, places, splits in (("last", 64, 1), ("before", 128, 2), ("last", 256, 8)):
        config = Config(tile=tile, axis=axis, places=places, splits=splits, warps=4, stages=2)
        win = window(problem, exchanged(config))
        assert win is not None
        if spread(win, *tile_of(config)[1:], places).tile_columns > 0:
            assert error_of(BANDED, problem, config) <= bound(problem)


@RUNS
@pytest.mark.parametrize("name", ["2d-long-and-thin", "2d-odd-width"])
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_the_whole_space(direction: Direction, name: str) -> None:
    problem = next(s for s in SHAPES if s.name == name).problem(direction, torch.bfloat16)
    space = BANDED.space(problem)
    assert 2 <= space.size <= 64
    for knob in space.knobs:
        for value in knob.values:
            assert error_of(BANDED, problem, Config(space.default, **{knob.name: value})) <= bound(problem)


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_operands_of_any_layout(direction: Direction) -> None:
    problem = SHAPES[8].problem(direction, torch.bfloat16, "channels_last")
    config = BANDED.space(problem).default
    assert error_of(BANDED, problem, config) <= bound(problem)
    plain = replace(problem, layout="contiguous")
    a, b, bias = operands(plain)
    exact = reference(plain, a.cpu(), b.cpu(), None if bias is None else bias.cpu())
    spaced = [torch.stack((t, t + 1), dim=-1)[..., 0] for t in (a, b)]
    shifted = [torch.cat((t.new_ones(1), t.flatten()))[1:].view(t.shape) for t in (a, b)]  # 2 bytes off a unit
    for left, right in (spaced, shifted):
        assert relative_error(BANDED.run(plain, config, left, right, bias).cpu(), exact) <= bound(problem)


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_float32_where_tf32_is_allowed(direction: Direction) -> None:
    for shape in (FIRST, SHAPES[8]):
        problem = replace(shape.problem(direction, torch.float32), fp32_precision="conv-tf32")
        assert BANDED.unsuited(problem) is None
        limit = 2e-3 if DEVICE.type == "cuda" else bound(problem)  # the interpreter multiplies in full
        assert error_of(BANDED, problem, BANDED.space(problem).default) <= limit


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_no_tap_reads_the_input(direction: Direction) -> None:
    problem = depthwise("none", "000000000000", (40,), pad=((2, 0),), bias=True).problem(direction, torch.bfloat16)
    a, b, bias = operands(problem)
    result = BANDED.run(problem, BANDED.space(problem).default, a, b, bias).cpu()
    assert torch.equal(result, reference(problem, a.cpu(), b.cpu(), None if bias is None else bias.cpu()).to(a.dtype))


@RUNS
def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are made by torch.empty: were one element left out, it would be NaN here."""
    empty = torch.empty

    def poisoned(*size: object, **more: object) -> torch.Tensor:
        made: torch.Tensor = empty(*size, **more)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    for shape, direction in itertools.product((SHAPES[2], SHAPES[8], DILATED, VOLUME), Direction):
        problem = shape.problem(direction, torch.bfloat16)
        a, b, bias = operands(problem)
        exact = reference(problem, a.cpu(), b.cpu(), None if bias is None else bias.cpu())
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            result = BANDED.run(problem, BANDED.space(problem).default, a, b, bias).cpu()
        assert not result.isnan().any()
        assert relative_error(result, exact) <= bound(problem)


@RUNS
def test_same_bits_each_time() -> None:
    problem = THIN.problem(Direction.GRAD_WEIGHT, torch.bfloat16)
    a, b, _ = operands(problem)
    config = Config(BANDED.space(problem).default, splits=2)
    assert torch.equal(BANDED.run(problem, config, a, b), BANDED.run(problem, config, a, b))


@RUNS
def test_through_the_public_functions() -> None:
    taps = TapPattern.grid((9, 9))
    x = torch.randn(2, 2, 11, 12, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    w = torch.randn(2, 1, 81, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    with adaptconv.pinned("banded"):
        y = adaptconv.conv2d(x, Kernel(w, taps), padding=4, groups=2)
        y.float().square().sum().backward()
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = torch.nn.functional.conv2d(leaves[0], leaves[1].view(2, 1, 9, 9), padding=4, groups=2)
    exact.square().sum().backward()
    assert relative_error(y.detach().cpu(), exact.detach().cpu()) < 4e-3
    for mine, theirs in zip((x, w), leaves, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert relative_error(mine.grad.cpu(), theirs.grad.cpu()) < 8e-3


@RUNS
@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_every_case_it_takes(each: Case) -> None:
    """The conformance cases in half precision: conformance itself asks in float64, which no tensor core does here."""
    for direction in Direction:
        problem = each.problem(direction, torch.float16)
        reason = BANDED.unsuited(problem)
        if reason is not None:
            assert len(reason) > 10
            continue
        assert error_of(BANDED, problem, BANDED.space(problem).default) <= bound(problem)


# ---- what needs no kernel to run -----------------------------------------------------------------


def test_some_cases_are_taken() -> None:
    taken = {c.name for c in CASES if BANDED.unsuited(c.problem(Direction.FORWARD, torch.bfloat16)) is None}
    assert {"1d-large-k31", "1d-partial-depthwise", "2d-depthwise-large-k17", "2d-depthwise-51x5"} <= taken


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (FIRST.problem(Direction.FORWARD, torch.float64), "float64"),
        (FIRST.problem(Direction.FORWARD, torch.float32), "tf32"),
        (case("c", "31", (40,), pad=15).problem(Direction.FORWARD, torch.bfloat16), "depthwise"),
        (case("c", "31", (40,), channels=(2, 4), groups=2).problem(Direction.FORWARD, torch.bfloat16), "depthwise"),
        (depthwise("c", "5x7", (9, 9)).problem(Direction.FORWARD, torch.bfloat16), "small"),
        (depthwise("c", "3d128", (400,)).problem(Direction.FORWARD, torch.bfloat16), "positions to a live tap"),
        (depthwise("c", "9d2*0.5,1,0.5", (40,)).problem(Direction.FORWARD, torch.bfloat16), "footprint"),
        (depthwise("c", "31", (80,), stride=2).problem(Direction.GRAD_INPUT, torch.bfloat16), "stride"),
    ],
)
def test_declines_in_words(problem: Problem, word: str) -> None:
    assert word in (BANDED.unsuited(problem) or "")


def on_h200(taps: str, batch: int, channels: int, *spatial: int) -> Problem:
    pattern = TapPattern.parse(taps)
    padding = tuple((w // 2, w // 2) for w in pattern.window)
    ones = (1,) * len(spatial)
    return Problem(
        Direction.FORWARD, batch, channels, channels, channels, spatial, pattern, ones, padding, "bfloat16",
        "contiguous", H200,
    )  # fmt: skip


LAYERS = [("31x31", 64, 128, 56, 56), ("27x27", 64, 512, 14, 14), ("51x5", 64, 124, 56, 56), ("31", 32, 512, 512)]


@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: str(layer[0]))
def test_predictions_are_within_reason(layer: tuple[str, int, int, int, int], direction: Direction) -> None:
    """Above the limit of the tensor cores or of memory, and the default is the best prediction of its space."""
    problem = on_h200(*layer).facing(direction)
    space = BANDED.space(problem)
    predicted = BANDED.predicted_us(problem, space.default)
    assert predicted > problem.bytes / 4300e3
    own = [BANDED.predicted_us(problem, Config(space.default, tile=tile)) for tile in space.knobs[0].values]
    assert predicted <= min(own) * 1.0001
    assert str(space.default["tile"]) == space.knobs[0].values[0]


def test_blocks_skip_what_lies_outside() -> None:
    """27x27 on 14x14: of a block's window only the map is left, 14 rows and two units, whatever the padding."""
    win = window(on_h200("27x27", 64, 512, 14, 14), False)
    assert win is not None
    whole = cut(win, 14, 14)
    assert (whole.rows, whole.units, whole.first_row, whole.before_units) == (14, 2, 0, 0)
    assert spread(win, 4, 16, 128).columns == 16


def test_high_and_narrow_kernels_stand_upright() -> None:
    """No axis is exchanged for a 51x5 kernel; a square one has no use for it, and the last axis no band to offer."""
    high = BANDED.space(on_h200("51x5", 64, 124, 56, 56))
    assert high.default["axis"] == "upright"
    assert BANDED.predicted_us(on_h200("51x5", 64, 124, 56, 56), high.default) < 0.6 * BANDED.predicted_us(
        on_h200("51x5", 64, 124, 56, 56), Config(high.default, axis="before")
    )
    for taps in ("31x31", "5x51"):
        axes = next(knob for knob in BANDED.space(on_h200(taps, 64, 124, 56, 56)).knobs if knob.name == "axis")
        assert "upright" not in axes.values


@pytest.mark.parametrize(
    ("taps", "columns"),
    [("51x5", (3, 2)), ("51x4", (2, 2)), ("51x1", (1, 0)), ("51x3d1x3", (2, 1)), ("51x3d1x4", (3, 0))],
)
def test_weight_columns_by_parity(taps: str, columns: tuple[int, int]) -> None:
    """Whole pairs of columns from a position, or from the next one, to what its weights read."""
    problem = on_h200(taps, 64, 124, 56, 56)
    win = window(problem, True)
    assert win is not None
    line = positions(win, cut(win, 1, 64))
    assert (line.even_columns, line.odd_columns) == columns
    evens = [HALF * (line.first_half + j * line.step_half) + line.late for j in range(line.even_columns)]
    odds = [HALF * (line.odd_half + j * line.step_half) + line.late + 1 for j in range(line.odd_columns)]
    assert sorted(evens + odds) == sorted({x - problem.padding[1][0] for _, x in problem.taps.offsets})


def test_rows_between_dilated_taps_are_in_no_window() -> None:
    """Every third row of an image is an image of its own, in which the kernel has seven rows, not nineteen."""
    win = window(on_h200("7x7d3x3", 128, 64, 56, 56), False)
    assert win is not None
    assert (win.extent, win.pace, win.phases, win.images) == ((1, 7, 19), (1, 3, 1), 3, 3)
    assert cut(win, 4, 16).rows == 4 - 1 + 7
    alike = window(DILATED_AND_STRIDED.problem(Direction.FORWARD, torch.bfloat16), False)  # dilation 4, stride 6
    assert alike is not None
    assert (alike.extent[1], alike.stride[1], alike.phases, alike.phase_rows) == (5, 3, 2, 6)


def test_it_is_registered() -> None:
    assert isinstance(backend_named("banded"), Banded)


@RUNS
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=str)
@pytest.mark.parametrize("spatial", [(7, 14), (14, 24), (9, 13)], ids=str)
def test_every_tile_goes_with_every_axis(spatial: tuple[int, int], direction: Direction) -> None:
    """On a map that is not square, whole rows of one axis are no rows of the other."""
    problem = depthwise("map", "13x13", spatial, pad=6).problem(direction, torch.float16)
    large = replace(problem, batch=64, c_in=512, c_out=512, groups=512)
    tiles, axes = (knob.values for knob in BANDED.space(large).knobs[:2])
    assert set(axes) == {"last", "before"}
    assert len(tiles) > 3
    for tile, axis in itertools.product(tiles, axes):
        config = Config(BANDED.space(problem).default, tile=tile, axis=axis)
        assert error_of(BANDED, problem, config) <= bound(problem), config
