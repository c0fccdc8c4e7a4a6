"""Every backend x case x direction x dtype on the device against float64, most telling first, until time is up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import Any

import torch

from adaptconv.backends import BACKENDS, Backend, Choice
from adaptconv.problem import Device, Direction, Problem, fp32_precision
from adaptconv.tuner.bench import Bench, Discarded
from adaptconv.tuner.entrants import by_hand
from tests.cases import CASES

_DTYPES = ("bfloat16", "float32", "float16")
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


def problems(device: torch.device) -> Iterator[tuple[str, Problem]]:
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


def run(device: torch.device, deadline: float, old: Sequence[dict[str, Any]], write: Any) -> list[dict[str, Any]]:
    """Check until the deadline; ``write(rows)`` is called now and then, and at the end.

    Args:
        device: where.
        deadline: by ``time.monotonic``.
        old: rows of an earlier run, not repeated.
        write: what keeps the rows.
    """
    rows = list(old)
    known: set[tuple[str, ...]] = {(r["case"], r["direction"], r["dtype"], r["layout"], r["choice"]) for r in rows}
    ordered = sorted(BACKENDS, key=lambda backend: backend.name not in _FIRST)
    spoken = monotonic()
    for backends, spread in ((ordered[: len(_FIRST)], False), (ordered[len(_FIRST) :], False), (ordered, True)):
        for name, problem in problems(device):
            for check in of_problem(name, problem, backends, device, known, spread=spread):
                rows.append(asdict(check))
                known.add(check.key)
                if monotonic() > spoken + 5:
                    spoken = monotonic()
                    write(rows)
            if monotonic() > deadline:
                write(rows)
                return rows
    write(rows)
    return rows


def of_problem(
    name: str, problem: Problem, backends: Sequence[Backend], device: torch.device, known: set[tuple[str, ...]], *,
    spread: bool,
) -> Iterator[Check]:  # fmt: skip
    """Checks of one problem: the defaults, or with ``spread`` each knob's other values."""
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
        return [default]
    space = backend.space(problem)
    return [
        replace(default, config=space.complete({**default.config, knob.name: value}))
        for knob in space.knobs
        for value in knob.values
        if value != default.config[knob.name]
    ]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many checks of each backend, how many wrong, and the first wrong ones."""
    lines = []
    for backend in BACKENDS:
        mine = [row for row in rows if row["choice"].startswith(f"{backend.name}@")]
        if mine:
            wrong = [row for row in mine if row["wrong"]]
            lines.append(f"{backend.name:10} {len(mine):6} checks, {len(wrong)} wrong")
            lines += [
                f"    {row['case']} {row['direction']} {row['dtype']} {row['layout']} {row['choice']}: {row['reason']}"
                for row in wrong[:5]
            ]
    return "\n".join(lines)
