"""Timing laws, on a clock that the tests turn by hand: nothing here depends on how fast the machine is."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from adaptconv import measure
from adaptconv.measure import Timing, interleave, machine_limits

CPU = torch.device("cpu")


class Clock:
    """A clock in nanoseconds that moves only when a candidate runs; it shows multiples of ``grain_ns``."""

    def __init__(self, grain_ns: int = 1) -> None:
        self.now_ns = 0.0
        self.grain_ns = grain_ns
        self.calls: list[str] = []

    def __call__(self) -> int:
        return int(self.now_ns) // self.grain_ns * self.grain_ns

    def candidate(self, name: str, us: float | Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            self.calls.append(name)
            self.now_ns += 1e3 * (us() if callable(us) else us)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measure, "perf_counter_ns", clock)
    return clock


def test_rounds_alternate_their_order(clock: Clock) -> None:
    calls = {name: clock.candidate(name, 1000.0) for name in "abc"}
    timings = interleave(calls, budget_s=0, device=CPU, min_rounds=4, max_rounds=4, warmup=0)
    assert "".join(clock.calls[-12:]) == "abccbaabccba"
    assert list(timings) == ["a", "b", "c"]
    assert all(timing.rounds == 4 for timing in timings.values())


def test_constant_calls_are_timed_exactly(clock: Clock) -> None:
    timings = interleave(
        {"fast": clock.candidate("fast", 3.0), "slow": clock.candidate("slow", 5000.0)}, budget_s=0.2, device=CPU
    )
    for name, us in {"fast": 3.0, "slow": 5000.0}.items():
        timing = timings[name]
        assert (timing.min_us, timing.p20_us, timing.median_us, timing.p80_us) == pytest.approx((us,) * 4)


def test_short_calls_fill_their_samples_and_the_count_is_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls_in(rounds: int) -> int:
        clock = Clock()
        monkeypatch.setattr(measure, "perf_counter_ns", clock)
        calls = {"fast": clock.candidate("fast", 1.0), "slow": clock.candidate("slow", 300.0)}
        interleave(calls, budget_s=0, device=CPU, min_rounds=rounds, max_rounds=rounds)
        assert clock.calls.count("slow") == rounds + 2  # one to warm up, one to see that one is enough
        return clock.calls.count("fast")

    repeats = calls_in(2) - calls_in(1)
    assert 200 <= repeats < 2000
    assert calls_in(20) - calls_in(2) == 18 * repeats


def test_a_coarse_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(grain_ns=15_000)
    monkeypatch.setattr(measure, "perf_counter_ns", clock)
    timing = interleave({"short": clock.candidate("short", 0.7)}, budget_s=0.05, device=CPU)["short"]
    assert timing.median_us == pytest.approx(0.7, rel=0.1)


def test_drift_meets_every_candidate_alike(clock: Clock) -> None:
    def slowing(us: float) -> Callable[[], float]:
        return lambda: us * (1 + 2 * clock.now_ns / 1e9)  # three times slower after a second

    calls = {"a": clock.candidate("a", slowing(1000.0)), "b": clock.candidate("b", slowing(1100.0))}
    timings = interleave(calls, budget_s=1.0, device=CPU)
    assert timings["a"].p80_us > 1.5 * timings["a"].p20_us, "the drift must be there for this test to say anything"
    assert timings["b"].median_us / timings["a"].median_us == pytest.approx(1.1, rel=0.01)


@pytest.mark.parametrize(
    ("budget_s", "rounds"), [(0.0, 5), (0.0065, 5), (0.0095, 8), (0.0505, 49), (0.1, 98), (10.0, 200)]
)
def test_budget_bounds_the_rounds(clock: Clock, budget_s: float, rounds: int) -> None:
    # A millisecond a round, after one call to warm up and one to settle the repeats.
    timing = interleave({"only": clock.candidate("only", 1000.0)}, budget_s=budget_s, device=CPU)["only"]
    assert timing.rounds == rounds


def test_a_candidate_that_raises_propagates_and_collection_is_restored(clock: Clock) -> None:
    def broken() -> None:
        assert not gc.isenabled()
        raise ZeroDivisionError("broken")

    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError, match="broken"):
        interleave({"fine": clock.candidate("fine", 1000.0), "broken": broken}, budget_s=1, device=CPU)
    assert gc.isenabled()


@pytest.mark.parametrize(
    "settings",
    [{"budget_s": -1.0}, {"warmup": -1}, {"min_rounds": 0}, {"min_rounds": 9, "max_rounds": 8}],
    ids=lambda settings: ",".join(settings),
)
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="interleave needs"):
        interleave({"a": lambda: None}, **{"budget_s": 1.0, "device": CPU, **settings})  # type: ignore[arg-type]


def test_nothing_to_time() -> None:
    assert interleave({}, budget_s=1, device=CPU) == {}
    with pytest.raises(ValueError, match="at least one sample"):
        Timing.of([])


def test_quantiles_are_those_of_torch() -> None:
    samples = [7.0, 1.0, 4.0, 4.5, 100.0, 2.0, 3.0]
    timing = Timing.of(samples)
    expected = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    assert [timing.p20_us, timing.median_us, timing.p80_us] == pytest.approx(expected.tolist())
    assert (timing.min_us, timing.rounds) == (1.0, 7)


def test_cuda_is_timed_by_events(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that read the hand-turned clock stand in for a GPU."""
    entered: list[torch.device] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing
            self.at_ns, self.done = math.nan, False

        def record(self) -> None:
            self.at_ns = clock.now_ns

        def synchronize(self) -> None:
            self.done = True

        def elapsed_time(self, end: Event) -> float:
            assert end.done, "elapsed time was asked for before the end was reached"
            return (end.at_ns - self.at_ns) / 1e6

    @contextmanager
    def device(index: torch.device) -> Iterator[None]:
        entered.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", device)
    second = torch.device("cuda", 1)
    timing = interleave({"kernel": clock.candidate("kernel", 12.5)}, budget_s=0.1, device=second)["kernel"]
    assert timing.median_us == pytest.approx(12.5)
    assert set(entered) == {second}


def test_machine_limits_are_measured() -> None:
    limits = machine_limits(CPU, budget_s=0.02)
    assert limits.keys() == {"copy_gb_s", "gemm_gflop_s"}
    assert all(math.isfinite(value) and value > 0 for value in limits.values())


def test_machine_limits_count_what_they_say(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_millisecond(*_: object, **__: object) -> None:
        clock.now_ns += 1e6

    monkeypatch.setattr(measure, "_COPY_BYTES", {"cpu": 4000})
    monkeypatch.setattr(torch.Tensor, "copy_", one_millisecond)
    monkeypatch.setattr(torch, "mm", one_millisecond)
    limits = machine_limits(CPU, budget_s=0.01)
    assert limits["copy_gb_s"] == pytest.approx(8000 / 1e-3 / 1e9)  # read once and written once
    assert limits["gemm_gflop_s"] == pytest.approx(2 * 1024**3 / 1e-3 / 1e9)
