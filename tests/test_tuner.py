"""Tuning: who may win, who may not, and what is left when it ends early. Times are faked where they decide."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import adaptconv
from adaptconv import dispatch, measure, records
from adaptconv.backends import _BY_NAME, BACKENDS, Choice, Config, Knob, Space, backend_named
from adaptconv.backends.native import Native
from adaptconv.dispatch import Source
from adaptconv.measure import Timing
from adaptconv.problem import Direction, Problem
from adaptconv.records import DatabaseWarning, Record
from adaptconv.reference import reference, relative_error
from adaptconv.tuner import (
    TuneError,
    bench,
    contest,
    entrants,
    final,
    load_factory,
    session,
    slices,
    tune,
    tune_problems,
)
from adaptconv.tuner.search import Search, open_storage, quiet
from tests.cases import case

AMPLE_S = 600.0
PLAIN = "native@1{layout=asis,pad=implicit}"
PADDED = "native@1{layout=asis,pad=explicit}"
LAST = "native@1{layout=channels_last,pad=implicit}"
SMALL = case("small", "3x3d2x2", (9, 8), pad=2)
HOLED = case("holed", "1011011", (20,), pad=3)

Times = Mapping[str, tuple[float, float]]  # (p20, min) in microseconds by canonical text


def problem_of(which: Any = SMALL, direction: Direction = Direction.FORWARD, **changes: Any) -> Problem:
    problem: Problem = which.problem(direction, torch.float32)
    return replace(problem, **changes)


class FakeClock:
    """Stands in for ``measure.interleave``: every choice takes a given time, others 100 us."""

    def __init__(self, *runs: Times) -> None:
        self.runs = list(runs)
        self.asked: list[list[str]] = []

    def __call__(self, candidates: Mapping[str, Callable[[], object]], **settings: Any) -> dict[str, Timing]:
        assert settings["min_rounds"] <= settings["max_rounds"] and settings["budget_s"] >= 0
        self.asked.append(list(candidates))
        times = self.runs[min(len(self.asked), len(self.runs)) - 1] if self.runs else {}
        timings = {}
        for name, call in candidates.items():
            call()
            p20, least = times.get(name, (100.0, 100.0))
            timings[name] = Timing(p20, p20 + 1, p20 + 2, least, 5)
        return timings


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Problems this small gain nothing from two, and lose much where another process wants the second core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeClock]:
    monkeypatch.setattr(contest, "_HOPELESS_US", float("inf"))
    monkeypatch.setattr(session, "PROBLEM_S", AMPLE_S)

    def install(*runs: Times) -> FakeClock:
        fake = FakeClock(*runs)
        monkeypatch.setattr(measure, "interleave", fake)
        return fake

    return install


def tuned(problem: Problem, **settings: Any) -> Record:
    result = tune_problems([problem], budget_s=AMPLE_S, progress=False, force=True, **settings)
    record = result.rows[0].record
    assert record is not None and result.rows[0].status == "tuned", result.rows
    return record


def text_of(record: Record) -> str:
    return str(Choice(record.backend, record.version, Config(record.config)))


# ---- who wins -----------------------------------------------------------------------------------


def test_the_fastest_sound_candidate_wins_and_is_what_dispatch_then_runs(clock: Callable[..., FakeClock]) -> None:
    clock({PLAIN: (100, 99), LAST: (40, 39), "gather@1{workspace_mib=4}": (60, 59)})
    record = tuned(problem_of())
    assert text_of(record) == LAST
    assert (record.p20_us, record.median_us, record.p80_us, record.native_us) == (40, 41, 42, 100)
    assert {rival.choice: rival.p20_us for rival in record.rivals}["gather@1{workspace_mib=4}"] == 60
    assert {rival.choice.partition("@")[0] for rival in record.rivals} == {"dense", "gather"}
    assert 0 < record.error < 1e-6 and 0 < record.native_error < 1e-6
    assert record.toolchain == records.toolchain(torch.device("cpu"))
    decided = dispatch.plan(problem_of())
    assert decided.source is Source.RECORD and decided.text == LAST


@pytest.mark.parametrize("times", [(98.0, 90.0), (97.5, 90.0), (96.0, 100.0), (100.0, 1.0)])
def test_a_tie_goes_to_native(clock: Callable[..., FakeClock], times: tuple[float, float]) -> None:
    clock({PLAIN: (100, 99), LAST: times})
    record = tuned(problem_of())
    assert text_of(record) == PLAIN and record.p20_us == record.native_us == 100


def test_a_native_call_that_is_lost_is_not_run_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's loops for half precision can take seconds a call: of such a baseline two must do."""
    calls: list[float] = []
    plain = dispatch.plain_call

    def slow(problem: Problem) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        call = plain(problem)

        def late(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
            calls.append(time.monotonic())
            time.sleep(0.3)
            return call(a, b, bias)

        return late

    monkeypatch.setattr(dispatch, "plain_call", slow)
    record = tuned(problem_of())
    assert text_of(record) != PLAIN and record.native_us > 3e5 and record.p20_us < 1e5
    assert len(calls) == 2


def test_near_ties_are_timed_again_and_the_second_run_decides(clock: Callable[..., FakeClock]) -> None:
    screening = {PLAIN: (100.0, 99.0), LAST: (50.0, 49.0), PADDED: (51.0, 50.0)}
    again = {PLAIN: (110.0, 109.0), LAST: (60.0, 59.0), PADDED: (45.0, 44.0)}
    fake = clock(screening, screening, again)
    record = tuned(problem_of())
    assert [set(names) for names in fake.asked[-1:]] == [{PLAIN, LAST, PADDED}]
    assert text_of(record) == PADDED and (record.p20_us, record.native_us) == (45, 110)
    gather = next(rival for rival in record.rivals if rival.choice.startswith("gather"))
    assert gather.p20_us == pytest.approx(110)  # 100 us beside a native of 100 us: seen beside one of 110 us


def test_a_near_tie_with_native_is_timed_again(clock: Callable[..., FakeClock]) -> None:
    screening = {PLAIN: (100.0, 99.0), LAST: (95.0, 90.0)}
    fake = clock(screening, screening, {PLAIN: (100.0, 99.0), LAST: (99.0, 90.0)})
    assert text_of(tuned(problem_of())) == PLAIN and len(fake.asked) == 3


def test_a_clear_order_is_not_timed_again(clock: Callable[..., FakeClock]) -> None:
    fake = clock({PLAIN: (100, 99), LAST: (20, 19)})
    tuned(problem_of())
    assert len(fake.asked) == 2 and fake.asked[1] == [PLAIN, LAST]


def test_a_disturbed_final_is_run_again(clock: Callable[..., FakeClock]) -> None:
    final = {PLAIN: (100.0, 50.0), LAST: (99.0, 10.0)}
    fake = clock({PLAIN: (100, 99), LAST: (40, 39)}, final, {PLAIN: (50.0, 49.0), LAST: (11.0, 10.0)})
    assert text_of(tuned(problem_of())) == LAST
    assert len(fake.asked) == 3


def test_between_equals_the_plainer_choice_is_taken() -> None:
    baseline, gather, padded = (Choice.parse(t) for t in (PLAIN, "gather@1{workspace_mib=4}", PADDED))
    timing = Timing(50, 50, 50, 50, 9)
    timings = {baseline: Timing(99, 99, 99, 99, 9), gather: replace(timing, p20_us=49.9), padded: timing}
    assert final.chosen(timings, baseline) == padded
    assert final.chosen({**timings, padded: replace(timing, p20_us=52)}, baseline) == gather


def test_where_native_rejects_the_better_hand_written_form_is_the_baseline(clock: Callable[..., FakeClock]) -> None:
    dense, dual = (str(backend_named(name).default(problem_of(HOLED))) for name in ("dense", "dual"))
    assert [str(choice) for choice in entrants.by_hand(problem_of(HOLED))] == [dense, dual]
    clock({dense: (300, 299), dual: (200, 199)})
    record = tuned(problem_of(HOLED))
    assert record.native_us == 200 and record.p20_us == 100
    clock({dense: (80, 79), dual: (200, 199)})
    assert text_of(tuned(problem_of(HOLED))) == dense


def test_dense_does_not_race_where_it_is_native_again() -> None:
    names = [backend.name for backend in entrants.contenders(problem_of(case("plain", "3x3", (9, 8))))]
    assert names == ["native", "gather"]
    assert "dense" in [backend.name for backend in entrants.contenders(problem_of())]


# ---- who may not win ----------------------------------------------------------------------------


class Wrong(Native):
    """Native with a knob that makes it wrong, less exact, of another shape, or fail."""

    name: ClassVar[str] = "wrong"

    def space(self, problem: Problem) -> Space:
        values = ("no", "by_a_tap", "in_one_image", "coarse", "shape", "dtype", "nan", "raises")
        return Space((Knob("how", values, "no", ""),))

    def cost(self, problem: Problem, config: Config) -> float:
        return 1.0

    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        y = Native().run(problem, Native().default(problem).config, a, b, bias)
        how = config["how"]
        if how == "raises":
            raise MemoryError("no room")
        if how == "in_one_image":
            y[1] += 1
        changed = {"by_a_tap": y * 1.01, "coarse": y * (1 + 1e-5), "shape": y[:1], "dtype": y.double()}
        return changed.get(str(how), y * float("nan") if how == "nan" else y)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = (*BACKENDS, Wrong())
    for module in (entrants, final):
        monkeypatch.setattr(module, "BACKENDS", registered)
    monkeypatch.setitem(_BY_NAME, "wrong", registered[-1])


@pytest.mark.usefixtures("wrong")
def test_a_wrong_candidate_cannot_win_and_is_a_warning(
    clock: Callable[..., FakeClock], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adaptconv.tuner")
    clock({f"wrong@1{{how={how}}}": (1, 1) for how in ("by_a_tap", "in_one_image", "coarse", "shape", "dtype", "nan")})
    record = tuned(problem_of())
    assert text_of(record) == PLAIN
    said = {message.split("how=")[1].split("}")[0]: r for r in caplog.records if "how=" in (message := r.getMessage())}
    assert set(said) == {"by_a_tap", "in_one_image", "coarse", "shape", "dtype", "nan", "raises"}
    quiet_ones = {how for how, r in said.items() if r.levelno < logging.WARNING}
    assert quiet_ones == {"raises", "coarse"} and "MemoryError: no room" in said["raises"].getMessage()


@pytest.mark.usefixtures("wrong")
def test_what_the_oracle_does_not_look_at_is_compared_with_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "affordable_slice", lambda p: slices.Slice((0,), (0,), tuple(range(6)), tuple(range(4))))
    problem = problem_of()
    stand = bench.Bench(problem, torch.device("cpu"))
    stand.set_baseline(Native().default(problem))
    with pytest.raises(bench.Discarded, match=r"distance .* to native"):
        stand.check(Choice.parse("wrong@1{how=in_one_image}"))


def test_a_problem_that_torch_cannot_run_is_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(Native, "run", fails)
    monkeypatch.setattr("adaptconv.dispatch.plain_call", lambda problem: fails)
    result = tune_problems([problem_of()], progress=False)
    assert result.rows[0].record is None
    assert result.rows[0].status.startswith("not tuned: plain torch cannot run it") and "Half" in result.rows[0].status


# ---- the oracle's slice -------------------------------------------------------------------------


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("seconds", [1e9, 1e-3, 0.0])
def test_a_slice_is_exactly_that_part_of_the_whole(direction: Direction, groups: int, seconds: float) -> None:
    grouped = case("grouped", "3x3d2x1", (9, 8), channels=(8, 16), groups=groups, batch=3, pad=(2, 1), bias=True)
    problem = grouped.problem(direction, torch.float64)
    stand = bench.Bench(problem, torch.device("cpu"))
    part = slices.affordable_slice(problem, seconds)
    a, b = part.operands(problem, stand.a, stand.b)
    whole = reference(problem, stand.a, stand.b)
    small = replace(part.of(problem), bias=False)
    sliced = reference(small, a, b)
    assert relative_error(sliced, part.result(problem, whole)) < 1e-14
    if seconds == 1e9:
        assert part.of(problem) == problem
    if seconds == 0.0:
        assert small.flops < problem.flops and small.groups == 1
        assert small.batch == (3 if direction is Direction.GRAD_WEIGHT else 1)


def test_a_large_problem_is_sliced_and_the_slice_reaches_both_ends() -> None:
    large = problem_of(batch=8, c_in=512, c_out=512, groups=512, spatial=(56, 56))
    part = slices.affordable_slice(large)
    assert 1 < len(part.groups) < 512 and part.groups[0] == 0 and part.groups[-1] == 511
    assert slices.affordable_slice(problem_of()).of(problem_of()) == problem_of()
    assert slices.spread(5, 1) == (4,) and slices.spread(5, 5) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed"])
@pytest.mark.parametrize("direction", list(Direction))
def test_operands_are_those_of_the_problem(direction: Direction, layout: str) -> None:
    problem = problem_of(direction=direction, layout=layout, dtype="bfloat16")
    before = torch.random.get_rng_state()
    stand = bench.Bench(problem, torch.device("cpu"), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    x_like = stand.a
    if direction is Direction.GRAD_INPUT:
        assert stand.a.is_contiguous(memory_format=problem.memory_format)
    else:
        assert x_like.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert stand.a.dtype is torch.bfloat16 and torch.equal(stand.a, bench.Bench(problem, torch.device("cpu"), seed=3).a)
    stand.set_baseline(Native().default(problem))
    result = stand.call(Native().default(problem))()
    assert 0.2 < result.float().std() < 5


# ---- sessions -----------------------------------------------------------------------------------


def many(count: int) -> list[Problem]:
    return [problem_of(batch=batch) for batch in range(1, count + 1)]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.GRAD_INPUT])
