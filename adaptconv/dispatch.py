"""Dispatch: a Problem in, a Plan out. Pure, memoised, never tunes, never writes, and says why.

Order: pinned -> exact record -> nearest record -> cost model -> native or dense.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from adaptconv import records
from adaptconv.backends import BACKENDS, Choice, Config, Space, backend_named, backend_names
from adaptconv.backends.base import Call, Value
from adaptconv.backends.costs import is_modelled
from adaptconv.backends.grid import plain_call
from adaptconv.backends.native import Native, is_plain
from adaptconv.errors import BackendRejected, UnknownKnob
from adaptconv.pins import Pin, current_pin
from adaptconv.predictions import COST_GAIN, best_predicted, carried_over
from adaptconv.problem import Direction, Problem
from adaptconv.records import Record

_LOG = logging.getLogger("adaptconv.dispatch")

NEAREST_WITHIN = 2.0  # distance beyond which a neighbour says nothing: two sizes doubled, or a stale toolchain
_TUNED_IN = ("float32", "bfloat16", "float16")  # a model may have been tuned without the autocast that it runs under


class Source(str, Enum):
    """Where a decision came from."""

    PINNED = "pinned"
    RECORD = "record"
    NEAREST = "nearest"
    COST = "cost"
    FALLBACK = "fallback"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Decision:
    """What one candidate answered.

    Attributes:
        backend: its name.
        accepts: whether it can run the problem.
        reason: why not, or what speaks for its best configuration.
        choice: its best predicted configuration; None where it declined.
        predicted_us: predicted time of that configuration in microseconds; None where not modelled.
    """

    backend: str
    accepts: bool
    reason: str
    choice: Choice | None = None
    predicted_us: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How a problem will run, and why.

    Attributes:
        problem: what is computed.
        choice: backend, version and configuration.
        source: which step of dispatch decided.
        why: that step's reason, in words.
        record: the record it rests on, if any.
        gain_us: microseconds it gains over torch's own call, as measured, carried over or predicted; None where there
            is no such call, or nobody knows.
        plain: whether it is exactly the torch call adaptconv stands in for.
    """

    problem: Problem
    choice: Choice
    source: Source
    why: str
    record: Record | None = None
    gain_us: float | None = None
    plain: bool = field(default=False)
    _call: Call | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def call(self) -> Call:
        """What runs it, ``(a, b, bias) -> result``; operands and result as in ``Backend.run``. Made once."""
        if self._call is None:
            prepared = backend_named(self.choice.backend).prepared
            made = plain_call(self.problem) if self.plain else prepared(self.problem, self.choice.config)
            object.__setattr__(self, "_call", made)
        assert self._call is not None
        return self._call

    @property
    def text(self) -> str:
        """Canonical short form: what travels inside graphs and caches."""
        return str(self.choice)

    def __str__(self) -> str:
        return f"{self.problem}\n  plan: {self.choice}  (source: {self.source}; {self.why})"


_MEMO: dict[tuple[Problem, Pin | None], Plan] = {}
_memo_epoch = -1


def plan(problem: Problem) -> Plan:
    """Decide how a problem runs. The same database and problem always give the same plan."""
    global _memo_epoch
    if records.epoch() != _memo_epoch:
        _MEMO.clear()
        _memo_epoch = records.epoch()
    pin = current_pin()
    decided = _MEMO.get((problem, pin))
    if decided is None:
        decided = _decide(problem, pin)
        _MEMO[problem, pin] = decided
        _LOG.debug("%s", decided)
    return decided


def plan_from_choice(problem: Problem, choice: Choice, source: Source, why: str) -> Plan:
    """A plan for a choice made elsewhere, checked against this process's backends.

    Raises:
        UnknownBackend, UnknownKnob: the choice names something not declared here.
        BackendRejected: the backend declines the problem.
    """
    backend = backend_named(choice.backend)
    reason = backend.rejects(problem)
    if reason:
        raise BackendRejected(choice.backend, reason, problem)
    reason = backend.space(problem).problem_with(choice.config)
    if reason:
        raise UnknownKnob(f"backend '{choice.backend}': {reason}")
    reason = backend.failure(problem, choice.config)
    if reason:
        raise BackendRejected(choice.backend, reason, problem)
    return Plan(problem, choice, source, why, plain=is_plain(problem, choice))


def decisions(problem: Problem) -> list[Decision]:
    """What every registered backend answers to a problem, best predicted configuration included."""
    answers = []
    for backend in BACKENDS:
        reason = backend.rejects(problem)
        if reason:
            answers.append(Decision(backend.name, False, reason))
            continue
        choice, predicted = best_predicted(backend, problem)
        text = "accepts" if math.isnan(predicted) else f"predicted {predicted:,.0f} us as {choice}"
        answers.append(Decision(backend.name, True, text, choice, None if math.isnan(predicted) else predicted))
    return answers


