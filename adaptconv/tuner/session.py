"""Sessions: a model's problems, the time shared fairly among them, every winner written as it is found."""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from adaptconv import records
from adaptconv.backends import Choice, Config, backend_named, backend_names
from adaptconv.dispatch import Source, plan_from_choice
from adaptconv.errors import AdaptConvError
from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Problem
from adaptconv.records import DatabaseError, DatabaseWarning, Record
from adaptconv.tuner import contest, entrants
from adaptconv.tuner.compiling import compiling
from adaptconv.tuner.problems import model_problems
from adaptconv.tuner.result import KNOWN, NOT_TUNED, TUNED, TuneError, TuneResult, TuneRow, gain

_LOG = logging.getLogger("adaptconv.tuner")

PROBLEM_S = 3.0  # for one problem, where the session has no budget
_COMPILE_S = 60.0  # at most for one problem's first kernels; what is not compiled by then is compiled when it is timed
LEAST_S = 0.5  # for one problem: of less, noise picks the winner


def tune(
    model: Callable[..., Any] | None, example_inputs: Any = (), *, train: bool = False,
    budget_s: float | None = None, trials: int | None = None, storage: str | None = None,
    problems: Sequence[Problem] | None = None, progress: bool | None = None, force: bool = False,
    database: str | os.PathLike[str] | None = None, seed: int = 0, workers: int | None = None,
) -> TuneResult:  # fmt: skip
    """Find the fastest sound way to compute each of a model's convolutions here, and remember it.

    The model is traced once on the inputs and otherwise left alone; its convolutions are then timed on
    random operands of the same shapes, dtypes and memory formats. Winners are written to the tuning
    database one by one, so Ctrl-C (or a kill) keeps every finished one; graphs that ``adaptconv.optimize``
    compiled are compiled anew at their next call.

    Args:
        model: a module or function, optimized or not.
        example_inputs: a tensor, a tuple or list of arguments, or a dict of keyword arguments.
        train: tune the gradients as well; trace with gradients on.
        budget_s: wall-clock seconds for the whole call, shared fairly; None allows about three a problem.
        trials: most configurations tried of each backend on each problem.
        storage: database URL that Optuna keeps its trials in ("sqlite:///trials.db"; PostgreSQL where
            several hosts share one); in memory by default.
        problems: tune these instead; the model is then not called, and may be None.
        progress: whether to show a progress bar on stderr; None shows it on a terminal.
        force: tune again what has a current record already.
        database: directory to write to; it becomes this process's first layer (``records.use_database``).
        seed: of the operands and of Optuna's samplers.
        workers: processes that compile a GPU's kernels ahead of their turn; None for one less than there are
            processors, 0 for none. They end with the call.

    Returns:
        A row for every problem, which ``str`` sums up in a sentence.

    Raises:
        TuneError: a model that cannot be called on these inputs, or a setting that makes no sense.
    """
    settings: dict[str, Any] = {
        "budget_s": budget_s, "trials": trials, "storage": storage, "progress": progress, "force": force,
        "database": database, "seed": seed, "workers": workers,
    }  # fmt: skip
    if problems is not None:
        return tune_problems(problems, **settings)
    _check_settings(budget_s, trials, workers)
    if not callable(model) or isinstance(model, type):
        raise TuneError(
            f"adaptconv.tune takes an nn.Module or a function, got {'the class ' if isinstance(model, type) else ''}"
            f"{getattr(model, '__name__', type(model).__name__)}; give an instance, or problems="
        )
    start = monotonic()
    from adaptconv.compile.optimize import as_arguments

    args, kwargs = as_arguments(example_inputs)
    try:
        found, left = model_problems(model, args, kwargs, train=train)
    except KeyboardInterrupt:
        return TuneResult((), monotonic() - start, True)
    if not found:
        note = "no convolution was found in the model, so there is nothing to tune"
        if left:
            note = f"none of the model's {len(left)} convolutions can be tuned ({left[0]})"
        return TuneResult(seconds=monotonic() - start, note=note)
    note = f"{len(left)} convolutions are left to torch ({left[0]})" if left else ""
    if budget_s is not None:  # finding them took some of it
        settings["budget_s"] = max(1e-3, budget_s - (monotonic() - start))
    return tune_problems(found, note=note, **settings)


