"""The final of a contest: who goes there, who must run again, who wins; from times alone, nothing runs here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from adaptconv import records
from adaptconv.backends import BACKENDS, Choice
from adaptconv.measure import Timing
from adaptconv.problem import Problem
from adaptconv.records import Record, Rival

TIE = 0.97  # a winner takes at most this share of the baseline's time, or the baseline stays
NEAR = 1.05  # within this of the fastest, the order is not yet known
_SAME = 1.02  # still within this after the photo finish, the plainer choice is taken
_UNSTEADY = 1.25  # times its fastest sample: a 20th percentile above that says the machine is disturbed
_IN_REACH = 1.3  # of the screening's best: goes to the final
_RIVAL_REACH = 3.0  # likewise for the best of each other backend
_FINALISTS = 6


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sound choice as the screening saw it.

    Attributes:
        choice: backend and configuration.
        error: relative L2 error against the oracle.
        ratio: its time over the baseline's in the same run.
    """

    choice: Choice
    error: float
    ratio: float


def finalists(sound: Iterable[Candidate], baseline: Choice, *, short: bool) -> list[Choice]:
    """The baseline, the best of all and, unless time is short, the best of each other backend that is in reach."""
    ranked = sorted(sound, key=lambda candidate: candidate.ratio)
    best = ranked[0].ratio
    going = {c.choice: None for c in ranked[: 2 if short else _FINALISTS] if c.ratio <= _IN_REACH * best}
    rivals = () if short else best_of_backends(ranked).values()
    going |= {c.choice: None for c in rivals if c.ratio <= _RIVAL_REACH * best}
    return [baseline, *(choice for choice in going if choice != baseline)]


def too_close(final: Mapping[Choice, Timing], baseline: Choice) -> list[Choice]:
    """Who must run again beside the baseline; nobody where the order is clear and the machine steady."""
    best = min(timing.p20_us for timing in final.values())
    near = sorted((c for c in final if final[c].p20_us <= NEAR * best), key=lambda c: final[c].p20_us)
    others = [c for c in near if c != baseline]
    if any(final[c].p20_us > _UNSTEADY * final[c].min_us for c in (baseline, near[0])):
        return sorted((c for c in final if c != baseline), key=lambda c: final[c].min_us)[:3]
    close_to_baseline = final[baseline].p20_us <= NEAR / TIE * best
    return others[:3] if others and (len(others) > 1 or close_to_baseline) else []


def chosen(timings: Mapping[Choice, Timing], baseline: Choice) -> Choice:
    """The winner of a run: the fastest that beats the baseline beyond doubt, else the baseline.

    Beyond doubt: a 20th percentile of at most ``TIE`` times the baseline's, and a faster fastest sample.
    Between winners that cannot be told apart, the earlier backend with fewer knobs turned is taken.
    """
    own = timings[baseline]
    better = [c for c, t in timings.items() if t.p20_us <= TIE * own.p20_us and t.min_us < own.min_us]
    better = [choice for choice in better if choice != baseline]
    if not better:
        return baseline
    best = min(timings[choice].p20_us for choice in better)
    order = {backend.name: place for place, backend in enumerate(BACKENDS)}
    same = [choice for choice in better if timings[choice].p20_us <= _SAME * best]
    return min(same, key=lambda choice: (order[choice.backend], len(set(choice.config.items())), str(choice)))


def as_record(
    problem: Problem, device: torch.device, winner: Choice, baseline: Choice, sound: Mapping[Choice, Candidate],
    runs: Sequence[Mapping[Choice, Timing]],
) -> Record:  # fmt: skip
    """The winner of a problem as a record, with the best of each other backend; the last of the runs decided."""
    last = runs[-1]
    native_us = last[baseline].p20_us
    ratios = {choice: candidate.ratio for choice, candidate in sound.items()}
    for run in runs:  # the latest run that timed it, always relative to the baseline of that run
        ratios |= {choice: timing.p20_us / run[baseline].p20_us for choice, timing in run.items()}
    ranked = sorted((Candidate(c, 0.0, ratio) for c, ratio in ratios.items()), key=lambda c: c.ratio)
    rivals = tuple(
        Rival(str(candidate.choice), candidate.ratio * native_us)
        for name, candidate in best_of_backends(ranked).items()
        if name != winner.backend
    )
    timing = last[winner]
    return Record(
        key=problem.key(), backend=winner.backend, version=winner.version, config=dict(winner.config),
        p20_us=timing.p20_us, median_us=timing.median_us, p80_us=timing.p80_us, native_us=native_us,
        error=_finite(sound[winner].error), native_error=_finite(sound[baseline].error),
        toolchain=records.toolchain(device), measured_on=records.utc_now(), rivals=rivals,
    )  # fmt: skip


def _finite(error: float) -> float:
    """An error as a record can hold it; where torch overflows, the relative error is 1 by its meaning."""
    return error if math.isfinite(error) else 1.0


def best_of_backends(ranked: Iterable[Candidate]) -> dict[str, Candidate]:
    """The first of each backend among candidates sorted by ratio."""
    best: dict[str, Candidate] = {}
    for candidate in ranked:
        best.setdefault(candidate.choice.backend, candidate)
    return best
