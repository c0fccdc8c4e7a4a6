"""Predictions: what the cost model says of a problem alone, and what it makes of a record of a similar one.

A prediction is a ranking, not a time: it may be wrong by a factor, but mostly by the same one for similar problems. So
a neighbour's times are carried over in proportion to the predictions for both, which tells where a size more is a step
over one of torch's cliffs: contiguous depthwise 13x13 windows have a fast kernel, 15x15 ones a loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adaptconv.backends import BACKENDS, Backend, Choice, backend_named
from adaptconv.backends.costs import is_modelled
from adaptconv.backends.native import Native
from adaptconv.problem import Problem
from adaptconv.records import Record, problem_of

# A predicted gain over native below which native is kept. On a processor whose oneDNN routes otherwise than those the
# predictions were made on (with AMX), 14 of 41 plans of smaller predicted gains were slower than native, of 47 of
# larger ones 1; leaving the former costs 7 % of what the 88 gain in the geometric mean.
COST_GAIN = 2.25
_GAIN = 1.25  # a neighbour's gain over native, carried over, below which native is kept; grows with its distance
_GAIN_PER_DISTANCE = 0.25
_LEAST_US = 1e-3  # a file may say that something took no time


def best_predicted(backend: Backend, problem: Problem) -> tuple[Choice, float]:
    """A backend's configuration of least predicted time, in microseconds; the default, and nan, where nothing is
    modelled.
    """
    default = backend.default(problem)
    if not is_modelled(problem.device):
        return default, math.nan
    best, best_us = default.config, backend.cost(problem, default.config)
    for config in backend.space(problem):
        predicted = backend.cost(problem, config)
        if predicted < best_us and not backend.failure(problem, config):
            best, best_us = config, predicted
    return Choice(backend.name, backend.version, best), best_us


@dataclass(frozen=True, slots=True)
class Expected:
    """What is expected to be best.

    Attributes:
        choice: backend and configuration.
        why: in words.
        gain_us: microseconds it gains over torch's own call; None where there is no such call, or nobody knows.
    """

    choice: Choice
    why: str
    gain_us: float | None


def carried_over(problem: Problem, record: Record, choice: Choice, distance: float) -> Expected:
    """What the record of a similar problem says of this one.

    The neighbour's winner, unless native is expected to come too near to it; or what is predicted to be best here,
    where that is expected to be far ahead of both. The neighbour's times grow as predictions do from there to here;
    whatever was not measured there was at best as fast as the winner.

    Args:
        problem: what is asked for.
        record: of the neighbour.
        choice: the record's, which the problem can take.
        distance: how far apart the two are.
    """
    native = Native()
    plain = None if native.rejects(problem) else native.default(problem)
    there = _problem_of(record, problem) if is_modelled(problem.device) else None
    p20_us = max(record.p20_us, _LEAST_US)
    expected = {choice: p20_us * _growth(choice, problem, there)}
    if there is not None:
        best, _ = min(
            (best_predicted(b, problem) for b in BACKENDS if not b.rejects(problem)), key=lambda pair: pair[1]
        )
        if best not in (choice, plain):
            expected[best] = COST_GAIN * p20_us * _growth(best, problem, there)
    winner = min(expected, key=lambda each: expected[each])
    said = f"where it gained {record.native_us / p20_us:.2f}x"
    if plain is None:
        return Expected(winner, said, None)
    native_us = record.native_us * _growth(plain, problem, there)
    enough = _GAIN + _GAIN_PER_DISTANCE * distance
    if there is not None:
        said += f"; {native_us / expected[winner]:.2f}x is expected here"
    if native_us < enough * expected[winner]:
        return Expected(plain, said, 0.0)
    return Expected(winner, said, None if there is None else native_us - expected[winner])


def _problem_of(record: Record, like: Problem) -> Problem | None:
    try:
        return problem_of(record.key, like.device)
    except ValueError:  # a file may say anything
        return None


def _growth(choice: Choice, problem: Problem, there: Problem | None) -> float:
    """Predicted time of a choice for a problem over that for another one; of the arithmetic, where one of them has no
    such choice.
    """
    if there is None:
        return 1.0
    backend = backend_named(choice.backend)
    if any(backend.rejects(each) or choice.config not in backend.space(each) for each in (problem, there)):
        return max(problem.flops, 1) / max(there.flops, 1)
    return backend.cost(problem, choice.config) / backend.cost(there, choice.config)