def tune_problems(
    problems: Iterable[Problem], *, budget_s: float | None = None, trials: int | None = None,
    storage: str | None = None, progress: bool | None = None, force: bool = False,
    database: str | os.PathLike[str] | None = None, seed: int = 0, workers: int | None = None, note: str = "",
) -> TuneResult:  # fmt: skip
    """Tune problems however they were found; arguments and result as for ``tune``.

    Problems that are the same are tuned once. Those predicted to take native longest come first, for that is
    where most is to be gained. Each gets an equal share of the time that is left when its turn comes, and no less
    than half a second: a short budget leaves the cheapest problems untuned rather than all of them to noise. One
    that outgrows its share still finishes the screening of each backend's default.

    Args:
        problems: what to tune; a problem of another device or of other torch flags is left, with a reason.
        budget_s: as for ``tune``, like every setting down to ``workers``.
        trials: most configurations of each backend.
        storage: URL of Optuna's trials.
        progress: whether to show a bar.
        force: whether to tune what is known.
        database: where to write.
        seed: of operands and samplers.
        workers: processes that compile ahead.
        note: a sentence for the result to carry.
    """
    _check_settings(budget_s, trials, workers)
    start = monotonic()
    if database is not None:
        records.use_database(database)
    unique = {problem.key(): problem for problem in problems}
    session = _Session(list(unique.values()), force=force)
    try:
        session.run(budget_s, trials, storage, progress, seed, workers)
    except KeyboardInterrupt:
        session.interrupted = True
    finally:
        session.forget_plans()
    return session.result(monotonic() - start, note)


class _Session:
    """The rows so far. Whatever ends a session, they are true."""

    def __init__(self, problems: list[Problem], *, force: bool) -> None:
        self.problems = problems
        self.rows: dict[Problem, TuneRow] = {}
        self.interrupted = False
        self.writable = True
        self.written = 0
        for problem in problems:
            reason = not_here(problem)
            known = None if force or reason else known_record(problem)
            if reason:
                self.rows[problem] = TuneRow(problem, None, NOT_TUNED + reason)
            elif known is not None:
                self.rows[problem] = TuneRow(problem, known, KNOWN)

    def run(
        self, budget_s: float | None, trials: int | None, url: str | None, progress: bool | None, seed: int,
        workers: int | None,
    ) -> None:  # fmt: skip
        """Tune what is left, the costliest first."""
        todo = sorted((p for p in self.problems if p not in self.rows), key=predicted_us, reverse=True)
        if not todo:
            return
        from tqdm import tqdm

        from adaptconv.tuner.search import open_storage, quiet

        deadline = math.inf if budget_s is None else monotonic() + budget_s
        show = sys.stderr.isatty() if progress is None else progress
        best = 1.0
        bar = tqdm(total=len(todo), desc="tuning", unit="problem", disable=not show, file=sys.stderr)
        with quiet(), compiling(todo, workers) as compiled, bar:
            storage = open_storage(url)
            for place, problem in enumerate(todo):
                left = deadline - monotonic()
                if place and left < LEAST_S / 2:  # the first is tuned even if what came before it took all the time
                    self.rows[problem] = TuneRow(problem, None, f"{NOT_TUNED}the time budget ran out")
                    continue
                bar.set_description_str(_short(str(problem)))
                compiled(problem, min(_COMPILE_S, 0.5 * left / (len(todo) - place)))
                left = deadline - monotonic()
                share = PROBLEM_S if budget_s is None else max(0.0, min(left, max(LEAST_S, left / (len(todo) - place))))
                row = self.rows[problem] = self._tuned(problem, share, trials, storage, seed)
                best = max(best, row.gain or 1.0)
                bar.set_postfix_str(f"best gain {best:.3g}x", refresh=False)
                bar.update()

    def _tuned(self, problem: Problem, share: float, trials: int | None, storage: Any, seed: int) -> TuneRow:
        device = torch.device(problem.device.kind)
        try:
            record = contest.hold(problem, device, budget_s=share, trials=trials, storage=storage, seed=seed)
        except contest.NoBaseline as failure:
            return TuneRow(problem, None, f"{NOT_TUNED}plain torch cannot run it ({failure})")
        except Exception as failure:  # noqa: BLE001 - one problem may not cost the others their result
            _LOG.warning("could not tune %s", problem, exc_info=True)
            return TuneRow(problem, None, f"{NOT_TUNED}{type(failure).__name__}: {failure}")
        _LOG.info("%s: %s@%s, %.2fx", problem, record.backend, record.version, gain(record))
        self._write(record)
        return TuneRow(problem, record, TUNED)

    def _write(self, record: Record) -> None:
        if not self.writable:
            return
        try:
            records.default_store().write(record)
            self.written += 1
        except DatabaseError as failure:
            self.writable = False
            text = f"{failure}. Tuning goes on and returns its results, but they are not kept."
            warnings.warn(text, DatabaseWarning, stacklevel=2)

    def forget_plans(self) -> None:
        """Have compiled graphs compile anew with what was found; there are none where dynamo was never used."""
        if self.written and "torch._dynamo" in sys.modules:
            import adaptconv.compile.optimize as compiling

            compiling.forget_compiled()

    def result(self, seconds: float, note: str) -> TuneResult:
        """The session's outcome."""
        untried = "interrupted" if self.interrupted else "the session ended early"
        rows = tuple(self.rows.get(p) or TuneRow(p, None, NOT_TUNED + untried) for p in self.problems)
        database: Path | None = records.default_store().target if self.writable else None
        if not rows and not note:
            note = "there are no problems, so there is nothing to tune"
        return TuneResult(rows, seconds, self.interrupted, database, note)


