"""Kernels compiled ahead of their first launch, in processes beside this one.

A kernel takes about a second to compile and a tenth of a millisecond to run: a tuner that compiles what it times
spends its minutes in the compiler. Problems share kernels, too: those of a whole network in every configuration need
some hundreds of them.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from adaptconv.backends.base import Choice
from adaptconv.backends.triton.compiler_process import Kernel, Target
from adaptconv.problem import Problem

_LOG = logging.getLogger("adaptconv.backends.triton")
_MOST = 16  # processes: each holds a torch of its own, a few hundred MiB
_PROCESSES = 8  # that a thread starts in place of those that ended
_AT_ONCE = 64  # configurations asked of a process in one request


def processes() -> int:
    """How many processes may compile beside this one: one less than it may use processors, at most sixteen."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a container's share: "microseconds period", or "max period"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        usable = min(usable, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return min(_MOST, max(usable - 1, 0))


def target_here() -> Target:
    """The GPU that Triton compiles for in this process.

    Raises:
        RuntimeError: there is none.
    """
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return Target(target.backend, target.arch, target.warp_size)


class Ahead:
    """Compiles what problems will need, in the order they were added, until it is closed.

    What fails here is only logged: the process that launches the kernel compiles it itself, and says what is wrong.

    Args:
        target: what to compile for.
        workers: how many processes.
    """

    def __init__(self, target: Target, workers: int) -> None:
        self._target = target
        self._jobs: queue.PriorityQueue[tuple[int, int, Any]] = queue.PriorityQueue()
        self._turn = itertools.count()
        self._state = threading.Condition()
        self._open: dict[int, int] = {}  # by place, jobs that are not done
        self._kernels: dict[Kernel, list[int]] = {}  # places that wait for it; none once it is compiled
        self._compiled = 0
        self._children: list[subprocess.Popen[bytes]] = []
        self._closed = False
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether it has stopped."""
        return self._closed

    @property
    def compiled(self) -> int:
        """How many kernels were."""
        with self._state:
            return self._compiled

    def add(self, place: int, wanted: Iterable[tuple[Problem, Choice]]) -> None:
        """Have the kernels of these compiled; those of a lower place come first.

        Args:
            place: also what ``wait`` takes.
            wanted: problems and choices of Triton's backends.
        """
        pairs = list(wanted)
        for start in range(0, len(pairs), _AT_ONCE):
            self._put(place, pairs[start : start + _AT_ONCE])

    def wait(self, place: int, timeout_s: float) -> bool:
        """Wait until everything added at a place is compiled; False if time was up before."""
        end = monotonic() + timeout_s
        with self._state:
            while self._open.get(place) and not self._closed and any(t.is_alive() for t in self._threads):
                left = end - monotonic()
                if left <= 0:
                    return False
                self._state.wait(min(left, 0.5))
            return not self._open.get(place)

    def close(self) -> None:
        """Stop, whatever is left to do."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        for child in self._children:
            child.kill()
        for _ in self._threads:
            self._jobs.put((-1, next(self._turn), None))
        for thread in self._threads:
            thread.join(timeout=5)

    # ---- jobs ---------------------------------------------------------------------------------

    def _put(self, place: int, job: Kernel | Sequence[tuple[Problem, Choice]]) -> None:
        with self._state:
            self._open[place] = self._open.get(place, 0) + 1
        self._jobs.put((place, next(self._turn), job))

    def _serve(self) -> None:
        """Keep one process busy, another where it ends."""
        for _ in range(_PROCESSES):
            job: tuple[int, int, Any] | None = None
            child = None
            try:
                child = self._started()
                assert child.stdin is not None
                assert child.stdout is not None
                pickle.dump(self._target, child.stdin)
                while not self._closed:
                    job = self._jobs.get()
                    if job[2] is None:
                        return
                    pickle.dump(job[2], child.stdin)
                    child.stdin.flush()
                    reply = pickle.load(child.stdout)
                    self._finish(job[0], job[2], reply)
                    job = None
                return
            except Exception as failure:  # noqa: BLE001 - a process may end in any way; nobody may wait for it then
                if self._closed:
                    return
                _LOG.info("a process that compiles kernels ended: %s", failure)
            finally:
                if job is not None and job[2] is not None:
                    self._finish(job[0], job[2], "its process ended")
                if child is not None:
                    child.kill()
                    child.wait()
                with self._state:
                    self._state.notify_all()

    def _started(self) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        child = subprocess.Popen(
            [sys.executable, "-m", "adaptconv.backends.triton.compiler_process"], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        with self._state:
            self._children.append(child)
            closed = self._closed
        if closed:
            child.kill()
        return child

    def _finish(self, place: int, job: Any, reply: Any) -> None:
        if isinstance(reply, str):
            _LOG.info("not compiled ahead: %s", reply)
        found: list[Kernel] = []
        with self._state:
            if isinstance(job, Kernel):
                self._compiled += not isinstance(reply, str)
                for waiting in self._kernels[job]:
                    self._open[waiting] -= 1
                self._kernels[job] = []
            else:
                for kernel in reply if isinstance(reply, list) else ():
                    if kernel not in self._kernels:
                        self._kernels[kernel] = [place]
                        found.append(kernel)
                    elif self._kernels[kernel] and place not in self._kernels[kernel]:
                        if place < min(self._kernels[kernel]):
                            found.append(kernel)  # again, at its new place: the second time it lies in the cache
                        self._kernels[kernel].append(place)
                    else:
                        continue
                    self._open[place] += 1
                self._open[place] -= 1
            self._state.notify_all()
        for kernel in found:
            self._jobs.put((place, next(self._turn), kernel))