def test_operands_have_holes_where_the_problem_has(direction: Direction) -> None:
    holes = case("holes", "5x5~0.25", (9, 8), channels=(4, 4), groups=4, pad=2)
    weight = bench.Bench(problem_of(holes, direction), torch.device("cpu")).b
    used = (weight != 0).sum(-1)
    assert bool((used == 6).all()), "a quarter of 25"
    assert len({tuple(row) for row in (weight[:, 0] != 0).tolist()}) > 1, "at places of each channel's own"


def test_known_problems_are_skipped_and_force_tunes_them_again(clock: Callable[..., FakeClock]) -> None:
    clock({LAST: (40, 39)})
    first = tune_problems(many(2), progress=False)
    again = tune_problems(many(3), progress=False)
    assert [row.status for row in again.rows] == ["known", "known", "tuned"]
    assert again.rows[0].record == first.rows[0].record and len(again.records) == 3
    assert "2 already known" in str(again)
    forced = tune_problems(many(2), progress=False, force=True)
    assert [row.status for row in forced.rows] == ["tuned", "tuned"]


def test_a_record_of_another_version_or_toolchain_is_not_known(clock: Callable[..., FakeClock]) -> None:
    clock()
    record = tuned(problem_of())
    old = {"torch": "1.0"}
    for stale in (replace(record, version=99), replace(record, toolchain=old), replace(record, backend="x")):
        records.default_store().write(stale)
        assert tune_problems([problem_of()], progress=False).rows[0].status == "tuned"


