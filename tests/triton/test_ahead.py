"""Kernels compiled ahead: in other processes, each once, and found there by whoever launches them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adaptconv.backends import Choice, backend_named
from adaptconv.backends.triton import op
from adaptconv.backends.triton.ahead import Ahead
from adaptconv.backends.triton.compiler_process import Kernel, Target, kernels_of
from adaptconv.problem import Device, Direction, Problem
from tests.cases import case
from tests.triton.harness import INTERPRETED, operands
from tests.triton.stub import Seen, driver

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="needs the compiler and no driver")

H100 = Target("cuda", 90, 32)
EVEN = case("even", "3x3d2x2", (19, 18), channels=(64, 128), pad=2, bias=True)
LINE = case("line", "31", (128,), channels=(8, 8), groups=8, pad=15)


def wanted(each: object, name: str, direction: Direction = Direction.FORWARD) -> tuple[Problem, Choice]:
    problem = each.problem(direction, torch.bfloat16)  # type: ignore[attr-defined]
    return problem, backend_named(name).default(replace(problem, device=Device("cuda", "NVIDIA H200", 0)))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    with driver(monkeypatch) as seen:
        yield seen


def test_what_was_compiled_ahead_is_not_compiled_again(cache: Path, card: Seen) -> None:
    pairs = [wanted(EVEN, "sparse"), wanted(EVEN, "sparse", Direction.GRAD_INPUT), wanted(LINE, "banded")]
    with Ahead(H100, workers=2) as ahead:
        for place, pair in enumerate(pairs):
            ahead.add(place, [pair])
        assert all(ahead.wait(place, 300) for place in range(len(pairs)))
        assert ahead.compiled >= 4
    made = set(cache.iterdir())
    assert made
    for problem, choice in pairs:
        op.compute_of(choice.backend)(problem, choice.config, *operands(problem))
    assert len(card.kernels) >= 4, "all were launched"
    assert set(cache.iterdir()) == made, "and none had to be compiled"


def test_equal_kernels_are_one(card: Seen) -> None:
    problem, choice = wanted(EVEN, "sparse")
    unseen = [Choice("sparse", choice.version, config) for config in backend_named("sparse").space(problem)][-1]
    found = kernels_of([(problem, unseen), (replace(problem, batch=4), unseen)])
    assert found == kernels_of([(problem, unseen)])
    assert found
    assert all(isinstance(kernel, Kernel) for kernel in found)
    assert all(kernel is None for kernel in card.kernels), "nothing was compiled"


def test_what_does_not_compile_holds_nobody_up(cache: Path) -> None:
    problem, choice = wanted(EVEN, "sparse")
    broken = Choice("sparse", choice.version, type(choice.config)({**choice.config, "tile": "m48n64k64w4s3"}))
    with Ahead(H100, workers=1) as ahead:
        ahead.add(0, [(problem, broken)])
        ahead.add(1, [wanted(LINE, "banded")])
        assert ahead.wait(0, 300)
        assert ahead.wait(1, 300)
        assert ahead.compiled > 0


def test_closing_leaves_nothing_running() -> None:
    ahead = Ahead(H100, workers=2)
    ahead.add(0, [wanted(EVEN, "sparse")])
    ahead.close()
    assert not any(thread.is_alive() for thread in ahead._threads)
    assert all(child.poll() is not None for child in ahead._children)
    assert not ahead.wait(0, 0.01)


def test_a_process_that_dies_is_replaced_and_its_job_given_up(cache: Path) -> None:
    with Ahead(H100, workers=1) as ahead:
        ahead.add(0, [wanted(EVEN, "sparse")])
        while not ahead._children:
            time.sleep(0.01)
        ahead._children[0].kill()  # before it could answer anything
        assert ahead.wait(0, 300), "nobody waits for what will not come"
        ahead.add(1, [wanted(LINE, "banded")])
        assert ahead.wait(1, 300)
        assert ahead.compiled > 0
        assert len(ahead._children) == 2
