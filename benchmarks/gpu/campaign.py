"""The campaign's worker: one process, one device, the steps in their order, every file written as it grows."""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from adaptconv import records
from adaptconv.measure import product_gflop_s
from adaptconv.problem import Device, Direction, Problem
from adaptconv.tuner import tune_problems
from adaptconv.tuner.compiling import compiling
from benchmarks.facts import machine_facts, write_results
from benchmarks.gpu import checks, rows, training
from benchmarks.gpu.steps import CRASHES, DEAD, FAILURES, FILES, STEPS, begin, crashed, read_rows
from benchmarks.layers.tensors import DIRECTIONS, problems_of
from benchmarks.suites import MUST_SHOW, SUITES

_SHARES = {"check": 0.22, "tune": 0.43, "time": 0.25, "train": 0.1}
_COMPILE_S = 20.0  # at most, waited for the kernels of one problem
_PROBLEM_S = 3.0  # most for one problem while others wait
_KINDS = ("depthwise", "other", "control")


class Campaign:
    """The files of one campaign, and what fills them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        self.folder = arguments.out
        self.layers = sorted(
            (layer for layer in SUITES[arguments.suite] if not arguments.only or layer.name in arguments.only),
            key=lambda layer: (layer.name not in MUST_SHOW, _KINDS.index(layer.kind)),
        )
        self.directions: list[Direction] = [DIRECTIONS[name] for name in arguments.directions]
        self.slug = Device.of(self.device).slug
        self.found = {step: read_rows(arguments.earlier, name) for step, name in FILES.items()}
        self.crashes = read_rows(arguments.earlier, CRASHES)
        self._note_crashes()
        self.facts, self.limits = self._measured()
        print(json.dumps({"machine": self.facts, "limits": self.limits}, indent=1), flush=True)
        self._database = tempfile.TemporaryDirectory(prefix="adaptconv-campaign-")
        records.use_database(self._database.name)
        pack = arguments.earlier / f"{self.slug}.json"
        if pack.exists():
            for record in records.merge(pack).records:
                records.default_store().write(record)
        logging.getLogger("adaptconv.tuner").addHandler(_Discards(self))

    def run(self) -> None:
        """Every step that is asked for, as long as there is time."""
        checked = list(checks.suite_problems(self.layers, self.device)) if "check" in self.arguments.steps else []
        cases = list(checks.case_problems(self.device)) if "check" in self.arguments.steps else []
        tuned = self._tuning_problems()
        ahead = [*(problem for _, problem in checked), *tuned, *(problem for _, problem in cases)]
        with compiling(ahead, self.arguments.workers) as compiled:
            for step in STEPS:
                if step not in self.arguments.steps:
                    continue
                print(f"== {step}, {self._left():.0f} s left", flush=True)
                torch.backends.cudnn.benchmark = step != "check" and self.device.type == "cuda"
                with self.survived(step):
                    if step == "check":
                        self._check([*checked, *cases], self.deadline(step), compiled)
                    elif step == "tune":
                        self._tune(tuned, self.deadline(step), compiled)
                    else:
                        getattr(self, f"_{step}")(self.deadline(step))

    def deadline(self, step: str) -> float:
        """When a step must stop, by ``time.monotonic``: its share of what is left among the steps still to come."""
        coming = [s for s in STEPS[STEPS.index(step) :] if s in self.arguments.steps]
        return time.monotonic() + self._left() * _SHARES[step] / sum(_SHARES[s] for s in coming)

    def _left(self) -> float:
        return max(0.0, float(self.arguments.worker) - time.time())

    # ---- what goes wrong ----------------------------------------------------------------------

    @contextmanager
    def survived(self, *item: str) -> Iterator[None]:
        """Whatever is raised is written down; where the device answers no more, this process ends."""
        try:
            yield
        except Exception:  # noqa: BLE001 - one item may not cost the others their result
            self.failed(*item)

    def failed(self, *item: str) -> None:
        """Write down the exception that is being handled, and end the process if the device went with it."""
        with (self.folder / FAILURES).open("a", encoding="utf-8") as file:
            file.write(f"---- {' '.join(item)}\n{traceback.format_exc()}\n")
        self.alive()

    def alive(self) -> None:
        """End this process if no call on the device works any more: the one that started it begins another."""
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            for step in FILES:
                self._write(step)
            self._write_pack()
            os._exit(DEAD)

    def _note_crashes(self) -> None:
        known = {checks.key_of(row) for row in self.found["check"]}
        for key, how in crashed(self.crashes, "check").items():
            if len(key) == 5 and key not in known:
                self.found["check"].append(asdict(checks.Check(*key, -1.0, 0.0, True, f"the process {how}")))

    # ---- steps --------------------------------------------------------------------------------

    def _measured(self) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        facts = machine_facts(self.device)
        limits: Any = facts["limits"]
        half = product_gflop_s(self.device, torch.bfloat16, 0.5)
        return facts, {"float32": limits, "bfloat16": {**limits, "gemm_gflop_s": half}}

    def _write(self, step: str) -> None:
        write_results(
            self.folder / FILES[step], self.device, facts=self.facts, limits=self.limits, rows=self.found[step]
        )  # fmt: skip

    def _check(self, problems: Sequence[tuple[str, Problem]], deadline: float, compiled: Any) -> None:
        """Correctness of every backend."""
        try:
            checks.run(
                problems, self.device, deadline, self.found["check"], compiled, self.failed, self.alive,
                lambda: self._write("check"),
            )  # fmt: skip
        finally:
            self._write("check")
            print(checks.summary(self.found["check"], most=4), flush=True)

    def _tuning_problems(self) -> list[Problem]:
        """Of every layer in every layout, forward of all first."""
        if "tune" not in self.arguments.steps:
            return []
        return [
            p for d in self.directions for layer in self.layers for p in problems_of(layer, d, self.device).values()
        ]

    def _tune(self, problems: Sequence[Problem], deadline: float, compiled: Any) -> None:
        """Records of the suite, problem by problem so that a cut-off run keeps what is done."""
        crashes = crashed(self.crashes, "tune")
        done = 0
        for place, problem in enumerate(problems):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            if (problem.key(),) in crashes:
                continue
            begin("tune", problem.key())
            compiled(problem, min(_COMPILE_S, 0.25 * left))
            left = deadline - time.monotonic()
            budget_s = max(0.5, min(_PROBLEM_S, left / (len(problems) - place)))
            with self.survived("tune", problem.key()):
                result = tune_problems([problem], budget_s=budget_s, progress=False)
                row = result.rows[0]
                done += row.record is not None
                if row.status == "tuned" and row.record is not None:
                    print(f"{problem}: {row.record.backend}, {row.gain or 1:.2f}x, {result.seconds:.1f} s", flush=True)
            self.alive()
            self._write_pack()
        print(f"{done} of {len(problems)} problems have records", flush=True)

    def _write_pack(self) -> None:
        here = f"@{self.slug}"
        found = (hit.record for hit in records.default_store().records() if hit.record.key.endswith(here))
        records.write_packs(found, self.folder)

    def _time(self, deadline: float) -> None:
        """Rows against torch."""
        rows.run(
            self.layers, self.directions, self.device, self.limits, deadline=deadline,
            level=self.arguments.rivals, seconds=self.arguments.seconds, rows=self.found["time"],
            write=lambda: self._write("time"), skip=crashed(self.crashes, "time"), alive=self.alive,
        )  # fmt: skip
        print(rows.means(self.found["time"]), flush=True)

    def _train(self, deadline: float) -> None:
        """Training steps of ConvNeXt-T-dcls."""
        training.run(
            self.device, deadline, self.found["train"], write=lambda: self._write("train"),
            skip=crashed(self.crashes, "train"), failed=self.failed,
        )  # fmt: skip
        self._write_pack()

    # ---- the tuner's own checks ---------------------------------------------------------------

    def discard(self, choice: object, problem: Problem, reason: object) -> None:
        """A candidate that the tuner found wrong is a check that failed."""
        self.found["check"].append(
            asdict(
                checks.Check(
                    str(problem), str(problem.direction), problem.dtype, problem.layout, str(choice), -1.0, 0.0, True,
                    f"while tuning: {reason}",
                )
            )
        )  # fmt: skip
        self._write("check")


class _Discards(logging.Handler):
    """Hears the tuner's warnings of wrong results."""

    def __init__(self, campaign: Campaign) -> None:
        super().__init__(logging.WARNING)
        self._campaign = campaign

    def emit(self, record: logging.LogRecord) -> None:
        """One warning."""
        if str(record.msg).startswith("discarded") and isinstance(record.args, tuple) and len(record.args) == 3:
            choice, problem, reason = record.args
            if isinstance(problem, Problem):
                self._campaign.discard(choice, problem, reason)