def known_record(problem: Problem) -> Record | None:
    """The current record of exactly this problem, if this process can run what it names."""
    hit = records.default_store().lookup(problem)
    if hit is None or hit.record.backend not in backend_names():
        return None
    if hit.record.version != backend_named(hit.record.backend).version:
        return None
    choice = Choice(hit.record.backend, hit.record.version, Config(hit.record.config))
    try:
        plan_from_choice(problem, choice, Source.RECORD, "known")
    except AdaptConvError:
        return None
    return hit.record


def not_here(problem: Problem) -> str | None:
    """Why a problem cannot be measured in this process as it is set up; None if it can."""
    kind = problem.device.kind
    device = torch.device(kind)
    if kind != "cpu" and not getattr(torch, kind).is_available():
        return f"there is no {kind} device here"
    here = Device.of(device)
    if here != problem.device:
        return f"it belongs to {problem.device}, and this is {here}"
    precision, deterministic = fp32_precision(problem.torch_dtype, device), torch.are_deterministic_algorithms_enabled()
    if (precision, deterministic) != (problem.fp32_precision, problem.deterministic):
        return "torch's float32 precision or determinism flags are not those of the problem"
    if not len(problem.taps) or 0 in (*problem.input_shape, *problem.output_shape):
        return "there is nothing to compute"
    return None


def predicted_us(problem: Problem) -> float:
    """The predicted time of what a user would write by hand; only the order matters."""
    choices = entrants.by_hand(problem)
    return min(backend_named(choice.backend).cost(problem, choice.config) for choice in choices)


def _check_settings(budget_s: float | None, trials: int | None, workers: int | None) -> None:
    if budget_s is not None and not 0 < budget_s < math.inf:
        raise TuneError(f"budget_s is a number of seconds above 0, or None; got {budget_s!r}")
    if trials is not None and (isinstance(trials, bool) or not isinstance(trials, int) or trials < 1):
        raise TuneError(f"trials is a whole number of at least 1, or None; got {trials!r}")
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise TuneError(f"workers is a whole number of processes, 0 for none, or None; got {workers!r}")


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."
