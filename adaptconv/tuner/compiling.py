"""What a session is about to try on a GPU, compiled while it times what came before."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adaptconv.backends import Choice, Config
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.problem import Problem
from adaptconv.tuner.entrants import contenders, promising

if TYPE_CHECKING:
    from adaptconv.backends.triton.ahead import Ahead

_LOG = logging.getLogger("adaptconv.tuner")

Wait = Callable[[Problem, float], None]

_MOST = 512  # configurations of a backend compiled at all
_LATER = 1 << 20  # the place of what follows once every problem's promising ones are compiled

_active: Ahead | None = None
_places: dict[Problem, int] = {}  # of the active one


@contextmanager
def compiling(problems: Sequence[Problem], workers: int | None = None) -> Iterator[Wait]:
    """Compile the problems' kernels in processes beside this one, in the problems' order, while the block runs.

    A block inside another one uses the processes of that one.

    Args:
        problems: what will be tuned.
        workers: how many processes; None for one less than there are processors. 0 compiles nothing ahead.

    Yields:
        ``wait(problem, seconds)``: returns when what is tried first of a problem is compiled, or time is up.
    """
    global _active
    from adaptconv.backends.triton import ahead

    wanted = [problem for problem in problems if problem.device.kind != "cpu" and _backends(problem)]
    count = ahead.processes() if workers is None else workers
    owned = _active is None
    if wanted and count and owned:
        try:
            _active = ahead.Ahead(ahead.target_here(), count)
        except Exception:  # noqa: BLE001 - Triton needs a C compiler to ask the driver; other backends do not
            _LOG.info("kernels are not compiled ahead", exc_info=True)
        _places.clear()
    try:
        if _active is not None:
            _add(_active, wanted)
        yield _wait
    finally:
        if owned and _active is not None:
            _active.close()
            _active = None


def _add(active: Ahead, problems: Sequence[Problem]) -> None:
    fresh = [problem for problem in dict.fromkeys(problems) if problem not in _places]
    for problem in fresh:
        place = _places[problem] = len(_places)
        active.add(place, [(problem, choice) for choice in _choices(problem, promising)])
    places = dict(_places)

    def others() -> None:
        for problem in fresh:
            if active.closed:
                return
            active.add(_LATER + places[problem], [(problem, choice) for choice in _choices(problem, _every)])

    threading.Thread(target=others, daemon=True).start()  # listing them takes a while


def _wait(problem: Problem, seconds: float) -> None:
    active = _active
    if active is not None and problem in _places:
        active.wait(_places[problem], seconds)


def _choices(problem: Problem, wanted: Callable[[Problem, TritonBackend], Iterable[Config]]) -> list[Choice]:
    return [Choice(b.name, b.version, config) for b in _backends(problem) for config in wanted(problem, b)]


def _every(problem: Problem, backend: TritonBackend) -> Iterable[Config]:
    return itertools.islice(backend.space(problem), _MOST)


def _backends(problem: Problem) -> list[TritonBackend]:
    return [backend for backend in contenders(problem) if isinstance(backend, TritonBackend)]