def test_equal_problems_are_tuned_once_and_rows_keep_the_order_given(clock: Callable[..., FakeClock]) -> None:
    clock()
    small, large = many(2)
    result = tune_problems([small, large, small], progress=False)
    assert [row.problem for row in result.rows] == [small, large]


def test_costly_problems_come_first(monkeypatch: pytest.MonkeyPatch, clock: Callable[..., FakeClock]) -> None:
    clock()
    seen: list[int] = []
    hold = contest.hold

    def noted(problem: Problem, *args: Any, **settings: Any) -> Record:
        seen.append(problem.batch)
        return hold(problem, *args, **settings)

    monkeypatch.setattr(contest, "hold", noted)
    tune_problems(many(4), progress=False)
    assert seen == [4, 3, 2, 1]


def test_a_spent_budget_keeps_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[..., FakeClock]
) -> None:
    clock()
    now = [0.0]
    shares: list[float] = []
    hold = contest.hold

    def slow(problem: Problem, device: torch.device, *, budget_s: float, **settings: Any) -> Record:
        shares.append(budget_s)
        now[0] += 4.0
        return hold(problem, device, budget_s=AMPLE_S, **settings)

    monkeypatch.setattr(session, "monotonic", lambda: now[0])
    monkeypatch.setattr(contest, "hold", slow)
    result = tune_problems(many(4), budget_s=10.0, progress=False)
    assert shares == [pytest.approx(10 / 4), pytest.approx(6 / 3), pytest.approx(2 / 2)]
    assert [row.status for row in result.rows] == ["not tuned: the time budget ran out", "tuned", "tuned", "tuned"]
    assert "1 not tuned (the time budget ran out)" in str(result)
    assert len(list(records.default_store().records())) == 3