def explain_problem(problem: Problem) -> str:
    """Every candidate, what it answered, what the database holds, and what was decided."""
    decided = plan(problem)
    lines = [str(decided)]
    if decided.record is not None:
        record = decided.record
        lines.append(
            f"  measured: {record.p20_us:,.0f} us against native's {record.native_us:,.0f} us "
            f"on {record.measured_on}, error {record.error:.1e} (native {record.native_error:.1e})"
        )
        lines += [f"    rival {rival.choice}: {rival.p20_us:,.0f} us" for rival in record.rivals]
    for answer in decisions(problem):
        mark = "*" if answer.backend == decided.choice.backend else "+" if answer.accepts else "-"
        lines.append(f"  {mark} {answer.backend}: {answer.reason}")
    return "\n".join(lines)


def _decide(problem: Problem, pin: Pin | None) -> Plan:
    if pin is not None:
        return _from_pin(problem, pin)
    exact, notes = _from_record(problem)
    if exact is not None:
        return exact
    nearest, note = _from_neighbours(problem)
    if nearest is not None:
        return nearest
    notes.append(note)
    return plan_from_costs(problem, "; ".join(notes))


def _from_pin(problem: Problem, pin: Pin) -> Plan:
    backend = backend_named(pin.backend)
    reason = backend.rejects(problem)
    if reason:
        raise BackendRejected(pin.backend, reason, problem)
    space = backend.space(problem)
    declared = {knob.name for knob in space.knobs}
    elsewhere = {knob.name for d in Direction for knob in backend.space(problem.facing(d)).knobs} - declared
    config = space.complete({name: value for name, value in pin.knobs if name not in elsewhere})
    choice = Choice(backend.name, backend.version, config)
    return Plan(problem, choice, Source.PINNED, "forced by adaptconv.pinned", plain=is_plain(problem, choice))


def _usable(problem: Problem, record: Record) -> tuple[Choice | None, str]:
    """A record's choice if this process can run it as it was measured, and why not otherwise."""
    if record.backend not in backend_names():
        return None, f"names backend '{record.backend}', which is not registered"
    backend = backend_named(record.backend)
    if record.version != backend.version:
        return None, f"was measured with version {record.version} of '{record.backend}', now {backend.version}"
    space = backend.space(problem)
    choice = Choice(record.backend, record.version, _as_declared(record.config, space))
    reason = backend.rejects(problem) or space.problem_with(choice.config) or backend.failure(problem, choice.config)
    return (None, f"its choice does not fit: {reason}") if reason else (choice, "")


def _as_declared(config: Mapping[str, Value], space: Space) -> Config:
    """A record's configuration with the native route said or left out: which problems have others is no difference."""
    routes = any(knob.name == "route" for knob in space.knobs)
    if routes and "route" not in config:
        return Config(config, route="native")
    if not routes and config.get("route") == "native":
        return Config({name: value for name, value in config.items() if name != "route"})
    return Config(config)


def _from_record(problem: Problem) -> tuple[Plan | None, list[str]]:
    hit = records.default_store().lookup(problem)
    if hit is None:
        known = [dtype for dtype in _TUNED_IN if _is_known(problem, dtype)]
        return None, [f"no record of this problem{f', only in {known[0]}' if known else ''}"]
    choice, reason = _usable(problem, hit.record)
    if choice is None:
        return None, [f"the {hit.layer} record {reason}"]
    why = f"{hit.layer} database, measured {hit.record.measured_on}"
    gain_us = None if Native().rejects(problem) else hit.record.native_us - hit.record.p20_us
    return Plan(problem, choice, Source.RECORD, why, hit.record, gain_us, is_plain(problem, choice)), []


def _is_known(problem: Problem, dtype: str) -> bool:
    return dtype != problem.dtype and records.default_store().lookup(replace(problem, dtype=dtype)) is not None


def _from_neighbours(problem: Problem) -> tuple[Plan | None, str]:
    for distance, hit in records.default_store().neighbours(problem):
        if distance > NEAREST_WITHIN:
            break
        choice, _ = _usable(problem, hit.record)
        if choice is None:
            continue
        found = carried_over(problem, hit.record, choice, distance)
        why = f"nearest {hit.layer} record at distance {distance:.2f}, {found.why}"
        plain = is_plain(problem, found.choice)
        return Plan(problem, found.choice, Source.NEAREST, why, gain_us=found.gain_us, plain=plain), ""
    return None, "no record near it"


def plan_from_costs(problem: Problem, note: str = "the database was not asked") -> Plan:
    """The plan of predictions alone: what an empty database gives."""
    native = Native()
    accepted = [backend for backend in BACKENDS if not backend.rejects(problem)]
    if not is_modelled(problem.device):
        choice = accepted[0].default(problem)
        why = f"{note}; no cost model for {problem.device.kind}"
        return Plan(problem, choice, Source.FALLBACK, why, plain=is_plain(problem, choice))
    choice, predicted = min((best_predicted(backend, problem) for backend in accepted), key=lambda pair: pair[1])
    why = f"{note}; predicted {predicted:,.0f} us"
    gain_us = None
    if not native.rejects(problem):
        plain = native.default(problem)
        plain_us = native.cost(problem, plain.config)
        why += f" against native's {plain_us:,.0f} us"
        gain_us = plain_us - predicted
        if plain_us < COST_GAIN * predicted:
            choice, why, gain_us = plain, f"{why}, too close to leave native", 0.0
    return Plan(problem, choice, Source.COST, why, gain_us=gain_us, plain=is_plain(problem, choice))
