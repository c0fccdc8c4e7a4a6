"""What a search that leaves nothing out finds: every sound candidate of a problem, timed against its tuned plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptconv import measure
from adaptconv.backends import Choice, backend_named
from adaptconv.dispatch import Plan
from adaptconv.measure import Timing
from adaptconv.tuner.bench import Bench, Discarded
from adaptconv.tuner.entrants import by_hand, contenders

_HOPELESS = 50.0  # times the tuned plan: predicted there, a candidate may take minutes and is not tried
_FAR = 6.0  # times the tuned plan's first calls: not timed
_SHORT_MS = 5.0  # first calls below this are repeated before they are believed
_FINALISTS = 4
_IN_REACH = 1.25  # of the fastest in the first run: in the photo finish


@dataclass(frozen=True, slots=True)
class Searched:
    """One problem; times are 20th percentiles in milliseconds, of the photo finish.

    Attributes:
        layer, direction, layout: which.
        tuned, best: the plan of the record, and the fastest candidate; the same where nothing is faster.
        tuned_ms, best_ms: their times, interleaved.
        regret: tuned over best, at least 1.
        candidates: how many there are.
        timed: of them, those that were sound and not over six times slower in their first calls.
        unsound: those that raised, or whose error was too large.
        wrong: of these, what gave something else than a convolution, rounding apart.
        rounds: of the photo finish.
    """

    layer: str
    direction: str
    layout: str
    tuned: str
    best: str
    tuned_ms: float
    best_ms: float
    regret: float
    candidates: int
    timed: int
    unsound: int
    wrong: list[str]
    rounds: int


def searched(name: tuple[str, str, str], tuned: Plan, device: torch.device, seconds: float) -> Searched:
    """Try every configuration of every backend that accepts a problem.

    Args:
        name: layer, direction and layout, for the row.
        tuned: the plan of the problem's record.
        device: where to run.
        seconds: of timing all of them, and again of timing the few best.

    Raises:
        Exception: whatever the tuned plan, or plain torch, raises.
    """
    bench = Bench(tuned.problem, device)
    with torch.no_grad():
        bench.set_baseline(by_hand(tuned.problem)[0])
        tuned_us = _first_us(bench, tuned.choice)
        candidates = [
            Choice(backend.name, backend.version, config)
            for backend in contenders(tuned.problem) for config in backend.space(tuned.problem)
        ]  # fmt: skip
        candidates = [
            choice for choice in candidates
            if choice != tuned.choice
            and backend_named(choice.backend).cost(tuned.problem, choice.config) <= _HOPELESS * tuned_us
        ]  # fmt: skip
        near, unsound = [tuned.choice], 0
        wrong: list[str] = []
        for choice in candidates:
            try:
                _, taken = bench.check(choice)
            except Discarded as failure:
                unsound += 1
                wrong += [f"{choice}: {failure}"] * failure.wrong
                continue
            if taken > _FAR * tuned_us and taken <= 1e3 * _SHORT_MS:
                taken = _first_us(bench, choice)
            if taken <= _FAR * tuned_us:
                near.append(choice)
        run = _timed(bench, near, device, seconds, least=3)
        ranked = sorted(run, key=lambda choice: run[choice].p20_us)
        reach = _IN_REACH * run[ranked[0]].p20_us
        few = [choice for choice in ranked if choice != tuned.choice and run[choice].p20_us <= reach][:_FINALISTS]
        if few:
            run = _timed(bench, [tuned.choice, *few], device, seconds, least=9)
    best = min(run if few else [tuned.choice], key=lambda choice: run[choice].p20_us)
    tuned_ms, best_ms = run[tuned.choice].p20_us / 1e3, run[best].p20_us / 1e3
    return Searched(
        *name, str(tuned.choice), str(best), tuned_ms, best_ms, tuned_ms / best_ms,
        len(candidates) + 1, len(near), unsound, wrong, run[tuned.choice].rounds,
    )  # fmt: skip


def _first_us(bench: Bench, choice: Choice) -> float:
    """The least of three calls, in microseconds."""
    return min(bench.once_us(bench.call(choice)) for _ in range(3))


def _timed(
    bench: Bench, choices: list[Choice], device: torch.device, seconds: float, *, least: int
) -> dict[Choice, Timing]:
    calls = {str(choice): bench.call(choice) for choice in choices}
    timings = measure.interleave(calls, budget_s=seconds, device=device, min_rounds=least, warmup=0)
    return {choice: timings[str(choice)] for choice in choices}
