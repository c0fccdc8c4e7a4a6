"""Every backend on the device against float64, most telling problems first, until time is up."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from adaptconv.backends import BACKENDS, Backend, Choice
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Direction, Problem
from adaptconv.tuner.bench import Bench, Discarded
from adaptconv.tuner.entrants import by_hand, promising
from benchmarks.gpu.steps import begin
from benchmarks.layers.tensors import layouts_of
from benchmarks.suites import Layer
from tests.cases import CASES

_DTYPES = ("bfloat16", "float32", "float16")
_BATCH = 4  # of a layer of the suite
_TRIED = 3  # configurations of a Triton backend, best predicted first
PREPARING = "what comes before its checks"  # in place of a choice
_WRITE_S = 3.0  # between writing the rows: what is lost where the process is killed
_COMPILE_S = 30.0  # waited for a problem's kernels
_FIRST = ("sparse", "depthwise", "banded")  # what a GPU has yet to confirm


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    Attributes:
        case, direction, dtype, layout: the problem.
        choice: what ran.
        error: relative L2 error against float64; negative where nothing came back.
        allowed: what torch's own error allows.
        wrong: whether the result is wrong, or the candidate failed.
        reason: why, in words.
    """

    case: str
    direction: str
    dtype: str
    layout: str
    choice: str
    error: float
    allowed: float
    wrong: bool
    reason: str

    @property
    def key(self) -> tuple[str, ...]:
        """What it is a check of."""
        return self.case, self.direction, self.dtype, self.layout, self.choice


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row is a check of."""
    return row["case"], row["direction"], row["dtype"], row["layout"], row["choice"]


def suite_problems(layers: Sequence[Layer], device: torch.device) -> Iterator[tuple[str, Problem]]:
    """The layers at a small batch, in every direction and layout: kernels take other forms on full-size layers."""
    for layer, direction in itertools.product(layers, Direction):
        for layout in layouts_of(layer):
            problem = layer.problem(direction, layout, device)
            yield layer.name, replace(problem, batch=min(problem.batch, _BATCH))


def case_problems(device: torch.device) -> Iterator[tuple[str, Problem]]:
    """Cases in every direction, dtype and layout, on a device."""
    here = Device.of(device)
    for dtype, layout, direction in itertools.product(_DTYPES, ("contiguous", "channels_last"), Direction):
        torch_dtype = getattr(torch, dtype)
        for case in CASES:
            if layout == "channels_last" and len(case.spatial) == 1:
                continue
            problem = case.problem(direction, torch_dtype, layout)
            if not len(problem.taps):
                continue
            yield case.name, replace(problem, device=here, fp32_precision=fp32_precision(torch_dtype, device))


def run(
    problems: Sequence[tuple[str, Problem]], device: torch.device, deadline: float, rows: list[dict[str, Any]],
    compiled: Callable[[Problem, float], None], failed: Callable[..., None], alive: Callable[[], None],
    write: Callable[[], None],
) -> None:  # fmt: skip
    """Check until the deadline: the Triton kernels at what is tried first, then every backend, then other knobs.

    Args:
        problems: by name; those of the same name in turn.
        device: where.
        deadline: by ``time.monotonic``.
        rows: those of an earlier run, which are not repeated; the new ones are added as they come.
        compiled: waits for a problem's kernels, at most so many seconds.
        failed: called with what was being done where it raised.
        alive: called after each problem.
        write: called every few seconds.
    """
    written = time.monotonic()
    known = {key_of(row) for row in rows}
    ordered = sorted(BACKENDS, key=lambda backend: backend.name not in _FIRST)
    passes = ((ordered[: len(_FIRST)], False), (ordered[len(_FIRST) :], False), (ordered[: len(_FIRST)], True))
    for backends, spread in passes:
        for name, problem in problems:
            if time.monotonic() > deadline:
                return
            item = (name, str(problem.direction), problem.dtype, problem.layout, PREPARING)
            if item in known:
                continue  # it ended a process
            begin("check", *item)
            compiled(problem, _COMPILE_S)
            try:
                for check in of_problem(name, problem, backends, device, known, spread=spread):
                    rows.append(asdict(check))
                    known.add(check.key)
                    if check.wrong:
                        alive()  # or what comes next would be blamed too
            except Exception:  # noqa: BLE001 - torch itself may refuse a problem
                failed("check", name, str(problem))
            alive()
            if time.monotonic() > written + _WRITE_S:
                write()
                written = time.monotonic()


def of_problem(
    name: str, problem: Problem, backends: Sequence[Backend], device: torch.device, known: set[tuple[str, ...]], *,
    spread: bool,
) -> Iterator[Check]:  # fmt: skip
    """Checks of one problem: what is tried first, or with ``spread`` each knob's other values."""
    choices = [
        choice
        for backend in backends
        if not backend.rejects(problem)
        for choice in _choices(backend, problem, spread)
        if (name, str(problem.direction), problem.dtype, problem.layout, str(choice)) not in known
    ]
    if not choices:
        return
    bench = Bench(problem, device)
    bench.set_baseline(by_hand(problem)[0])
    for choice in choices:
        error, wrong, reason = -1.0, False, ""
        begin("check", name, str(problem.direction), problem.dtype, problem.layout, str(choice))
        try:
            error, _ = bench.check(choice)
        except Discarded as failure:
            wrong, reason = True, str(failure)
        yield Check(
            name, str(problem.direction), problem.dtype, problem.layout, str(choice), error, bench.limit, wrong, reason
        )


def _choices(backend: Backend, problem: Problem, spread: bool) -> list[Choice]:
    default = backend.default(problem)
    if not spread:
        ours = isinstance(backend, TritonBackend)
        configs = (promising(problem, backend)[:_TRIED] if ours else ()) or (default.config,)
        return [replace(default, config=config) for config in configs]
    space = backend.space(problem)
    return [
        replace(default, config=space.complete({**default.config, knob.name: value}))
        for knob in space.knobs
        for value in knob.values
        if value != default.config[knob.name]
    ]


def summary(rows: Sequence[dict[str, Any]], most: int = 5) -> str:
    """How many checks of each backend, how many wrong, and the first wrong ones."""
    lines = []
    for backend in BACKENDS:
        mine = [row for row in rows if row["choice"].startswith(f"{backend.name}@")]
        if mine:
            wrong = [row for row in mine if row["wrong"]]
            lines.append(f"{backend.name:10} {len(mine):6} checks, {len(wrong)} wrong")
            lines += [
                f"    {row['case']} {row['direction']} {row['dtype']} {row['layout']} {row['choice']}: {row['reason']}"
                for row in wrong[:most]
            ]
    return "\n".join(lines)
