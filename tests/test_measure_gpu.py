"""Timing on a GPU: what is captured, replayed and given up, on a stub of torch.cuda."""

from __future__ import annotations

import pytest
import torch

from adaptconv import graphs, measure
from benchmarks.gpu import clock
from tests.cuda_stub import CUDA, Card
from tests.cuda_stub import card as card  # the fixture


def test_what_python_costs_is_in_no_replay(card: Card) -> None:
    calls = {"light": card.kernel(20.0, 0.0), "heavy": card.kernel(20.0, 300.0)}
    timings = measure.interleave(calls, budget_s=0.3, device=CUDA, min_rounds=3, max_rounds=10, warmup=0, graphs=True)
    assert {name: timing.p20_us for name, timing in timings.items()} == {"light": 20.0, "heavy": 20.0}
    assert card.waits, "the device waits for the first launch"
    eager = measure.interleave(calls, budget_s=0.1, device=CUDA, min_rounds=3, max_rounds=5, warmup=0)
    assert eager["heavy"].p20_us == 320.0


def test_a_sample_is_long_enough_however_slow_the_launch(card: Card) -> None:
    calls = {"heavy": card.kernel(1.0, 5000.0)}
    measure.interleave(calls, budget_s=0.3, device=CUDA, min_rounds=3, max_rounds=3, warmup=0, graphs=True)
    assert card.replays > 3 * 200, "by the eager call one replay of a microsecond would have done"


def test_a_capture_that_fails_leaves_everything_as_it_was(card: Card) -> None:
    card.fails = True
    call = card.kernel(10.0, 1.0)
    assert graphs.capture(call, CUDA) is None
    assert card.stream == "default"
    assert card.capturing is None
    assert card.ended == card.recording == [(0, 1)]
    assert card.captures == 1, "an empty one, after which torch has forgotten the other"
    timings = measure.interleave(
        {"one": call}, budget_s=0.01, device=CUDA, min_rounds=2, max_rounds=3, warmup=0, graphs=True
    )
    assert timings["one"].p20_us == 11.0, "it is timed as it is"
    card.fails = False
    assert graphs.capture(call, CUDA) is not None


def test_what_is_no_runtime_error_is_raised(card: Card) -> None:
    def broken() -> None:
        if card.capturing is not None:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        graphs.capture(broken, CUDA)
    assert card.stream == "default"
    assert card.capturing is None
    assert not card.recording


def test_cold_and_warm_times_are_both_the_devices(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_FLUSH_BYTES", 1 << 10)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *sizes, device: ones(*sizes))
    calls = {"short": card.kernel(20.0, 100.0), "long": card.kernel(900.0, 0.0), "far": card.kernel(5e4, 0.0)}
    times = clock.device_us(calls, CUDA, 0.2, far=20.0)
    assert set(times) == set(calls)
    assert (times["short"].cold_us, times["short"].warm_us) == pytest.approx((20.0, 20.0))
    assert times["long"].warm_us == pytest.approx(900.0)
    assert times["far"].cold_us == pytest.approx(5e4), "by its first samples"
