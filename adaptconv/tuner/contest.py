"""Contest: the fastest sound way to compute one problem, found in three heats.

1. *Screening*: every backend's search proposes; each candidate is checked against the oracle, then the
   sound ones are timed together with the baseline in a few interleaved rounds.
2. *Final*: the best of all, the best of each backend within reach, and the baseline, in more rounds.
3. *Photo finish*: those within a hair of the winner, or of the baseline, once more before choosing.

On a GPU, calls are timed as replays of captured graphs: the device's time. A winner must also not lose to the baseline
when Python launches both.

The baseline is what a user has without adaptconv: the plain torch call, and where the taps are not one grid
and there is no such call, the better of the two ways to write it by hand (a dense kernel with zeros in it, or
a sum of grids), each with default knobs. It is checked and timed like any other candidate, and a tie is its.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from adaptconv import measure
from adaptconv.backends import Choice, backend_named
from adaptconv.backends.costs import is_modelled
from adaptconv.dispatch import decisions
from adaptconv.measure import Timing
from adaptconv.problem import Problem
from adaptconv.records import Record
from adaptconv.tuner.bench import Bench, Discarded
from adaptconv.tuner.bounds import least_us
from adaptconv.tuner.entrants import by_hand, searches
from adaptconv.tuner.final import Candidate, as_record, chosen, finalists, too_close

if TYPE_CHECKING:
    from adaptconv.tuner.search import Search

_LOG = logging.getLogger("adaptconv.tuner")

_BATCH = 4  # configurations a backend a screening run
_AT_LEAST = 4  # of them are timed however late it is
_ROUNDS = 4  # of a short screening, that which settles the number of repeats included
_FAR = 15.0  # times the best predicted
_LOST = 8.0  # times the fastest call so far
_BEYOND = 3.0  # times the baseline, what cannot be faster than that is not run at all on a GPU
_LONG = 0.05  # of the time for a problem: what a single call may take without being looked at twice
_HOPELESS = 6.0  # times the baseline: told as timed by a single call
_HOPELESS_US = 5e3  # below this a call is cheap enough to be timed properly
_FINAL = 0.4  # of the time for a problem, that screening leaves
_FINAL_ROUNDS = 12  # of those that will be in it: the final is left no more than that


class NoBaseline(Exception):
    """Torch itself cannot run the problem, so there is nothing to compare with."""


def hold(
    problem: Problem, device: torch.device, *, budget_s: float, trials: int | None = None, storage: Any = None,
    seed: int = 0,
) -> Record:  # fmt: skip
    """Find the winner of one problem; it is returned as a record, not written.

    Args:
        problem: the problem; it must be of this machine and of torch's flags as they are.
        device: where it runs.
        budget_s: seconds after which no further candidate is tried. The default of every backend and a
            short final are run in any case.
        trials: most configurations a backend.
        storage: an open Optuna storage, or None.
        seed: of operands and samplers.

    Raises:
        NoBaseline: plain torch fails on the problem.
    """
    deadline = monotonic() + budget_s
    # What autocast would change is the problem's dtype, and that has been decided.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        contest = _Contest(problem, device, budget_s, seed)
        contest.screen(searches(problem, trials, storage, seed), deadline)
        return contest.decide(deadline)


class _Contest:
    """The state of one contest; ``screen`` fills it, ``decide`` reads it."""

    def __init__(self, problem: Problem, device: torch.device, budget_s: float, seed: int) -> None:
        self.problem = problem
        self.device = device
        self.budget_s = budget_s
        self.long_us = _LONG * budget_s * 1e6
        predicted = [d.predicted_us for d in decisions(problem) if d.predicted_us is not None]
        self.least_predicted_us = min(predicted, default=math.inf)
        self.hopeless: dict[str, float] = {}  # by backend, the least prediction for one that proved so
        self.bench = Bench(problem, device, seed)
        self.sound: dict[Choice, Candidate] = {}
        self.baseline, self.baseline_us = self._pick_baseline()
        self.pace_us = self.baseline_us  # the fastest call so far

    def _pick_baseline(self) -> tuple[Choice, float]:
        """The baseline and a first idea of its time."""
        errors, failures = {}, []
        for choice in by_hand(self.problem):
            try:
                errors[choice] = self.bench.set_baseline(choice)
            except Exception as failure:  # noqa: BLE001 - torch may refuse a dtype, run out of memory, ...
                failures.append(f"{choice}: {failure}")
        if not errors:
            raise NoBaseline("; ".join(failures))
        once = {choice: self.bench.once_us(self.bench.call(choice)) for choice in errors}
        choice = min(errors, key=lambda choice: once[choice])
        if len(errors) > 1:
            if once[choice] < self.long_us:
                timings = self._interleaved(errors, 0.2, 3, 20)
                choice = min(errors, key=lambda choice: timings[choice].p20_us)
            self.bench.set_baseline(choice)
        self.sound[choice] = Candidate(choice, errors[choice], 1.0)
        return choice, once[choice]

    # ---- screening ----------------------------------------------------------------------------

    def screen(self, searches: list[Search], deadline: float) -> None:
        """Try what the searches propose until they have nothing more, or just the final's time is left."""
        halfway = (monotonic() + self._until(deadline)) / 2
        first = True
        left: dict[Search, list[Choice]] = {}  # proposed, and out of time: there may be more, the final grew shorter
        try:
            while first or monotonic() < self._until(deadline):
                if monotonic() > halfway:
                    for search in searches:
                        search.refine()
                proposals = {search: left.get(search) or search.propose(_BATCH) for search in searches}
                if not any(proposals.values()):
                    return
                told = self._screen_batch(proposals, self._until(deadline))
                left = {search: [c for c in choices if c not in told] for search, choices in proposals.items()}
                first = False
        finally:
            for search in searches:
                search.close()

    def _until(self, deadline: float) -> float:
        """When screening has to end, as far as is known by now."""
        final_us = sum(self.sound[choice].ratio for choice in self._running(short=True)) * self.baseline_us
        return deadline - min(_FINAL * self.budget_s, _FINAL_ROUNDS * final_us * 1e-6)

    def _screen_batch(self, proposals: Mapping[Search, list[Choice]], deadline: float) -> Container[Choice]:
        """Check and time one batch; whom there was time for. Each backend has a turn until one of its few is sound."""
        errors: dict[Choice, float] = {}
        first_us: dict[Choice, float] = {}
        told: dict[Choice, float | None] = {self.baseline: 1.0}
        sound: set[str] = set()
        for choice in self._in_turn(proposals.values(), sound, deadline):
            try:
                self._guard_time(choice)
                error, taken = self.bench.check(choice)
            except Discarded as failure:
                told[choice] = None
                level = logging.WARNING if failure.wrong else logging.INFO
                _LOG.log(level, "discarded %s on %s: %s", choice, self.problem, failure)
                continue
            sound.add(choice.backend)
            ratio = self._hopeless(choice, taken)
            if ratio is None:
                errors[choice], first_us[choice] = error, taken
                self.pace_us = min(self.pace_us, taken)
            else:
                told[choice] = ratio
                self.sound[choice] = Candidate(choice, error, ratio)
        left = deadline - monotonic()
        slow = [choice for choice, taken in first_us.items() if self._is_lost(taken)]
        for choice in slow + self._unaffordable({c: us for c, us in first_us.items() if c not in slow}, left):
            told[choice] = ratio = first_us[choice] / self.baseline_us
            self.sound[choice] = Candidate(choice, errors.pop(choice), ratio)
        timings = self._timed([self.baseline, *errors], left, 3 if left > 0 else 2, 8) if errors else {}
        for choice, error in errors.items():
            # Of so few samples the fastest says most: a neighbour on the machine can only add time.
            told[choice] = ratio = timings[choice].min_us / timings[self.baseline].min_us
            self.pace_us = min(self.pace_us, timings[choice].min_us)
            self.sound[choice] = Candidate(choice, error, ratio)
        for search, choices in proposals.items():
            for choice in choices:
                if choice in told:
                    search.tell(choice.config, told[choice])
        return told

    def _in_turn(self, batch: Iterable[list[Choice]], sound: Container[str], deadline: float) -> Iterator[Choice]:
        """Of each backend the first few until one is ``sound``; then, while there is time, the rest, best predicted
        first.
        """
        rest: list[Choice] = []
        for choices in batch:
            for i, choice in enumerate(choice for choice in choices if choice != self.baseline):
                if i >= _AT_LEAST or choice.backend in sound:
                    rest.append(choice)
                else:
                    yield choice
        for choice in sorted(rest, key=lambda choice: self._predicted_us(choice) or 0.0):
            if monotonic() > deadline:
                return
            yield choice

    def _guard_time(self, choice: Choice) -> None:
        """Keep out what would eat the time of all others: a call cannot be stopped once it runs.

        Raises:
            Discarded: on a GPU, even its arithmetic and launches alone take too long; elsewhere a long
                call is predicted, and something far faster too; or the same backend was seen to be hopeless, and
                nothing much better is predicted of this configuration.
        """
        predicted = self._predicted_us(choice)
        if predicted is None:
            least = least_us(self.problem, choice)
            if least > _BEYOND * self.baseline_us:
                raise Discarded(f"not run: {least:,.0f} us at the very least, native takes {self.baseline_us:,.0f}")
            return
        if predicted < self.long_us:
            return
        if predicted > _FAR * self.least_predicted_us:
            least = self.least_predicted_us
            raise Discarded(f"not run: {predicted:,.0f} us predicted, {least:,.0f} us of another candidate")
        if predicted > self.hopeless.get(choice.backend, math.inf) / 2:
            raise Discarded("not run: another configuration of this backend was hopeless, and this is predicted alike")

    def _unaffordable(self, first_us: Mapping[Choice, float], left: float) -> list[Choice]:
        """Whom there is no time to time: those whose first call was slowest. Their first call must do."""
        ranked = sorted(first_us, key=lambda choice: first_us[choice])
        spent = 0.0 if self._is_lost(self.baseline_us) else _ROUNDS * self.baseline_us
        for place, choice in enumerate(ranked):
            spent += _ROUNDS * first_us[choice]
            if spent > left * 1e6 and place >= _AT_LEAST:
                return ranked[place:]
        return []

    def _predicted_us(self, choice: Choice) -> float | None:
        if not is_modelled(self.problem.device):
            return None
        return backend_named(choice.backend).cost(self.problem, choice.config)

    def _hopeless(self, choice: Choice, taken: float) -> float | None:
        """The candidate's ratio if its first call, and if need be one more, shows that timing it is a waste."""
        for _ in range(2):
            ratio = taken / self.baseline_us
            if self._is_lost(taken):
                break
            if taken <= _HOPELESS_US or ratio <= _HOPELESS:
                return None
            taken = min(taken, self.bench.once_us(self.bench.call(choice)))
        predicted = self._predicted_us(choice)
        if predicted is not None:
            self.hopeless[choice.backend] = min(predicted, self.hopeless.get(choice.backend, math.inf))
        return ratio

    def _is_lost(self, us: float) -> bool:
        """Whether a call is so long, next to the fastest so far, that one is all that will be spent on it: torch's own
        loops for half precision take hundreds of times as long as what replaces them.
        """
        return us > _HOPELESS_US and us > _LOST * self.pace_us

    def _timed(self, choices: Iterable[Choice], seconds: float, least: int, most: int) -> dict[Choice, Timing]:
        """Times of one interleaved run; a baseline that is lost is not run again."""
        wanted = list(choices)
        lost = [choice for choice in wanted if choice == self.baseline and self._is_lost(self.baseline_us)]
        timings = self._interleaved([choice for choice in wanted if choice not in lost], seconds, least, most)
        return {choice: Timing.of([self.baseline_us]) for choice in lost} | timings

    def _interleaved(self, choices: Iterable[Choice], seconds: float, least: int, most: int) -> dict[Choice, Timing]:
        chosen = {str(choice): choice for choice in choices}
        calls = {name: self.bench.call(choice) for name, choice in chosen.items()}
        timings = measure.interleave(
            calls,
            budget_s=max(0.0, seconds),
            device=self.device,
            min_rounds=least,
            max_rounds=most,
            warmup=0,
            graphs=True,
        )  # no warm-up: each has run before, when it was checked
        return {chosen[name]: timing for name, timing in timings.items()}

    # ---- decision -----------------------------------------------------------------------------

    def decide(self, deadline: float) -> Record:
        """Run the final, and the photo finish if it takes one; the winner as a record."""
        left = deadline - monotonic()
        running = finalists(self.sound.values(), self.baseline, short=False)
        if sum(self.sound[choice].ratio for choice in self._running(short=False)) * self.baseline_us * 6 > left * 1e6:
            running = finalists(self.sound.values(), self.baseline, short=True)
        final = self._timed(running, min(1.0, 0.6 * left), 5, 40)
        near = too_close(final, self.baseline)
        last = final
        if near:
            last = self._timed([self.baseline, *near], min(1.0, 0.9 * (deadline - monotonic())), 9, 80)
        winner = chosen(last, self.baseline)
        while winner != self.baseline and self._is_held_up(winner):
            last = {choice: timing for choice, timing in last.items() if choice != winner}
            winner = chosen(last, self.baseline)
        return as_record(self.problem, self.device, winner, self.baseline, self.sound, (final, last))

    def _running(self, *, short: bool) -> list[Choice]:
        """Whom a final would time."""
        going = finalists(self.sound.values(), self.baseline, short=short)
        return [choice for choice in going if choice != self.baseline or not self._is_lost(self.baseline_us)]

    def _is_held_up(self, choice: Choice) -> bool:
        """Whether on a GPU a choice loses to the baseline when Python launches both, as it does outside of graphs.

        Kernels of some microseconds wait for the host: then the one that is launched with less Python is faster.
        """
        if self.device.type == "cpu":
            return False
        calls = {"winner": self.bench.call(choice), "baseline": self.bench.call(self.baseline)}
        timings = measure.interleave(calls, budget_s=0.1, device=self.device, max_rounds=20, warmup=0)
        return timings["winner"].p20_us > timings["baseline"].p20_us
