"""What tuning does for a GPU, as far as it shows without one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptconv.backends import Choice, backend_named
from adaptconv.backends.gather import Gather
from adaptconv.backends.native import Native
from adaptconv.backends.triton.banded.backend import Banded
from adaptconv.problem import Device, Direction, Problem
from adaptconv.tuner import bench, bounds, compiling, entrants
from adaptconv.tuner.bench import Bench, Discarded
from benchmarks.suites import SUITES
from tests.cases import case

H200 = Device("cuda", "NVIDIA H200", 0)
LAYERS = {layer.name: layer for layer in SUITES["gpu"]}


def suite(name: str, direction: Direction = Direction.FORWARD) -> Problem:
    return replace(LAYERS[name].problem(direction), device=H200)


def default(name: str, problem: Problem) -> Choice:
    return backend_named(name).default(problem)


# ---- judging ------------------------------------------------------------------------------------


def test_compiling_in_the_first_call_is_not_held_against_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case("small", "5x5", (9, 8), channels=(4, 4), groups=4, pad=2).problem(Direction.FORWARD, torch.float32)
    taken_ns = [1_000_000_000, 7_000]  # of the first call, and of the second
    now_ns = 0
    prepared = Gather.prepared

    def slow_at_first(*each: Any) -> Any:
        def call(*operands: Any) -> Tensor:
            nonlocal now_ns
            now_ns += taken_ns.pop(0)
            return prepared(*each)(*operands)

        return call

    monkeypatch.setattr(Gather, "prepared", slow_at_first)
    monkeypatch.setattr(bench, "perf_counter_ns", lambda: now_ns)
    stand = Bench(problem, torch.device("cpu"))
    stand.set_baseline(default("native", problem))
    stand.device = torch.device("meta")  # all that is asked of it is that it is not the CPU
    _, taken_us = stand.check(default("gather", problem))
    assert taken_us == 7.0, "the call after the first"


def test_a_plane_that_is_wrong_is_seen_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case("many", "3x3", (6, 6), channels=(512, 512), groups=512, batch=16, pad=1).problem(
        Direction.FORWARD, torch.bfloat16
    )
    prepared = Gather.prepared

    def stale(*each: Any) -> Any:
        def call(*operands: Any) -> Tensor:
            result = prepared(*each)(*operands).clone()
            result[7, 99] *= 1.2
            return result

        return call

    stand = Bench(problem, torch.device("cpu"))
    stand.set_baseline(default("native", problem))
    stand.device = torch.device("meta")
    stand.check(default("gather", problem))
    monkeypatch.setattr(Gather, "prepared", stale)
    with pytest.raises(Discarded, match="one plane") as caught:
        stand.check(default("gather", problem))
    assert caught.value.wrong


def test_tf32_is_allowed_its_error_where_the_flags_allow_it() -> None:
    problem = case("small", "3x3", (9, 8), pad=1).problem(Direction.FORWARD, torch.float32)
    limits = []
    for precision in ("ieee", "conv-tf32"):
        stand = Bench(replace(problem, fp32_precision=precision), torch.device("cpu"))
        stand.set_baseline(default("native", problem))
        limits.append(stand.limit)
    assert limits[0] < 1e-5 < 1e-3 < limits[1]


# ---- what is not even run -----------------------------------------------------------------------


def test_endless_slicing_is_declined_on_a_gpu_and_not_on_a_cpu() -> None:
    large = suite("replknet-s1-k31")
    assert "slice the input" in str(backend_named("gather").rejects(large))
    assert backend_named("gather").rejects(replace(large, device=Device("cpu", "any", 2))) is None
    assert backend_named("gather").rejects(suite("hdc-d5")) is None


def test_a_wide_window_of_zeros_takes_its_multiply_adds_at_least() -> None:
    problem = suite("deeplabv3-aspp8-d36")
    least = bounds.least_us(problem, default("dense", problem))
    assert least == pytest.approx(2 * 8 * 65 * 65 * 2048 * 256 * 73 * 73 / 790e12 * 1e6, rel=1e-6)
    assert bounds.least_us(problem, default("native", problem)) == 0


# ---- compiled ahead -----------------------------------------------------------------------------


def test_the_best_predicted_are_tried_first() -> None:
    problem = suite("dense-k17")
    first = entrants.promising(problem, Banded())
    space = Banded().space(problem)
    assert first[0] == space.default
    times = [Banded().predicted_us(problem, config) for config in space]
    assert Banded().predicted_us(problem, first[1]) == min(
        time for time, config in zip(times, space, strict=True) if config != space.default
    )
    assert len(first) == len(set(first)) > 3
    cpu = replace(problem, device=Device("cpu", "any", 2), dtype="float32")
    own = entrants.promising(cpu, Native())
    predicted = [Native().cost(cpu, config) for config in own[1:]]
    assert own[0] == Native().space(cpu).default and predicted == sorted(predicted) and len(predicted) > 2
    assert not entrants.promising(cpu, Banded()) and not entrants.promising(problem, Native()), "not predicted there"


def test_nothing_is_compiled_ahead_for_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = case("holes", "1011011", (20,), pad=3).problem(Direction.FORWARD, torch.float32)
    with compiling.compiling([problem], workers=2) as wait:
        assert compiling._active is None
        wait(problem, 60.0)
