"""What a session is about to try on a GPU, compiled while it times what came before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from adaptconv.backends import Choice
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.problem import Problem
from adaptconv.tuner.entrants import contenders, promising

if TYPE_CHECKING:
    from adaptconv.backends.triton.ahead import Ahead

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
        _active = ahead.Ahead(ahead.target_here(), count)
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
        backends = _backends(problem)
        active.add(
            place,
            [(problem, Choice(b.name, b.version, config)) for b in backends for config in promising(problem, b)],
        )
        every = [
            (problem, Choice(b.name, b.version, config)) for b in backends for config in list(b.space(problem))[:_MOST]
        ]
        active.add(_LATER + place, every)


def _wait(problem: Problem, seconds: float) -> None:
    if _active is not None and problem in _places:
        _active.wait(_places[problem], seconds)


def _backends(problem: Problem) -> list[TritonBackend]:
    return [backend for backend in contenders(problem) if isinstance(backend, TritonBackend)]
