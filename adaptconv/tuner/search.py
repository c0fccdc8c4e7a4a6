"""Search: one Optuna study for one backend on one problem. The only file that imports optuna.

Order: the default, the bests of neighbours, then every configuration of a small space (Optuna's brute force) or
TPE on a large one, and last a coordinate descent around the best. Values are times relative to the baseline
of the same interleaved run, so that trials taken at different moments compare.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, BruteForceSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from adaptconv.backends import Backend, Choice, Config, Space
from adaptconv.problem import Problem
from adaptconv.tuner.result import TuneError

EXHAUSTIVE = 100  # configurations up to which all are tried
_TRIALS = 72  # of a larger space, where the caller sets no limit
_SAMPLED = 2 / 3  # of the trials of a larger space; the rest is descent
_REPEATS = 16  # configurations already known that the sampler may give in a row before it is done
_REMEMBERED = 4  # bests of an earlier session on the same storage that are timed again
_ABANDONED = timedelta(minutes=10)  # a trial that has run this long belongs to a process that was killed
_DISCARDED = "discarded"  # marks a failed trial as a verdict, not an interruption


class _Exhaustive(BruteForceSampler):
    def after_trial(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: Optuna's own would stop a ``study.optimize`` loop, and with ask and tell there is none."""


class Search:
    """What to try next of one backend on one problem.

    Args:
        problem: the problem.
        backend: a backend that accepts it.
        seeds: configurations to try after the default; those outside the space are ignored.
        storage: an Optuna storage that keeps the study; None keeps it in memory.
        scope: text that names what makes old trials comparable (the toolchain), for the study's name.
        trials: most configurations to try; None for all of a small space, some of a large one.
        seed: of the sampler.
    """

    def __init__(
        self, problem: Problem, backend: Backend, *, seeds: Iterable[Config] = (), storage: Any = None,
        scope: str = "", trials: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.backend = backend
        self.space: Space = backend.space(problem)
        size = self.space.size
        self._small = size <= EXHAUSTIVE
        self._limit = min(size, trials or (size if self._small else _TRIALS))
        self._known: dict[Config, float | None] = {}
        self._pending: dict[Config, list[optuna.Trial]] = {}
        self._refining = False
        sampler: BaseSampler = _Exhaustive(seed=seed) if self._small else TPESampler(seed=seed, constant_liar=True)
        name = study_name(problem, backend, scope)
        self._study = optuna.create_study(
            storage=storage, sampler=sampler, study_name=name, load_if_exists=True, direction="minimize"
        )
        self._past = self._read_past()
        remembered = sorted((c for c, v in self._past.items() if v is not None), key=lambda c: self._past[c] or 0.0)
        queue = [self.space.default, *seeds, *remembered[:_REMEMBERED], *self._abandoned()]
        self._queue = [config for config in dict.fromkeys(queue) if config in self.space]
        for config in self._queue:
            self._study.enqueue_trial(dict(config))

    def propose(self, count: int) -> list[Choice]:
        """Up to ``count`` configurations that were not measured yet; none when the search is over."""
        fresh: list[Config] = []
        repeats = 0
        while len(fresh) < count and len(self._known) + len(self._pending) < self._limit:
            if not self._queue and (self._refining or self._sampled_enough()):
                self._queue = self._around_best()
                for config in self._queue:
                    self._study.enqueue_trial(dict(config))
                if not self._queue:
                    break
            if repeats == _REPEATS:
                break
            config, trial = self._ask()
            if config in self._queue:
                self._queue.remove(config)
            elif config in self._past and config not in self._known:
                self._finish(trial, self._past[config])
                repeats += 1
                continue
            if config in self._known:
                self._finish(trial, self._known[config])
                repeats += 1
                continue
            if config not in self._pending:
                fresh.append(config)
            self._pending.setdefault(config, []).append(trial)
        return [Choice(self.backend.name, self.backend.version, config) for config in fresh]

    def tell(self, config: Config, ratio: float | None) -> None:
        """Report a proposed configuration: its time over the baseline's, or None if it may not win."""
        self._known[config] = ratio
        for trial in self._pending.pop(config, ()):
            self._finish(trial, ratio)

    def refine(self) -> None:
        """Half of the time is over: from now on only the neighbourhood of the best is tried."""
        self._refining = not self._small

    def close(self) -> None:
        """Give up what was proposed and never measured, so that no trial is left running in the storage."""
        for trials in self._pending.values():
            for trial in trials:
                self._study.tell(trial, state=TrialState.FAIL)
        self._pending.clear()

    def _ask(self) -> tuple[Config, optuna.Trial]:
        trial = self._study.ask()
        for knob in self.space.knobs:
            trial.suggest_categorical(knob.name, list(knob.values))
        return Config(trial.params), trial

    def _finish(self, trial: optuna.Trial, ratio: float | None) -> None:
        if ratio is None or not math.isfinite(ratio):
            trial.set_user_attr(_DISCARDED, True)
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, ratio)

    def _sampled_enough(self) -> bool:
        return not self._small and len(self._known) + len(self._pending) >= math.ceil(_SAMPLED * self._limit)

    def _around_best(self) -> list[Config]:
        """Untried configurations one step from the best: the values next to its own, knob after knob."""
        timed = {config: ratio for config, ratio in self._known.items() if ratio is not None}
        if not timed:
            return []
        best = min(timed, key=lambda config: timed[config])
        steps = []
        for knob in self.space.knobs:
            at = knob.values.index(best[knob.name])
            near = range(len(knob.values)) if isinstance(best[knob.name], str) else (at - 1, at + 1)
            steps += [Config({**best, knob.name: knob.values[i]}) for i in near if 0 <= i < len(knob.values)]
        return [config for config in steps if config not in self._known and config not in self._pending]

    def _read_past(self) -> dict[Config, float | None]:
        past: dict[Config, float | None] = {}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.FAIL)):
            config = Config(trial.params)
            if config in self.space and (trial.state is TrialState.COMPLETE or trial.user_attrs.get(_DISCARDED)):
                past[config] = trial.value
        return past

    def _abandoned(self) -> list[Config]:
        """What an earlier session proposed and never measured: no sampler would propose it again."""

        def given_up(trial: FrozenTrial) -> bool:
            if trial.state is TrialState.FAIL:
                return not trial.user_attrs.get(_DISCARDED)
            return trial.datetime_start is not None and datetime.now() - trial.datetime_start > _ABANDONED

        ended = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.FAIL))
        configs = [Config(trial.params) for trial in ended if given_up(trial)]
        return [config for config in configs if config not in self._past]


def study_name(problem: Problem, backend: Backend, scope: str = "") -> str:
    """Names a study: equal on every host that tunes the same problem, backend version and toolchain."""
    digest = hashlib.sha256(f"{problem.key()} {scope}".encode()).hexdigest()[:24]
    return f"adaptconv {digest} {backend.name}@{backend.version} {problem.device.slug}"


def open_storage(url: str | None) -> Any:
    """The Optuna storage behind an RDB URL such as ``sqlite:///trials.db``; None for None.

    Raises:
        TuneError: it cannot be opened.
    """
    if url is None:
        return None
    try:
        return optuna.storages.RDBStorage(url)
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TuneError(
            f"the trial storage {url!r} cannot be opened: {text}; expected a database URL such as "
            "'sqlite:///trials.db' (one host) or 'postgresql://user@host/name' (several)"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna's log and its notes on experimental classes to itself."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
