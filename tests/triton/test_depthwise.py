"""The depthwise kernels in every form, direction and dtype: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import adaptconv
from adaptconv.backends import Config, backend_named
from adaptconv.backends.triton.depthwise.plan import STRIP, packing, passes
from adaptconv.backends.triton.depthwise.shapes import direct_shape
from adaptconv.kernel import Kernel
from adaptconv.problem import Device, Direction, Problem
from adaptconv.reference import reference, relative_error
from adaptconv.taps import TapPattern
from tests.cases import Case, case
from tests.triton.harness import DEVICE, RUNS, error_of, operands

BACKEND = backend_named("depthwise")
HALF, SINGLE = torch.bfloat16, torch.float32
BOUND = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 6e-7}  # a rounding of the result at most
FORMS = ("packed8", "packed16", "images", "direct")
CASES = (
    case("line-of-21", "101010101111101010101", (40,), channels=(2, 2), groups=2, batch=3, pad=10, bias=True),
    case("line-dilated", "3d16", (70,), channels=(2, 2), groups=2, batch=9, pad=16),
    case("line-strided", "5d3", (33,), channels=(2, 2), groups=2, stride=2, pad=((7, 2),)),
    case("odd-channels", "5x5", (9, 10), channels=(3, 3), groups=3, pad=2, bias=True),
    case("dilated-axes", "3x5d2x3", (11, 20), channels=(2, 2), groups=2, pad=(2, 6)),
    case("asymmetric", "2x4", (7, 9), channels=(2, 2), groups=2, pad=((0, 1), (1, 2))),
    case("large", "17x19", (8, 20), channels=(1, 1), groups=1, batch=1, pad=(8, 9)),
    case("strided", "5x7", (13, 15), channels=(2, 2), groups=2, stride=(2, 3), pad=((1, 2), (3, 0)), bias=True),
    case("stride-over-kernel", "2x2", (9, 10), channels=(2, 2), groups=2, stride=3),
    case("holes", "1000100/0010000/0000001/0100010/1000000/0001000/0010001", (9, 12), channels=(2, 2), groups=2, pad=3),
    case("multiplier", "3x3", (6, 7), channels=(2, 4), groups=2, pad=1, bias=True),
    case("multiplier-strided", "3x3", (7, 6), channels=(2, 6), groups=2, stride=2, pad=1),
    case("of-one-channel", "3x9", (6, 17), channels=(1, 2), pad=(1, 4)),
    case("dead-taps", "3x3d12x12", (5, 6), channels=(2, 2), groups=2, pad=12),
    case("one-pixel", "3x3", (1, 1), channels=(2, 2), groups=2, batch=1, pad=1, bias=True),
    case("volume", "3x3x3d1x1x2", (4, 5, 7), channels=(2, 2), groups=2, pad=(1, 1, 2), bias=True),
    case("volume-strided", "2x3x3", (5, 4, 6), channels=(2, 2), groups=2, stride=(2, 1, 2),
         pad=((1, 0), (1, 1), (0, 1))),
)  # fmt: skip
NAMED = {each.name: each for each in CASES}


def made(each: Case, direction: Direction, dtype: torch.dtype, layout: str = "contiguous") -> Problem:
    problem = each.problem(direction, dtype, layout)
    return replace(problem, device=Device.of(DEVICE))


def config(direction: Direction, **knobs: str | int) -> Config:
    own = {"groups": 2, "splits": 2} if direction is Direction.GRAD_WEIGHT else {"share": 2}
    return Config({"warps": 4, **own, **knobs})


def check(problem: Problem, knobs: Config) -> None:
    assert BACKEND.rejects(problem) is None
    assert error_of(BACKEND, problem, knobs) < BOUND[problem.torch_dtype]


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_every_form_agrees_with_the_oracle(each: Case, form: str, direction: Direction) -> None:
    dtype = (HALF, SINGLE)[(CASES.index(each) + FORMS.index(form)) % 2]  # either meets every case and every form
    check(made(each, direction, dtype), config(direction, form=form))


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("form", ["packed16", "direct"])
@pytest.mark.parametrize("name", ["odd-channels", "strided", "multiplier-strided", "volume"])
def test_channels_last(name: str, form: str, direction: Direction) -> None:
    check(made(NAMED[name], direction, torch.float16 if form == "direct" else HALF, "channels_last"),
          config(direction, form=form))  # fmt: skip


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("channels", [4, 8, 70])
def test_vectors_of_channels(channels: int, direction: Direction) -> None:
    """Words of two channels, whole vectors of eight, and more than one block of channels."""
    each = case("vectors", "3x3", (5, 4), channels=(channels, channels), groups=channels, batch=1, pad=1, bias=True)
    for dtype in (HALF, torch.float16, SINGLE):
        check(made(each, direction, dtype, "channels_last"), config(direction, form="direct"))


@RUNS
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_of_the_other_kind(form: str) -> None:
    for direction in Direction:
        check(made(NAMED["holes"], direction, torch.float16), config(direction, form=form))


LARGE = case("knobs", "3x5", (13, 16), channels=(2, 2), groups=2, batch=9, pad=(1, 2))


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_every_value_of_every_knob(direction: Direction) -> None:
    problem = made(LARGE, direction, HALF)
    wide = made(case("wide", "5x7", (61, 64), channels=(64, 64), groups=64, batch=9, pad=(2, 3)), direction, HALF)
    space = BACKEND.space(wide)
    assert {k.name for k in space.knobs} >= {"form", "warps"}
    assert {k.values for k in space.knobs if k.name == "form"} == {FORMS}
    start = Config(space.default, form="packed8")
    changed = [Config(start, **{k.name: v}) for k in space.knobs for v in k.values if v != start[k.name]]
    for each in (start, *changed):
        assert error_of(BACKEND, problem, each) < BOUND[HALF], each


@RUNS
@pytest.mark.parametrize("form", FORMS)
def test_operands_of_any_strides(form: str) -> None:
    for direction in Direction:
        problem = made(NAMED["odd-channels"], direction, SINGLE)
        a, b, bias = operands(problem)
        far, away = (torch.stack((t, torch.full_like(t, float("nan"))), dim=-1)[..., 0] for t in (a, b))
        knobs = config(direction, form=form)
        assert torch.equal(BACKEND.run(problem, knobs, far, away, bias), BACKEND.run(problem, knobs, a, b, bias))
        if direction is not Direction.GRAD_WEIGHT:
            last = a.contiguous(memory_format=torch.channels_last)
            assert torch.equal(BACKEND.run(problem, knobs, last, b, bias), BACKEND.run(problem, knobs, a, b, bias))


@RUNS
@pytest.mark.parametrize("form", FORMS)
def test_no_element_is_left_unwritten(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = plain(*args, **kwargs)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    plain = torch.empty
    monkeypatch.setattr(torch, "empty", filled)
    for name, direction in itertools.product(("strided", "stride-over-kernel"), Direction):
        problem = made(NAMED[name], direction, SINGLE)
        a, b, bias = operands(problem)
        assert BACKEND.run(problem, config(direction, form=form), a, b, bias).isfinite().all()


@RUNS
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_without_taps_the_result_is_bias_or_zero(direction: Direction) -> None:
    each = case("none", "000/000", (6, 7), channels=(3, 3), groups=3, pad=1, bias=True)
    problem = made(each, direction, HALF)
    a, b, bias = operands(problem)
    result = BACKEND.run(problem, BACKEND.space(problem).default, a, b, bias)
    right = torch.zeros_like(result) if bias is None else bias.view(1, -1, 1, 1).expand_as(result)
    assert torch.equal(result, right)


@RUNS
@pytest.mark.parametrize("form", FORMS)
def test_the_weight_gradient_is_the_same_every_time(form: str) -> None:
    problem = made(LARGE, Direction.GRAD_WEIGHT, SINGLE)
    a, b, _ = operands(problem)
    knobs = config(problem.direction, form=form, splits=4)
    assert torch.equal(BACKEND.run(problem, knobs, a, b), BACKEND.run(problem, knobs, a, b))


@RUNS
def test_through_the_public_functions() -> None:
    generator = torch.Generator().manual_seed(3)
    taps = TapPattern.parse("101/111/010")
    x = torch.randn(2, 4, 7, 8, generator=generator).to(DEVICE).requires_grad_()
    w = torch.randn(4, 1, len(taps), generator=generator).to(DEVICE).requires_grad_()
    with adaptconv.pinned("depthwise"):
        y = adaptconv.conv2d(x, Kernel(w, taps), padding=1, groups=4)
        y.square().sum().backward()
    left, right = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = torch.nn.functional.conv2d(left, Kernel(right, taps).dense(), padding=1, groups=4)
    exact.square().sum().backward()
    for ours, true in ((y, exact), (x.grad, left.grad), (w.grad, right.grad)):
        assert ours is not None
        assert true is not None
        assert relative_error(ours.detach().cpu(), true.detach().cpu()) < 2e-6


def test_a_stride_splits_the_input_gradient_into_phases() -> None:
    problem = NAMED["strided"].problem(Direction.GRAD_INPUT, HALF)
    found = passes(problem)
    assert len(found) == 6
    assert sorted(t for here in found for t in here.taps) == list(range(35))
    w, dy = torch.ones(problem.weight_shape), torch.ones(problem.output_shape)
    counted = reference(problem, dy, w)  # how many taps reach each place
    for here in found:
        (_, y, x), (_, down, across) = here.first, here.skip
        assert int(counted[0, 0, y::down, x::across].max()) <= len(here.taps)


def test_packing_finds_phases_and_alignment() -> None:
    dilated = case("d", "7d5", (160,), channels=(4, 4), groups=4, pad=15).problem(Direction.FORWARD, HALF)
    rows = packing(passes(dilated)[0], reach=8)
    assert rows.spread == 5
    assert len(rows.narrow) == 1
    assert not rows.lone
    row = case("k", "17", (64,), channels=(4, 4), groups=4, pad=8).problem(Direction.FORWARD, HALF)
    rows = packing(passes(row)[0], reach=16)
    assert (len(rows.wide), len(rows.narrow), len(rows.lone)) == (1, 0, 1)
    assert sorted(t for t in rows.indices if t >= 0) == list(range(17))


def test_small_planes_share_a_tile_and_channels_make_whole_vectors() -> None:
    shape = direct_shape(Config(form="direct", warps=4, share=1), last=False, channels=64, unit=1, places=40)
    assert (shape.places, shape.channels) == (64, 2)
    shape = direct_shape(Config(form="direct", warps=4, share=1), last=True, channels=24, unit=8, places=1 << 20)
    assert shape.places * shape.channels == 4 * 32 * STRIP


def test_what_it_declines_is_said_in_words() -> None:
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"dtype": "float64"}, "float64"), ({"groups": 1}, "one input channel"), ({"batch": 1 << 30}, "counters"),
    )  # fmt: skip
    for change, word in changes:
        problem = NAMED["odd-channels"].problem(Direction.FORWARD, HALF)
        assert word in (BACKEND.rejects(replace(problem, **change)) or "")
