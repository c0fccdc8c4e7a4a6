"""Scratch databases that name a way for every site of a model, so that a pass has all of them to rewrite, or none."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptconv import dispatch, records
from adaptconv.backends import Choice, backend_named
from adaptconv.backends.pointwise import is_pointwise
from adaptconv.compile.optimize import collect_sites
from adaptconv.problem import Problem
from adaptconv.records import Record

_SLOWEST = 30.0  # times native's predicted time: past that a way is sound, but not worth waiting for

Chooser = Callable[[Problem], Choice]


def problems_of(module: nn.Module, inputs: Iterable[Tensor], *, train: bool = True) -> list[Problem]:
    """Every problem of a model's sites at these inputs, in either memory format that a graph may have."""
    found: dict[Problem, None] = {}
    for x in inputs:
        for site in collect_sites(module, (x,), train=train):
            for problem in site.problems():
                for layout in dict.fromkeys((problem.layout, site.layout)):
                    found[replace(problem, layout=layout)] = None
    return list(found)


def other_ways() -> Chooser:
    """Chooses at random, the same every time, among the backends other than native that are not far too slow."""
    drawn = random.Random(0)

    def choose(problem: Problem) -> Choice:
        answers = [answer for answer in dispatch.decisions(problem) if answer.choice is not None]
        native = next((a.predicted_us for a in answers if a.backend == "native"), None)
        others = [a for a in answers if a.backend != "native"]
        if is_pointwise(problem) and problem.axes > 1:  # a matrix product as it stands: gathering changes nothing
            others = [a for a in others if a.backend == "dense"]
        elif len(problem.taps) == math.prod(problem.taps.window):  # a window without holes: dense is native's very call
            others = [a for a in others if a.backend != "dense"] or others
        quick = [a for a in others if not native or (a.predicted_us or 0.0) <= _SLOWEST * native]
        choice = drawn.choice(quick or [min(others, key=lambda a: a.predicted_us or 0.0)]).choice
        assert choice is not None
        return choice

    return choose


def native_ways(problem: Problem) -> Choice:
    """Chooses torch's own call; for a sum of convolutions that is the sum as written."""
    for name in ("native", "dual", "dense"):
        backend = backend_named(name)
        if not backend.rejects(problem):
            return backend.default(problem)
    raise AssertionError("dense accepts every problem")


def write_database(folder: Path, problems: Sequence[Problem], choose: Chooser) -> None:
    """Write records that say a way is a hundred times as fast as native, or as fast where it is native."""
    written = []
    for problem in problems:
        choice = choose(problem)
        native_us = 1.0 if choice.backend == "native" else 100.0
        toolchain = records.toolchain(torch.device(problem.device.kind))
        written.append(
            Record(
                key=problem.key(), backend=choice.backend, version=choice.version, config=dict(choice.config),
                native_us=native_us, error=1e-7, native_error=1e-7, toolchain=toolchain,
                measured_on=records.utc_now(),
                p20_us=1.0, median_us=1.0, p80_us=1.0,
            )
        )  # fmt: skip
    records.write_packs(written, folder)
