"""The sparse backend: its schedule, and its kernels against float64, interpreted or on a GPU."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import product

import pytest
import torch

import adaptconv
from adaptconv import Kernel, TapPattern
from adaptconv.backends import backend_named
from adaptconv.backends.base import Config
from adaptconv.backends.triton.hardware import CARDS, card
from adaptconv.backends.triton.sparse import schedule, tables
from adaptconv.backends.triton.sparse.tiles import (
    PLANAR_PRODUCT_TILES,
    PLANAR_WEIGHT_TILES,
    PRODUCT_TILES,
    WEIGHT_TILES,
    Tile,
    shared_bytes,
)
from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Direction, Padding, Problem
from tests.triton.harness import DEVICE, RUNS, error_of, operands

SPARSE = backend_named("sparse")
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-21}  # tf32 apart: see bound


def problem(
    taps: str, spatial: tuple[int, ...], channels: tuple[int, int] = (16, 24), *, batch: int = 2, groups: int = 1,
    stride: int | tuple[int, ...] = 1, pad: int | tuple[int | tuple[int, int], ...] = 0, bias: bool = False,
    dtype: str = "bfloat16", layout: str = "channels_last", direction: Direction = Direction.FORWARD,
) -> Problem:  # fmt: skip
    axes = len(spatial)
    pads: Padding = tuple((p, p) if isinstance(p, int) else p for p in ((pad,) * axes if isinstance(pad, int) else pad))
    return Problem(
        direction, batch, *channels, groups, spatial, TapPattern.parse(taps),
        (stride,) * axes if isinstance(stride, int) else stride, pads, dtype, layout, Device.of(DEVICE),
        bias and direction is Direction.FORWARD, fp32_precision(getattr(torch, dtype), DEVICE),
    )  # fmt: skip


RING = "111/101/111"
CASES = {
    "2d-bias": problem("3x3", (7, 9), pad=1, bias=True),
    "2d-odd-channels": problem("3x3", (6, 7), (13, 19), pad=1, bias=True),
    "2d-per-axis-dilation-and-stride": problem("3x3d2x3", (9, 10), stride=2, pad=((1, 2), (3, 0))),
    "2d-mixed-strides-even-kernel": problem("2x4", (8, 11), (24, 16), stride=(3, 2), pad=((0, 1), (2, 1)), bias=True),
    "2d-stride-over-kernel": problem("2x2", (9, 9), stride=3),
    "2d-dead-taps": problem("3x3d6x6", (7, 7), (16, 40), pad=6, bias=True),
    "2d-all-but-one-dead": problem("3x3d9x9", (8, 8), pad=9),
    "2d-ring-two-groups": problem(RING, (6, 5), (32, 48), groups=2, pad=1),
    "2d-groups-of-odd-channels": problem("3x3", (5, 6), (27, 33), groups=3, pad=1, bias=True),
    "2d-one-pixel": problem("3x3", (1, 1), (16, 16), batch=1, pad=1, bias=True),
    "2d-pointwise": problem("1x1", (5, 6), (40, 24)),
    "2d-wide": problem("2x1", (12, 16), (72, 136), pad=((1, 0), (0, 0))),
    "2d-no-taps": problem("000/000", (4, 5), pad=1, bias=True),
    "2d-padding-over-window": problem("3x3", (3, 4), pad=5),
    "1d-dilated-strided": problem("3d4", (33,), stride=3, pad=((5, 4),), layout="contiguous", bias=True),
    "1d-partial": problem("1010111010101", (40,), pad=6, layout="contiguous"),
    "1d-planar-by-8": problem("3d8", (40,), (20, 40), pad=8, layout="contiguous", bias=True),
    "1d-planar-by-4-causal": problem("2d12", (36,), (16, 24), pad=((12, 0),), layout="contiguous"),
    "1d-planar-by-2-groups": problem("3d2", (18,), (24, 32), groups=2, pad=2, layout="contiguous", bias=True),
    "1d-planar-dead-taps": problem("3d24", (32,), pad=24, layout="contiguous"),
    "2d-planar-across-rows": problem("3x1d2x1", (5, 8), pad=(2, 0), layout="contiguous", bias=True),
    "3d-dilated": problem("3x2x3d2x1x2", (4, 5, 6), (16, 16), batch=1, pad=(2, 1, 2)),
    "3d-strided": problem("2x3x2", (5, 6, 7), (16, 16), batch=1, stride=(2, 1, 3), pad=1),
    "3d-temporal": problem("3x1x1d2x1x1", (6, 4, 3), pad=(2, 0, 0), bias=True),
    "3d-still-outer-axes": problem("1x1x3", (2, 3, 9), pad=(0, 0, 1)),
}
PLANAR = tuple(name for name in CASES if "planar" in name)
FEW = ("2d-bias", "1d-planar-by-8", "2d-per-axis-dilation-and-stride", "2d-dead-taps", "1d-partial")


def bound(at: Problem) -> float:
    """Relative error a sound sum may have: roundings of the result, and of products where tf32 is allowed."""
    return 2.0**-9 if at.dtype == "float32" and "tf32" in at.fp32_precision else ROUNDING[at.dtype]


def every_knob(at: Problem) -> list[Config]:
    """The default, and each knob's other values one at a time."""
    space = SPARSE.space(at)
    default = space.default
    return [default, *(Config(default, **{k.name: v}) for k in space.knobs for v in k.values if v != k.default)]


