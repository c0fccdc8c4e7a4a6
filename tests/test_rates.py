"""Rates: what predictions rest on, where it is looked up, and how it is measured."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest
import torch

from adaptconv import calibration, dispatch, records
from adaptconv.backends import BACKENDS, backend_named, costs
from adaptconv.measure import Timing
from adaptconv.probes import Probe, probes
from adaptconv.problem import Device, Direction, Problem
from adaptconv.rates import DEFAULTS, NAMES, Rates, is_overhead
from adaptconv.records import Calibration, DatabaseWarning, Store
from adaptconv.records.layers import Layer
from adaptconv.taps import TapPattern
from tests.cases import CASES, CPU

HERE = Device.of(CPU)
ELSEWHERE = Device("cpu", "a processor", 2)
FEW = Rates(gemm_gflops=2.0, product_gflops=5000.0, columns_gbytes=3000.0)
MODELLED = list(NAMES)


def layer(
    channels: tuple[int, int, int], taps: str, pad: int, layout: str = "contiguous", device: Device = ELSEWHERE
) -> Problem:
    return Problem(
        Direction.FORWARD, 4, *channels, (56, 56), TapPattern.parse(taps), (1, 1), ((pad, pad),) * 2, "float32",
        layout, device,
    )  # fmt: skip


DEPTHWISE, FULL = (64, 64, 64), (64, 64, 1)
ATROUS = layer(FULL, "3x3d12x12", 12, device=HERE)


def of(rates: Rates, device: Device = HERE, toolchain: dict[str, str] | None = None) -> Calibration:
    versions = records.toolchain(CPU) if toolchain is None else toolchain
    return Calibration(device.slug, rates, versions, "2026-01-31T12:00:00Z")


def written(folder: Path, rates: Rates, **kwargs: object) -> Path:
    """A calibration in a directory of its own, without a word to this process's store."""
    return Store(folder).write_calibration(of(rates, **kwargs))  # type: ignore[arg-type]


def store_of(override: Path | None, user: Path | None, shipped: Path | None = None) -> Store:
    store = Store(override)
    store.__dict__["layers"] = (
        Layer("override", override), Layer("project", None), Layer("user", user),
        Layer("shipped", shipped, trusted=True),
    )  # fmt: skip
    return store


# ---- the constants themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "problem", "knobs", "us"),
    [
        ("native", layer(DEPTHWISE, "7x7", 3, "channels_last"), {}, 824.51),
        ("native", layer(DEPTHWISE, "7x7d3x3", 9), {}, 11408.30),
        ("native", layer(FULL, "3x3", 1), {}, 5310.27),
        ("native", layer(DEPTHWISE, "3x3", 1), {"layout": "channels_last", "pad": "explicit"}, 939.21),
        ("dense", layer(DEPTHWISE, "7x7d3x3", 9), {}, 82980.23),
        ("gather", layer(DEPTHWISE, "7x7d3x3", 9), {}, 33663.83),
        ("gather", layer(FULL, "3x3", 1), {}, 7313.63),
        ("dual", layer(DEPTHWISE, "10001/00000/00100/00000/10001", 2), {}, 642.11),
        ("factored", layer(DEPTHWISE, "3x3d2x2*0.5,1,0.5x0.5,1,0.5", 3), {}, 606.07),
    ],
)
def test_where_nobody_calibrated_predictions_are_the_shipped_ones(
    backend: str, problem: Problem, knobs: dict[str, str], us: float
) -> None:
    chosen = backend_named(backend)
    assert chosen.cost(problem, chosen.space(problem).complete(knobs)) == pytest.approx(us, rel=1e-5)