def test_a_short_budget_tunes_the_costliest_and_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[..., FakeClock]
) -> None:
    clock()
    now, shares = [0.0], []
    hold = contest.hold

    def timed(problem: Problem, device: torch.device, *, budget_s: float, **settings: Any) -> Record:
        shares.append(budget_s)
        now[0] += budget_s
        return hold(problem, device, budget_s=AMPLE_S, **settings)

    monkeypatch.setattr(session, "monotonic", lambda: now[0])
    monkeypatch.setattr(contest, "hold", timed)
    result = tune_problems(many(10), budget_s=1.3, progress=False)
    assert shares == [session.LEAST_S, session.LEAST_S, pytest.approx(0.3)], "the last gets what is left"
    assert [row.problem.batch for row in result.rows if row.record] == [8, 9, 10]


def test_out_of_time_every_backend_still_gets_its_screening(clock: Callable[..., FakeClock]) -> None:
    fake = clock({"gather@1{workspace_mib=32}": (10, 9)})
    result = tune_problems([problem_of()], budget_s=1e-9, progress=False)
    record = result.rows[0].record
    assert record is not None and text_of(record) == "gather@1{workspace_mib=32}"
    assert {name.partition("@")[0] for name in fake.asked[0]} == {"native", "dense", "gather"}


def test_ctrl_c_keeps_what_is_finished(monkeypatch: pytest.MonkeyPatch, clock: Callable[..., FakeClock]) -> None:
    fake = clock()
    hold = contest.hold
    started: list[Problem] = []

    def third_is_interrupted(problem: Problem, *args: Any, **settings: Any) -> Record:
        started.append(problem)
        if len(started) == 3:
            monkeypatch.setattr(measure, "interleave", interrupt)
        return hold(problem, *args, **settings)

    def interrupt(*args: Any, **settings: Any) -> dict[str, Timing]:
        raise KeyboardInterrupt

    monkeypatch.setattr(contest, "hold", third_is_interrupted)
    result = tune_problems(many(4), budget_s=AMPLE_S, progress=False)
    assert result.interrupted and "interrupted" in str(result) and fake.asked
    assert [row.status for row in result.rows] == ["not tuned: interrupted"] * 2 + ["tuned"] * 2
    kept = {hit.record.key for hit in records.default_store().records()}
    assert kept == {problem.key() for problem in started[:2]}


