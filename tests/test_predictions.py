"""What predictions make of a record of a similar problem; that they choose well is for the benchmarks to say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaptconv import dispatch, records
from adaptconv.backends import Choice, Config, backend_named
from adaptconv.dispatch import Source
from adaptconv.predictions import COST_GAIN, carried_over
from adaptconv.problem import Device, Direction, Problem
from adaptconv.records import Record, problem_of
from adaptconv.taps import TapPattern
from tests.cases import CASES, case

CPU = Device("cpu", "any", 2)
PLAIN = Choice("native", 1, Config(layout="asis", pad="implicit"))
TURNED = Choice("native", 1, Config(layout="channels_last", pad="implicit"))
PADDED = Choice("native", 1, Config(layout="asis", pad="explicit"))


def depthwise(window: int, layout: str = "contiguous", **changes: object) -> Problem:
    """On 14x14 maps; up to 13x13 torch has a fast contiguous kernel, from there on a loop."""
    taps, pad = TapPattern.grid((window, window), (1, 1)), window // 2
    problem = Problem(
        Direction.FORWARD, 32, 320, 320, 320, (14, 14), taps, (1, 1), ((pad, pad),) * 2, "float32", layout, CPU
    )  # fmt: skip
    return replace(problem, **changes)  # type: ignore[arg-type]


def record_of(problem: Problem, choice: Choice, gain: float) -> Record:
    return Record(
        key=problem.key(), backend=choice.backend, version=choice.version, config=dict(choice.config), p20_us=1e3,
        median_us=1e3, p80_us=1e3, native_us=1e3 * gain, error=1e-7, native_error=1e-7,
        toolchain=records.toolchain(torch.device("cpu")), measured_on="2026-01-31",
    )  # fmt: skip


def cost(problem: Problem, choice: Choice) -> float:
    return backend_named(choice.backend).cost(problem, choice.config)


def test_a_key_is_read_back_as_its_problem() -> None:
    density = replace(depthwise(17), taps=depthwise(17).taps.with_density(0.125))
    problems = [each.problem(direction, torch.float32) for each in CASES for direction in Direction]
    assert any(problem.taps.footprint for problem in problems)
    for problem in (*problems, density, depthwise(13, bias=True, deterministic=True, fp32_precision="tf32")):
        assert problem_of(problem.key(), problem.device) == problem


@pytest.mark.parametrize("bad", ["c321-320", "g0", "c0-0", "s0x1", "t5x5x5", "n1"])
def test_a_key_of_no_problem_is_refused(bad: str) -> None:
    words = depthwise(5).key().split(" ")
    words = [bad if word[0] == bad[0] and word[1].isdigit() else word for word in words]
    if bad == "n1":
        words.remove("nobias")
    with pytest.raises(ValueError, match=r"key|problem"):
        problem_of(" ".join(words), CPU)


def test_a_neighbours_winner_is_kept_where_predictions_grow_alike() -> None:
    near = depthwise(13, batch=64)
    found = carried_over(near, record_of(depthwise(13), PADDED, 1.6), PADDED, 0.5)
    assert found.choice == PADDED and "gained 1.60x" in found.why and "expected here" in found.why
    assert found.gain_us == pytest.approx(1200, rel=0.2), "twice the batch, twice the 600 us gained there"
    close = carried_over(near, record_of(depthwise(13), PADDED, 1.3), PADDED, 0.5)
    assert close.choice == PLAIN and close.gain_us == 0, "too close to leave native"
    assert carried_over(near, record_of(depthwise(13), PLAIN, 1.0), PLAIN, 0.5).choice == PLAIN


def test_a_neighbours_native_is_left_where_predictions_see_a_cliff() -> None:
    beyond = depthwise(15)
    found = carried_over(beyond, record_of(depthwise(13), PLAIN, 1.0), PLAIN, 0.5)
    assert cost(beyond, PLAIN) > COST_GAIN * cost(beyond, found.choice) and "gained 1.00x" in found.why


def test_a_neighbours_winner_is_left_where_predictions_see_it_fall() -> None:
    """In channels_last the larger window is fast too, and turning it contiguous would be the slow way."""
    turned = Choice("native", 1, Config(layout="contiguous", pad="implicit"))
    here, there = depthwise(15, "channels_last"), depthwise(13, "channels_last")
    assert carried_over(there, record_of(there, turned, 1.7), turned, 0.0).choice == turned
    assert carried_over(here, record_of(there, turned, 1.7), turned, 0.5).choice == PLAIN


def test_taps_that_are_no_grid_take_the_neighbours_winner() -> None:
    there = case("holed", "1011011", (20,), pad=3).problem(Direction.FORWARD, torch.float32)
    gather = backend_named("gather").default(there)
    found = carried_over(replace(there, batch=4), record_of(there, gather, 1.0), gather, 0.5)
    assert found.choice == gather and found.gain_us is None


def test_where_nothing_is_predicted_the_measured_gain_decides() -> None:
    card = Device("xpu", "Other", 0)
    here, there = depthwise(15, device=card), depthwise(13, device=card)
    assert carried_over(here, record_of(there, TURNED, 3.0), TURNED, 0.5).choice == TURNED
    assert carried_over(here, record_of(there, TURNED, 1.3), TURNED, 0.5).choice == PLAIN


def test_a_record_of_no_problem_breaks_nothing() -> None:
    here = case("grouped", "3x3", (9, 8), groups=2, pad=1).problem(Direction.FORWARD, torch.float32)
    channels = f"c{here.c_in}-{here.c_out} g{here.groups}"
    odd = here.key().replace(channels, f"c{here.c_in}-{here.c_out} g3")
    assert here.c_in % 3 and odd != here.key()
    for gain in (1.0, 9.0, 0.0):
        record = replace(record_of(here, TURNED, gain), key=odd, p20_us=0.0 if gain == 0 else 1e3)
        records.default_store().write(record)
        assert dispatch.plan(here).source is Source.NEAREST
    records.default_store().write(replace(record_of(here, TURNED, 0.0), p20_us=0.0))
    assert dispatch.plan(replace(here, batch=3)).source is Source.NEAREST