def test_rates_that_are_no_measurement_are_refused() -> None:
    for value in (math.nan, math.inf, -1.0, 0.0, 1e9, 1e-9, "90", None, True, 10**400):
        with pytest.raises(ValueError, match="gemm_gflops"):
            Rates(gemm_gflops=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at odds"):
        Rates.from_json({**DEFAULTS.to_json(), "lucky_us": 7})
    assert Rates.from_json(json.loads(json.dumps(FEW.to_json()))) == FEW


def test_a_device_twice_as_fast_in_everything_halves_every_prediction() -> None:
    twice = Rates(**{n: getattr(DEFAULTS, n) * (0.5 if is_overhead(n) else 2.0) for n in NAMES})
    compared = 0
    for case in CASES[::4]:
        for direction in Direction:
            problem = case.problem(direction, torch.float32)
            for backend in BACKENDS:
                if backend.name == "cpp" or backend.rejects(problem):
                    continue
                for config in backend.space(problem):
                    slow = backend.cost(problem, config)
                    with costs.assuming(twice):
                        assert backend.cost(problem, config) == pytest.approx(slow / 2)
                    compared += 1
    assert compared > 100


@pytest.mark.parametrize("name", MODELLED)
def test_every_constant_moves_the_prediction_of_something_the_right_way(name: str) -> None:
    changed = replace(DEFAULTS, **{name: 3 * getattr(DEFAULTS, name)})
    moved = []
    for probe in probes(ELSEWHERE):
        backend = backend_named(probe.backend)
        before = backend.cost(probe.problem, probe.config)
        with costs.assuming(changed):
            after = backend.cost(probe.problem, probe.config)
        assert after >= before if is_overhead(name) else after <= before
        moved.append(after != before)
    assert any(moved)


# ---- where they are looked up -----------------------------------------------------------------------------


def test_a_calibration_is_in_force_at_once_for_its_device_and_threads_alone() -> None:
    assert costs.rates(HERE) == DEFAULTS
    before = dispatch.plan(ATROUS)
    assert before.choice.backend == "native"
    path = records.default_store().write_calibration(of(FEW))
    assert path.name == f"{HERE.slug}.json"
    assert costs.rates(HERE) == FEW
    after = dispatch.plan(ATROUS)
    assert after.choice.backend == "gather"
    for other in (replace(HERE, threads=HERE.threads + 1), ELSEWHERE, Device("cuda", "a card", 0)):
        assert costs.rates(other) == DEFAULTS
    path.unlink()
    records.use_database(path.parent.parent)
    assert costs.rates(HERE) == DEFAULTS
    assert dispatch.plan(ATROUS).choice == before.choice


def test_rates_are_read_once_until_the_database_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    look = Store.calibration
    monkeypatch.setattr(Store, "calibration", lambda self, device: asked.append(device) or look(self, device))
    other = replace(HERE, threads=HERE.threads + 1)
    for _ in range(50):
        costs.rates(HERE)
        costs.rates(replace(HERE))  # equal, not the same
        costs.rates(other)
    assert asked == [HERE, other]
    records.default_store().write_calibration(of(FEW))
    assert [costs.rates(HERE), costs.rates(other), costs.rates(HERE)] == [FEW, DEFAULTS, FEW]
    assert asked == [HERE, other] * 2


def test_the_first_layer_with_a_current_calibration_answers(tmp_path: Path) -> None:
    first, second, shipped = (tmp_path / name for name in ("first", "second", "shipped"))
    written(second, replace(DEFAULTS, gemm_gflops=50.0))
    written(shipped, replace(DEFAULTS, gemm_gflops=60.0))

    def found() -> tuple[str, float]:
        hit = store_of(first, second, shipped).calibration(HERE)
        assert hit is not None
        return hit.layer, hit.calibration.rates.gemm_gflops

    assert found() == ("user", 50.0)
    path = written(first, replace(DEFAULTS, gemm_gflops=40.0))
    assert found() == ("override", 40.0)
    written(first, replace(DEFAULTS, gemm_gflops=40.0), toolchain={"torch": "1.0"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # old is not broken
        assert found() == ("user", 50.0)
        assert [hit.current for hit in store_of(first, second).calibrations(HERE)] == [False, True]
    path.write_text("{")
    with pytest.warns(DatabaseWarning, match="damaged"):
        assert found() == ("user", 50.0)
    for folder in (first, second):
        (folder / "rates" / path.name).unlink()
    assert found() == ("shipped", 60.0)
    assert store_of(None, tmp_path / "nowhere").calibration(HERE) is None


def _changed(**values: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        for name, value in values.items():
            (content["rates"] if name in NAMES else content)[name] = value
        path.write_text(json.dumps(content))

    return change


def _without(path: Path) -> None:
    content = json.loads(path.read_text())
    del content["rates"]["slow_gflops"]
    path.write_text(json.dumps(content))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.rename(path.with_suffix(".kept"))
    path.symlink_to(path.with_suffix(".kept"))


BROKEN: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "half": lambda path: path.write_bytes(path.read_bytes()[:120]) and None,
    "pickle": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n") and None,
    "deep": lambda path: path.write_bytes(b"[" * 60_000) and None,
    "too large": lambda path: path.write_bytes(b" " * 100_000) and None,
    "list": lambda path: path.write_text("[1, 2]") and None,
    "not a number": _changed(gemm_gflops=math.nan),
    "infinite": _changed(copy_gbytes=math.inf),
    "negative": _changed(call_us=-1.0),
    "zero": _changed(slow_gflops=0),
    "absurd": _changed(direct_gflops=1e12),
    "huge": _changed(direct_gflops=10**400),
    "text": _changed(direct_gflops="fast"),
    "constant missing": _without,
    "strange field": _changed(run="os.system"),
    "no rates": _changed(rates=None),
    "other device": _changed(device="cpu-another-2t"),
    "path for device": _changed(device="../escape"),
    "other schema": _changed(schema=99),
    "no date": _changed(measured_on="yesterday"),
    "no toolchain": _changed(toolchain=[]),
    "directory": _folder,
    "link": _link,
    "writable by others": lambda path: path.chmod(0o666),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_calibration_that_cannot_be_used_is_warned_of_once_and_the_defaults_hold(database: Path, how: str) -> None:
    BROKEN[how](records.default_store().write_calibration(of(FEW)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            records.use_database(database)  # looked at afresh
            assert costs.rates(HERE) == DEFAULTS
            assert dispatch.plan(ATROUS).choice.backend == "native"
    assert [warning.category for warning in caught] == [DatabaseWarning]
    assert "rates/" in str(caught[0].message)


def test_a_file_in_the_place_of_the_folder_is_warned_of_once(database: Path) -> None:
    (database / "rates").write_text("not a folder")
    with pytest.warns(DatabaseWarning, match="not a directory"):
        assert costs.rates(HERE) == DEFAULTS
    assert dispatch.plan(ATROUS).choice.backend == "native"


def test_caches_named_after_the_database_hear_of_a_calibration(tmp_path: Path) -> None:
    store = store_of(tmp_path / "a", None, tmp_path / "b")
    seen = [store.digest()]
    for folder, rates in (("a", FEW), ("a", replace(FEW, call_us=9.0)), ("b", FEW)):
        written(tmp_path / folder, rates)
        seen.append(store.digest())
    assert len(set(seen)) == 4
    assert store.digest() == seen[-1]


def test_what_looks_after_records_leaves_calibrations_alone_and_verify_reads_them(database: Path) -> None:
    from tests.test_reports import _problem, _remember

    _remember(_problem())
    alone = [hit.record for hit in records.default_store().records()]
    path = records.default_store().write_calibration(of(FEW))
    assert [hit.record for hit in records.default_store().records()] == alone
    assert list(records.merge(database).records) == alone
    assert records.verify(database) == []
    exported, _ = records.export_shipped(records.default_store(), database.parent / "shipped")
    assert [file.name for file in exported] == [f"{HERE.slug}.json"]
    assert not (database.parent / "shipped" / "rates").exists()
    assert not records.diff(database, database.parent / "shipped")
    path.write_text(path.read_text().replace(HERE.slug, "cpu-another"))
    (fault,) = records.verify(database)
    assert "rates of cpu-another" in fault
    assert str(path) in fault


def test_a_calibration_is_written_for_its_owner_alone() -> None:
    path = records.default_store().write_calibration(of(FEW))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o022 == 0
    with pytest.raises(ValueError, match="slug"):
        replace(of(FEW), device="../../escape")


# ---- how they are measured ----------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, hidden: Rates) -> None:
    """A machine whose times are exactly what the model predicts under hidden rates."""

    def cost(probe: Probe) -> float:
        with costs.assuming(hidden):
            return backend_named(probe.backend).cost(probe.problem, probe.config)

    monkeypatch.setattr(calibration, "_times", lambda wanted, budget, tell: ({p: cost(p) for p in wanted}, {}))
    monkeypatch.setattr(calibration, "_copy_gbytes", lambda budget: hidden.copy_gbytes)
    monkeypatch.setattr(calibration, "_columns_gbytes", lambda budget: hidden.columns_gbytes)


@pytest.mark.parametrize("factor", [0.3, 1.0, 2.5])
def test_calibration_finds_the_constants_that_explain_the_times(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    # No two constants move alike, or one could be taken for another.
    hidden = Rates(**{name: getattr(DEFAULTS, name) * factor * (1 + i / 40) for i, name in enumerate(NAMES)})
    pretend(monkeypatch, hidden)
    outcome = calibration.calibrate()
    found = outcome.calibration.rates
    for name in MODELLED:
        assert getattr(found, name) == pytest.approx(getattr(hidden, name), rel=1e-6), name
    assert {row.constant for row in outcome.rows} == set(NAMES)
    assert outcome.path is not None
    assert costs.rates(HERE) == found
    hit = records.default_store().calibration(HERE)
    assert hit is not None
    assert hit.calibration == outcome.calibration
    text = str(outcome)
    assert all(name in text for name in NAMES)
    assert str(outcome.path) in text


def test_a_time_that_the_rest_of_a_formula_explains_gives_a_bound_and_an_absurd_one_the_default() -> None:
    probe = next(probe for probe in probes(HERE) if probe.constant == "matvec_gflops")
    backend = backend_named(probe.backend)
    measured = 0.5 * backend.cost(probe.problem, probe.config)
    with costs.assuming(replace(DEFAULTS, columns_gbytes=1.0)):  # predicts far more than was measured
        bound = calibration.solved(probe, replace(DEFAULTS, columns_gbytes=1.0), measured)
    assert bound is not None
    assert bound > 0
    assert probe.problem.flops / bound / HERE.threads * 1e-3 == pytest.approx(0.05 * measured)
    assert calibration.solved(replace(probe, constant="slow_gflops"), DEFAULTS, measured) is None
    assert calibration._within("call_us", 1e9) == {}
    assert calibration._within("call_us", math.nan) == {}
    assert calibration._within("call_us", 12.0) == {"call_us": 12.0}


def test_calibrating_here_gives_constants_that_plans_can_be_made_with() -> None:
    noise = torch.get_rng_state()
    steps: list[str] = []
    outcome = calibration.calibrate(0.02, keep=False, progress=steps.append)
    assert torch.equal(torch.get_rng_state(), noise)
    assert outcome.path is None
    assert any("gemm_gflops" in step for step in steps)
    found = outcome.calibration.rates
    assert all(math.isfinite(getattr(found, name)) and getattr(found, name) > 0 for name in NAMES)
    assert found.gemm_gflops != DEFAULTS.gemm_gflops
    assert costs.rates(HERE) == DEFAULTS
    records.default_store().write_calibration(outcome.calibration)
    assert costs.rates(HERE) == found
    for case in CASES[::6]:
        for direction in Direction:
            plan = dispatch.plan(case.problem(direction, torch.float32))
            assert plan.source is dispatch.Source.COST


def _steady(call: Callable[[], object], budget_s: float) -> tuple[Timing, float]:
    """One call, taken for all: a machine on which nothing else runs."""
    start = perf_counter()
    call()
    return Timing.of([1e6 * (perf_counter() - start)] * 3), float(HERE.threads)


def _shaken(call: Callable[[], object], budget_s: float) -> tuple[Timing, float]:
    timing, cores = _steady(call, budget_s)
    return Timing.of([timing.min_us, 9 * timing.min_us, 9 * timing.min_us]), cores


def _shared(call: Callable[[], object], budget_s: float) -> tuple[Timing, float]:
    """As steady as alone, with every processor but half of one taken by somebody else."""
    return _steady(call, budget_s)[0], 0.5


@pytest.mark.parametrize("clock", [_shaken, _shared])
def test_what_a_busy_machine_gave_is_shown_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[Callable[[], object], float], tuple[Timing, float]]
) -> None:
    monkeypatch.setattr(calibration, "_timed", clock)
    outcome = calibration.calibrate(0.0)
    assert outcome.path is None
    assert "quieter" in str(outcome)
    assert costs.rates(HERE) == DEFAULTS
    monkeypatch.setattr(calibration, "_timed", _steady)
    assert calibration.calibrate(0.0).path is not None
    assert costs.rates(HERE) != DEFAULTS


def test_without_a_place_to_write_it_is_shown_and_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibration, "_timed", _steady)
    (tmp_path / "file").write_text("in the way")
    records.use_database(tmp_path / "file")
    outcome = calibration.calibrate(0.0)
    with pytest.warns(DatabaseWarning):
        assert costs.rates(HERE) == DEFAULTS
    assert outcome.path is None
    assert os.fspath(tmp_path / "file") in outcome.reason
    assert "not kept" in str(outcome)


def test_a_backend_that_declines_is_said_and_its_defaults_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_timed", _steady)
    monkeypatch.setattr(type(backend_named("cpp")), "rejects", lambda self, problem: "no compiler today")
    outcome = calibration.calibrate(0.0, keep=False)
    rows = {row.constant: row for row in outcome.rows}
    for name in ("cpp_call_us", "cpp_gflops", "cpp_weight_gflops", "cpp_line_gflops"):
        assert "no compiler today" in rows[name].what[0]
        assert rows[name].value == getattr(DEFAULTS, name)
    assert rows["gemm_gflops"].value != DEFAULTS.gemm_gflops


def test_a_budget_that_is_none_is_refused() -> None:
    for budget in (-1.0, math.nan):
        with pytest.raises(ValueError, match="budget"):
            calibration.calibrate(budget)