def test_what_cannot_be_measured_here_is_left_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    here = problem_of()
    foreign = replace(here, device=replace(here.device, threads=64))
    gpu = replace(here, device=replace(here.device, kind="cuda", name="H200", threads=0))
    flags = replace(here, deterministic=True)
    empty = replace(here, batch=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = tune_problems([foreign, gpu, flags, empty], progress=False)
    for row, words in zip(result.rows, ("belongs to", "no cuda", "flags", "nothing to compute"), strict=True):
        assert row.record is None and words in row.status
    assert not list(records.default_store().records())


def test_one_broken_problem_does_not_cost_the_others(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[..., FakeClock], caplog: pytest.LogCaptureFixture
) -> None:
    clock()
    hold = contest.hold

    def fragile(problem: Problem, *args: Any, **settings: Any) -> Record:
        if problem.batch == 2:
            raise OSError("disk full")
        return hold(problem, *args, **settings)

    monkeypatch.setattr(contest, "hold", fragile)
    result = tune_problems(many(3), progress=False)
    assert [row.status for row in result.rows] == ["tuned", "not tuned: OSError: disk full", "tuned"]
    assert "could not tune" in caplog.text


def test_an_unwritable_database_is_one_warning_and_the_results_come_back(
    tmp_path: Path, clock: Callable[..., FakeClock]
) -> None:
    clock({LAST: (40, 39)})
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.warns(DatabaseWarning) as caught:
        result = tune_problems(many(3), progress=False, database=blocked / "db")
    assert len([w for w in caught if "not kept" in str(w.message)]) == 1
    assert len(result.records) == 3 and result.database is None and "nothing could be written" in str(result)
    assert blocked.read_text() == "in the way"


def test_a_given_database_is_written_to_and_used(tmp_path: Path, clock: Callable[..., FakeClock]) -> None:
    clock({LAST: (40, 39)})
    result = tune_problems([problem_of()], progress=False, database=tmp_path / "db")
    assert result.database == tmp_path / "db" and len(list((tmp_path / "db").iterdir())) == 1
    assert dispatch.plan(problem_of()).text == LAST


@pytest.mark.parametrize(
    "settings", [{"budget_s": 0}, {"budget_s": -1}, {"trials": 0}, {"trials": 1.5}, {"workers": -1}]
)
def test_settings_without_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(TuneError, match=next(iter(settings))):
        tune_problems([problem_of()], **settings)
    with pytest.raises(TuneError, match=next(iter(settings))):
        tune(nn.Conv1d(1, 1, 1), torch.zeros(1, 1, 4), **settings)


def test_progress_is_shown_when_asked_for(capfd: pytest.CaptureFixture[str], clock: Callable[..., FakeClock]) -> None:
    clock({LAST: (40, 39)})
    tune_problems([problem_of()], progress=None)
    assert capfd.readouterr().err == ""
    tune_problems([problem_of()], progress=True, force=True)
    shown = capfd.readouterr().err
    assert "forward 2x4x9x8" in shown and "best gain 2.5x" in shown


# ---- searching ----------------------------------------------------------------------------------


class Wide(Native):
    """A backend with 512 configurations."""

    name: ClassVar[str] = "wide"

    def space(self, problem: Problem) -> Space:
        return Space(tuple(Knob(f"k{i}", tuple(range(8)), 0, "") for i in range(3)))


def run_search(search: Search, value: Callable[[Config], float | None], batch: int = 4) -> list[Config]:
    tried: list[Config] = []
    with quiet():
        while choices := search.propose(batch):
            for choice in choices:
                tried.append(choice.config)
                search.tell(choice.config, value(choice.config))
    return tried


def test_a_small_space_is_tried_whole_each_once_default_and_seeds_first() -> None:
    problem = problem_of(direction=Direction.GRAD_INPUT)
    seed = Config(layout="channels_last", pad="explicit", route="adjoint")
    foreign = (Config(layout="diagonal"), Config(workspace_mib=4))
    with quiet():
        search = Search(problem, Native(), seeds=(*foreign, seed))
    tried = run_search(search, lambda config: None if config["pad"] == "explicit" else 1.0)
    assert tried[:2] == [search.space.default, seed] and len(tried) == len(set(tried)) == search.space.size == 8


def test_a_large_space_is_sampled_then_descended() -> None:
    def bowl(config: Config) -> float:
        return 1.0 + sum((int(config[f"k{i}"]) - 5) ** 2 for i in range(3))

    with quiet():
        search = Search(problem_of(), Wide())
    tried = run_search(search, bowl)
    assert len(tried) == len(set(tried)) <= 72 and min(map(bowl, tried)) == 1.0
    with quiet():
        hurried = Search(problem_of(), Wide(), trials=20)
        hurried.refine()
    tried = run_search(hurried, bowl)
    assert len(tried) == 20 and all(sum(c.values()) <= 20 for c in tried) and bowl(tried[-1]) < bowl(tried[0])  # type: ignore[arg-type]


def test_every_backend_has_its_turn_and_then_the_best_predicted_come_first() -> None:
    problem = problem_of()
    held = contest._Contest(problem, torch.device("cpu"), AMPLE_S, 0)
    batch = [[Choice(b.name, b.version, c) for c in list(b.space(problem))[::-1]] for b in entrants.contenders(problem)]
    others = [choice for choices in batch for choice in choices if choice != held.baseline]

    def predicted(choice: Choice) -> float:
        return backend_named(choice.backend).cost(problem, choice.config)

    sound: set[str] = set()
    order = []
    for choice in held._in_turn(batch, sound, time.monotonic() + AMPLE_S):
        order.append(choice)
        sound.add(choice.backend)
    assert [choice.backend for choice in order[: len(batch)]] == [choices[0].backend for choices in batch]
    rest = [predicted(choice) for choice in order[len(batch) :]]
    assert rest == sorted(rest) and len(set(rest)) > 1 and sorted(map(str, order)) == sorted(map(str, others))
    unsound = [choice.backend for choice in held._in_turn(batch, (), 0.0)]
    assert max(unsound.count(name) for name in set(unsound)) == contest._AT_LEAST
    assert list(held._in_turn(batch, {choices[0].backend for choices in batch}, 0.0)) == [], "out of time"


def test_trials_caps_each_backend(clock: Callable[..., FakeClock]) -> None:
    fake = clock()
    tuned(problem_of(), trials=2)
    tried = {name for names in fake.asked for name in names}
    counts = {backend: sum(name.startswith(backend) for name in tried) for backend in ("native", "dense", "gather")}
    assert counts == {"native": 2, "dense": 2, "gather": 2}


def test_neighbours_seed_the_search_and_what_does_not_fit_is_ignored(clock: Callable[..., FakeClock]) -> None:
    clock({LAST: (40, 39)})
    record = tuned(problem_of(batch=8))
    other = problem_of(batch=7)
    odd = replace(record, key=other.key(), config={"layout": "diagonal", "speed": 11})
    records.default_store().write(odd)
    seeds = entrants.seeds_for(problem_of(batch=6))
    assert seeds["native"][0] == Config(layout="diagonal", speed=11)
    assert Config(layout="channels_last", pad="implicit") in seeds["native"] and "gather" in seeds
    assert text_of(tuned(problem_of(batch=6), trials=2)) == LAST  # the default and the one seed that fits


def test_trials_are_kept_in_a_storage_and_resumed(tmp_path: Path, clock: Callable[..., FakeClock]) -> None:
    url = f"sqlite:///{tmp_path}/trials.db"
    fake = clock({LAST: (40, 39)})
    tuned(problem_of(), storage=url)
    assert (tmp_path / "trials.db").stat().st_size > 0
    first = {name for names in fake.asked for name in names}
    import optuna

    names = optuna.study.get_all_study_names(url)
    assert len(names) == 3 and all("@1" in name and "cpu-" in name for name in names)
    again = clock({LAST: (40, 39)})
    record = tuned(problem_of(), storage=url)
    assert text_of(record) == LAST
    assert {name for asked in again.asked for name in asked} <= first


def test_an_interrupted_storage_leaves_nothing_running_and_is_taken_up_again(tmp_path: Path) -> None:
    with quiet():
        storage = open_storage(f"sqlite:///{tmp_path}/trials.db")
        search = Search(problem_of(), Native(), storage=storage)
        left = search.propose(4)
        search.close()
        again = Search(problem_of(), Native(), storage=storage)
    assert set(run_search(again, lambda config: 1.0)) == {choice.config for choice in left}


@pytest.mark.parametrize("url", ["trials.db", "sqlite:////no/such/folder/trials.db", "redis://localhost"])
def test_a_storage_that_cannot_be_opened_is_one_clear_error(url: str) -> None:
    with pytest.raises(TuneError, match="cannot be opened"):
        tune_problems([problem_of()], storage=url, progress=False)


def test_optuna_is_left_as_it_was() -> None:
    import optuna

    level = optuna.logging.get_verbosity()
    with pytest.raises(ZeroDivisionError), quiet():
        raise ZeroDivisionError
    assert optuna.logging.get_verbosity() == level


def test_importing_the_tuner_does_not_import_optuna() -> None:
    code = "import sys, adaptconv.tuner; print(sorted({'optuna', 'sqlalchemy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert done.stdout.strip() == "[]"


# ---- models -------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, 4, 3, padding=2, dilation=2)
        self.same = nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.again = nn.Conv1d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y: Tensor = self.again(self.same(self.norm(self.first(x))))
        return y * scale


def test_a_models_problems_are_tuned_and_the_model_is_left_alone(clock: Callable[..., FakeClock]) -> None:
    clock({LAST: (40, 39)})
    model, x = Small(), torch.randn(2, 2, 40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = adaptconv.tune(model, x, progress=False)
    assert [row.problem.direction for row in result.rows] == [Direction.FORWARD] * 2
    assert {row.status for row in result.rows} == {"tuned"} and model.training
    assert str(result).startswith("tuned 2 problems in ") and "2 faster than native by 2.5" in str(result)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("inputs", [(torch.zeros(2, 2, 40), 2.0), [torch.zeros(2, 2, 40)], {"x": torch.ones(2, 2, 40)}])
def test_inputs_come_as_tuple_list_or_dict(inputs: Any, clock: Callable[..., FakeClock]) -> None:
    clock()
    assert len(tune(Small(), inputs, progress=False).rows) == 2


def test_training_tunes_the_gradients_that_are_asked_for(clock: Callable[..., FakeClock]) -> None:
    clock()
    result = tune(Small(), torch.randn(2, 2, 40), train=True, progress=False)
    found = sorted((row.problem.c_in, str(row.problem.direction)) for row in result.rows)
    assert found == [
        (2, "forward"), (2, "grad_weight"), (4, "forward"), (4, "grad_input"), (4, "grad_weight"),
    ]  # fmt: skip
    assert all(row.status == "tuned" for row in result.rows)


class Turned(nn.Module):
    """Tokens seen as one picture: of an axis of extent 1, a tracer and a call make different strides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = adaptconv.AdaptiveConv2d(4, 4, 3, padding=1, groups=4)
        self.mix = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.conv(self.mix(tokens).transpose(1, 2).view(1, 4, 6, 7))
        return y


def test_what_an_adapted_model_calls_is_tuned_and_not_only_what_a_graph_of_it_says(
    clock: Callable[..., FakeClock],
) -> None:
    clock()
    model, tokens = Turned(), torch.randn(1, 42, 4)
    result = tune(model, tokens, train=True, progress=False)
    assert all(row.status == "tuned" for row in result.rows)
    model(tokens).sum().backward()
    plans = model.conv.plans
    assert plans is not None and plans.forward.problem in [row.problem for row in result.rows]
    assert {p.source for p in (plans.forward, plans.grad_input, plans.grad_weight) if p} == {Source.RECORD}


def test_a_sum_is_tuned_whole_and_in_its_parts(clock: Callable[..., FakeClock]) -> None:
    clock()
    island, wings = nn.Conv1d(4, 4, 3, padding=1, groups=4), nn.Conv1d(4, 4, 5, padding=4, dilation=2, groups=4)
    result = tune(lambda x: island(x) + wings(x), torch.randn(2, 4, 30), progress=False)
    assert sorted(str(row.problem.taps) for row in result.rows) == ["101111101", "3", "5d2"]


def test_an_optimized_model_is_tuned_and_compiles_anew(clock: Callable[..., FakeClock]) -> None:
    clock({LAST: (40, 39)})
    x = torch.randn(2, 2, 40)
    model = Small().eval()
    with torch.no_grad():
        expected = model(x)
    fast = adaptconv.optimize(model)
    result = tune(fast, x, progress=False)
    assert len(result.records) == 2
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=_rewritten)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


def _rewritten(gm: Any, example_inputs: Any) -> Any:
    from adaptconv.compile.rewrite import rewrite

    assert {report.plans.forward.source for report in rewrite(gm) if report.plans} == {Source.RECORD}
    return gm.forward


def test_compiled_graphs_are_forgotten_only_when_something_was_written(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[..., FakeClock]
) -> None:
    import torch._dynamo  # noqa: F401 - as after any compilation

    import adaptconv.compile.optimize as compiling

    clock()
    calls: list[int] = []
    monkeypatch.setattr(compiling, "forget_compiled", lambda: calls.append(1))
    tune_problems([problem_of()], progress=False)
    assert calls == [1]
    tune_problems([problem_of()], progress=False)
    assert calls == [1]


def test_a_model_without_convolutions_is_a_plain_sentence() -> None:
    result = tune(nn.Linear(3, 3), torch.zeros(2, 3))
    assert result.rows == () and str(result) == "no convolution was found in the model, so there is nothing to tune"
    unbatched = tune(nn.Conv1d(2, 2, 3), torch.zeros(2, 8))
    assert unbatched.rows == () and "none of the model's 1 convolution" in str(unbatched)
    assert "nothing to tune" in str(tune_problems([]))


def test_a_model_that_cannot_be_called_is_one_clear_error() -> None:
    with pytest.raises(TuneError, match=r"the model failed when called on the example inputs"):
        tune(nn.Conv1d(2, 2, 3), torch.zeros(1, 5, 8))
    with pytest.raises(TuneError, match="the class Conv1d"):
        tune(nn.Conv1d, torch.zeros(1, 2, 8))
    with pytest.raises(TuneError, match=r"takes an nn\.Module or a function, got int"):
        tune(3, torch.zeros(1, 2, 8))  # type: ignore[arg-type]
    with pytest.raises(adaptconv.errors.ExampleInputsError, match="example inputs must be a tensor"):
        tune(nn.Conv1d(2, 2, 3), 3)


def test_given_problems_are_tuned_without_a_model(clock: Callable[..., FakeClock]) -> None:
    clock()
    assert len(tune(None, problems=many(2), progress=False).records) == 2


def test_autocast_around_the_call_does_not_reach_the_candidates(clock: Callable[..., FakeClock]) -> None:
    clock()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tuned(problem_of()).native_error < 1e-6


# ---- factories ----------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn
def good(): return nn.Conv1d(2, 2, 3), torch.zeros(1, 2, 8)
def by_name(): return nn.Conv1d(2, 2, 3), {"input": torch.zeros(1, 2, 8)}
def alone(): return nn.Conv1d(2, 2, 3)
def three(): return 1, 2, 3
def not_a_model(): return 3, torch.zeros(1)
def odd_inputs(): return nn.Conv1d(2, 2, 3), 7
def fails(): raise RuntimeError("no weights here")
class Holder:
    inner = staticmethod(good)
number = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuner_factories.py").write_text(FACTORIES)
    (tmp_path / "tuner_broken.py").write_text("import tuner_absent_dependency")
    (tmp_path / "tuner_syntax.py").write_text("def (:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for name in ("tuner_factories", "tuner_broken", "tuner_syntax"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("name", ["good", "by_name", "Holder.inner"])
def test_a_factory_is_found_in_the_current_directory(name: str) -> None:
    model, inputs = load_factory(f"tuner_factories:{name}")
    assert isinstance(model, nn.Conv1d) and isinstance(inputs, (Tensor, dict))


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not name a factory: expected 'package.module:factory'"),
        ("tuner_factories", "does not name a factory"),
        ("tuner_factories:", "does not name a factory"),
        (":good", "does not name a factory"),
        ("a b:c", "does not name a factory"),
        ("tuner_factories.py:good", "tuner_factories"),
        ("tuner_no_such:good", "no module 'tuner_no_such'"),
        ("tuner_factories:no_such", "has no attribute 'no_such'"),
        ("tuner_factories:number", "is not callable but a int"),
        ("tuner_factories:alone", "returned Conv1d: it must return"),
        ("tuner_factories:three", "returned a tuple of 3"),
        ("tuner_factories:not_a_model", "returned a int for a model"),
        ("tuner_factories:odd_inputs", "example inputs must be a tensor"),
        ("tuner_factories:fails", "RuntimeError: no weights here"),
        ("tuner_broken:good", "tuner_absent_dependency"),
        ("tuner_syntax:good", "could not be imported: SyntaxError"),
    ],
)
def test_a_malformed_factory_is_one_clear_error(text: str, words: str) -> None:
    with pytest.raises(adaptconv.errors.AdaptConvError) as caught:
        load_factory(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, adaptconv.errors.AdaptConvError)


# ---- for real -----------------------------------------------------------------------------------


def test_a_real_session_keeps_its_promise() -> None:
    slow = problem_of(case("slow", "13x13", (40, 40), channels=(32, 32), groups=32, pad=6))
    result = tune_problems([slow, problem_of(HOLED)], progress=False)
    assert [row.status for row in result.rows] == ["tuned", "tuned"], str(result)
    for record in result.records:
        assert record.p20_us == record.native_us or record.p20_us <= final.TIE * record.native_us
        assert record.p20_us <= record.median_us <= record.p80_us
        assert record.error <= max(2 * record.native_error, 1e-6)
    assert dispatch.plan(slow).source is Source.RECORD


def _root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_sigkill_leaves_every_finished_problem_in_a_readable_database(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys, torch
        from adaptconv.tuner import contest, tune_problems
        from tests.test_tuner import many
        torch.set_num_threads(1)
        hold = contest.hold
        def told(problem, *args, **settings):
            record = hold(problem, *args, **settings)
            if told.last: print(told.last, flush=True)
            told.last = record.key
            return record
        told.last = ""
        contest.hold = told
        tune_problems(many(400), budget_s=40.0, progress=False, database=sys.argv[1])
    """)
    folder = tmp_path / "db"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=_root(),
        env={**os.environ, "PYTHONPATH": str(_root())},
    ) as child:  # fmt: skip
        assert child.stdout is not None
        finished = [child.stdout.readline().strip() for _ in range(3)]
        time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
        finished += [line.strip() for line in child.stdout if line.endswith("\n")]
    assert child.returncode == -signal.SIGKILL and len(finished) >= 3
    records.use_database(folder)
    kept = {hit.record.key for hit in records.default_store().records() if hit.layer == "override"}
    assert set(finished) <= kept
    by_key = {problem.key(): problem for problem in many(400)}
    assert all(dispatch.plan(by_key[key]).source is Source.RECORD for key in finished)