@pytest.fixture(autouse=True)
def _results_begin_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is seen: new tensors are not zero by chance."""
    empty = torch.Tensor.new_empty

    def filled(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        made = empty(self, *args, **options)  # type: ignore[arg-type]
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str, direction: Direction) -> None:
    at = CASES[name].facing(direction)
    assert SPARSE.rejects(at) is None
    for dtype in ("bfloat16", "float32"):
        here = replace(at, dtype=dtype, fp32_precision=fp32_precision(getattr(torch, dtype), DEVICE))
        error = error_of(SPARSE, here, SPARSE.space(here).default)
        assert error < bound(here), f"{here}: {error}"


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("name", FEW)
def test_every_knob_and_layout(name: str, direction: Direction) -> None:
    at = replace(CASES[name].facing(direction), dtype="float16")
    for config in every_knob(at):
        assert error_of(SPARSE, at, config) < bound(at), config
    other = replace(at, layout="contiguous" if at.layout == "channels_last" else "channels_last")
    assert error_of(SPARSE, other, SPARSE.space(other).default) < bound(other)


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("name", PLANAR)
def test_channels_may_stay_outermost(name: str, direction: Direction) -> None:
    at = CASES[name].facing(direction)
    tiles = [str(value) for value in SPARSE.space(at).knobs[0].values if str(value).endswith("p")]
    assert tiles
    for split in (1, 4):
        assert error_of(SPARSE, at, Config(tile=tiles[-1], split=split, cut=split == 1)) < bound(at), split


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_every_tile_of_this_gpu(direction: Direction) -> None:
    """Tiles much larger than the problem are never declared for it, but right all the same."""
    at = problem("2x2d1x2", (9, 10), (40, 48), batch=1, pad=1, direction=direction)
    menu = WEIGHT_TILES if direction is Direction.GRAD_WEIGHT else PRODUCT_TILES
    family = card(at.device).family
    tiles = menu[family]["half"]
    for tile in tiles:
        config = Config(tile=str(tile), split=1)
        assert error_of(SPARSE, at, config) < bound(at), tile
    planar = problem("2d8", (48,), (40, 48), batch=1, pad=4, layout="contiguous", direction=direction)
    menu = PLANAR_WEIGHT_TILES if direction is Direction.GRAD_WEIGHT else PLANAR_PRODUCT_TILES
    for tile in menu[family]:
        config = Config(tile=str(tile), split=1)
        assert error_of(SPARSE, planar, config) < bound(planar), tile


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_parts_of_sums_over_taps_and_channels(direction: Direction) -> None:
    """More parts than blocks of channels: taps are split too, some parts may be empty."""
    at = problem("2x2", (5, 6), (40, 24), pad=1, bias=True, direction=direction)
    tile = SPARSE.space(at).default["tile"]
    for split in (2, 8):
        assert error_of(SPARSE, at, Config(tile=tile, split=split)) < bound(at), split


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_operands_of_any_strides_give_the_same(direction: Direction) -> None:
    at = problem("3x3", (6, 7), pad=1, direction=direction)
    a, b, _ = operands(at)
    config = SPARSE.space(at).default
    expected = SPARSE.run(at, config, a, b)

    def strided(t: torch.Tensor) -> torch.Tensor:
        return torch.stack((t, t + 1), dim=-1)[..., 0]

    def unaligned(t: torch.Tensor) -> torch.Tensor:
        moved = torch.cat((t.new_zeros(1), t.movedim(1, -1).flatten()))[1:]
        return moved.view(t.movedim(1, -1).shape).movedim(-1, 1)

    assert torch.equal(SPARSE.run(at, config, strided(a), strided(b)), expected)
    assert torch.equal(SPARSE.run(at, config, a.contiguous(), b.transpose(0, 1).contiguous().transpose(0, 1)), expected)
    assert torch.equal(SPARSE.run(at, config, unaligned(a), unaligned(b)), expected)
    assert torch.equal(SPARSE.run(at, config, a, b), expected), "two runs agree bit by bit"


@RUNS
def test_the_public_call_and_its_gradients() -> None:
    torch.manual_seed(0)
    taps = TapPattern.parse(RING)
    x = torch.randn(2, 16, 6, 7, device=DEVICE).to(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(8, 16, 8, device=DEVICE, requires_grad=True)
    with adaptconv.pinned("sparse"):
        y = adaptconv.conv2d(x, Kernel(w, taps), padding=1)
        y.square().sum().backward()
    dense = torch.zeros(8, 16, 3, 3, device=DEVICE)
    places = [tuple(o) for o in taps.offsets]
    rows, columns = torch.tensor(places, device=DEVICE).unbind(1)
    dense[:, :, rows, columns] = w.detach()
    dense.requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    expected = torch.nn.functional.conv2d(x2, dense, padding=1)
    expected.square().sum().backward()
    assert dense.grad is not None
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-3, atol=1e-1)
    torch.testing.assert_close(w.grad, dense.grad[:, :, rows, columns], rtol=1e-3, atol=1e-1)


# ---- the schedule, without kernels ------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_boxes_cover_each_result_once_with_every_tap_that_reads(name: str, direction: Direction, cut: bool) -> None:
    at = CASES[name].facing(direction)
    s = schedule.sweep(at)
    expected = set()
    for i, tap in enumerate(s.taps):
        reads = []
        for axis in s.axes:
            # A step multiplies where targets are counted, a pitch divides where sources are.
            sources = {target: (target * axis.step + axis.offsets[i]) / axis.pitch for target in range(axis.target)}
            reads.append([o for o, source in sources.items() if source.is_integer() and 0 <= source < axis.source])
        expected |= {(tap, place) for place in product(*reads)}
    found, covered = set(), []
    for job in schedule.jobs(at, 16, cut):
        for counts in product(*(range(segment.count) for segment in job.segments)):
            place = tuple(
                segment.first + axis.pitch * q for segment, axis, q in zip(job.segments, s.axes, counts, strict=True)
            )
            covered.append(place)
            for t in job.taps:
                sources = [
                    axis.step * q + segment.offsets[t]
                    for segment, axis, q in zip(job.segments, s.axes, counts, strict=True)
                ]
                if all(0 <= source < axis.source for source, axis in zip(sources, s.axes, strict=True)):
                    found.add((s.taps[t], place))
    assert found == expected
    assert sorted(covered) == sorted(product(*(range(axis.target) for axis in s.axes)))


def test_boxes_leave_out_taps_where_they_read_nothing() -> None:
    """ASPP at rate 18 on 33x33: of the products of whole maps 40 % are inside, and no more are computed."""
    at = problem("3x3d18x18", (33, 33), (64, 64), batch=16, pad=18)
    s = schedule.sweep(at)
    whole, cut = (schedule.jobs(at, 128, c) for c in (False, True))
    assert len(whole) == 1 and len(cut) == 9
    inside = sum(job.size * len(job.taps) for job in cut) / (33 * 33 * 9)
    assert inside == pytest.approx(0.405, abs=0.001)
    assert schedule.products(cut, s.batch, 128) < 0.5 * schedule.products(whole, s.batch, 128)
    assert [len(job.taps) for job in cut] == sorted((len(job.taps) for job in cut), reverse=True)


def test_axes_along_which_nothing_moves_are_merged() -> None:
    temporal = schedule.sweep(problem("3x1x1", (8, 5, 6), pad=(1, 0, 0)))
    assert [axis.source for axis in temporal.axes] == [240] and temporal.axes[0].offsets == (-30, 0, 30)
    last = schedule.sweep(problem("1x1x3", (8, 5, 6), pad=(0, 0, 1)))
    assert last.batch == 2 * 8 * 5 and [axis.source for axis in last.axes] == [6]
    strided = schedule.sweep(problem("3x1", (8, 6), stride=(2, 1), pad=(1, 0)))
    assert len(strided.axes) == 2, "a step along the outer axis is no step along both"


def test_a_box_of_a_weight_gradient_is_where_its_tap_reads() -> None:
    at = problem("3x3d6x6", (7, 7), pad=6, direction=Direction.GRAD_WEIGHT)
    table = tables.sums(at, 1)
    assert [box[:3] for box in table.boxes][:5] == [(1, 1, 1), (1, 1, 7), (1, 1, 1), (1, 7, 1), (1, 7, 7)]
    assert table.slots == tuple(range(9))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"dtype": "float64"}, "float64"),
        ({"c_in": 32, "c_out": 32, "groups": 32}, "thin"),
        ({"c_in": 4}, "thin"),
        ({"taps": TapPattern.parse("3x3d2x2*0.5,1,0.5x0.5,1,0.5")}, "footprint"),
        ({"direction": Direction.GRAD_INPUT, "stride": (16, 16), "spatial": (64, 64)}, "phases"),
        ({"spatial": (1 << 14, 1 << 14)}, "2\\^31 elements"),
        ({"batch": 1 << 25, "c_in": 8, "c_out": 8}, "2\\^31 pixels"),
    ],
)
def test_declines_in_words(changes: dict[str, object], word: str) -> None:
    reason = SPARSE.unsuited(replace(problem("3x3", (8, 9), pad=1), **changes))  # type: ignore[attr-defined, arg-type]
    assert reason is not None
    assert re.search(word, reason), reason


def test_tiles_are_text_both_ways_and_declared_ones_fit_the_problem() -> None:
    limits = {facts.family: facts.shared_bytes for facts in CARDS.values()}
    for menu in (PRODUCT_TILES, WEIGHT_TILES):
        for family, kinds in menu.items():
            for kind, tile in ((kind, tile) for kind, tiles in kinds.items() for tile in tiles):
                assert Tile.parse(str(tile)) == tile, family
                assert shared_bytes(tile, 2 if kind == "half" else 4, family) <= limits[family], tile
    small = SPARSE.space(problem("3x3", (4, 4), (16, 16), pad=1))
    large = SPARSE.space(problem("3x3", (64, 64), (512, 512), batch=16, pad=1))
    assert all(Tile.parse(str(v)).n <= 32 for v in small.knobs[0].values)
    assert large.default["tile"] in ("m128n256k64w8s3", "m256n128k64w8s3")
    assert large.default["split"] == 1


def test_predictions_grow_with_work_and_fall_with_dead_taps() -> None:
    def us(**changes: object) -> float:
        at = problem("3x3d18x18", (33, 33), (512, 256), batch=16, pad=18)
        at = replace(at, **changes)  # type: ignore[arg-type]
        return SPARSE.predicted_us(at, SPARSE.space(at).default)  # type: ignore[attr-defined, no-any-return]

    assert us(c_in=2048) > 2 * us()
    dense = us(taps=TapPattern.parse("3x3"), padding=((1, 1), (1, 1)))
    assert us() < 0.7 * dense
    assert us(layout="contiguous") > us()
    at = problem("3x3d18x18", (33, 33), (512, 256), batch=16, pad=18)
    default = SPARSE.space(at).default
    assert SPARSE.predicted_us(at, Config(default, cut=False)) > SPARSE.predicted_us(at, default)  # type: ignore[attr-defined]
