"""What predictions make of a record of a similar problem; that they choose well is for the benchmarks to say."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

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


HERE = case("grouped", "3x3", (9, 8), channels=(4, 4), groups=4, pad=1).problem(Direction.FORWARD, torch.float32)
ODD = {  # what a file may say in place of what is there
    "groups that divide nothing": ("c4-4 g4", "c4-6 g4"),
    "no outputs": (" p1x1 ", " p-1x-1 "),
    "fewer than no outputs": (" p1x1 ", " p-9x-9 "),
    "no input": (" i9x8 ", " i9x0 "),
    "no batch": (f" n{HERE.batch} ".lstrip(), "n0 "),
    "zeros without end": (" p1x1 ", " p9999999:1x1 "),
    "no share of the taps": (" t3x3 ", " t3x3~0.00 "),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("backend", ["native", "gather", "cpp"])
def test_a_record_of_no_problem_breaks_nothing(name: str, backend: str) -> None:
    chosen = backend_named(backend)
    if chosen.rejects(HERE):
        pytest.skip(f"{backend} declines here")
    key = HERE.key().replace(*ODD[name])
    assert key != HERE.key()
    for gain, p20_us in ((1.0, 1e3), (9.0, 1e3), (0.0, 0.0)):
        record = replace(record_of(HERE, chosen.default(HERE), gain), p20_us=p20_us)
        object.__setattr__(record, "key", key)
        with contextlib.suppress(ValueError):  # most keys are refused on writing already
            records.default_store().write(record)
        records.advance()
        assert dispatch.plan(HERE).choice.backend in ("native", backend)


def test_shipped_records_fit_what_backends_declare() -> None:
    """On the processor they are of; what a knob added later must not take from them."""
    for pack in sorted(Path(records.__file__).parents[2].glob("tuning_db/cpu-*.json")):
        for record in json.loads(pack.read_text())["records"]:
            problem = problem_of(record["key"], Device("cpu", "any", 2))
            backend = backend_named(record["backend"])
            if backend.name == "cpp" or record["version"] != backend.version:
                continue  # cpp may be without a compiler here
            space = backend.space(problem)
            config = dispatch._as_declared(record["config"], space)
            said = space.problem_with(config)
            other_kernels = said is not None and "compute" in said  # what torch has no kernels for differs by processor
            assert backend.rejects(problem) is None and (said is None or other_kernels), (record["key"], said)


def test_a_route_that_was_not_there_to_name_is_natives() -> None:
    several = case("volume", "3x3x3", (4, 5, 6), channels=(4, 4), batch=2, pad=1).problem(
        Direction.FORWARD, torch.float32
    )
    single = replace(several, batch=1)
    records.default_store().write(record_of(several, PADDED, 4.0))
    assert dispatch.plan(several).choice == PADDED
    near = dispatch.plan(single)
    assert near.source is Source.NEAREST, "a route more or less does not part neighbours"
    assert "route" in backend_named("native").space(single).default
