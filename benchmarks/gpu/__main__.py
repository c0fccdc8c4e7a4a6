"""Check, tune and time everything on a GPU in one call: ``python -m benchmarks.gpu --out DIR --minutes 9``.

In this order, each with its share of the minutes:

1. limits: copy bandwidth and matrix product, per dtype;
2. check: every backend x case x direction x dtype against float64, the Triton kernels first;
3. tune: the workload suite in every direction and layout, into a pack that ``tuning_db/`` takes;
4. time: our plans against cuDNN in both layouts (``cudnn.benchmark`` on), dense-constructed kernels, sums of
   convolutions and, with ``--rivals compile``, torch.compile; device time from graph replays, caches emptied between;
5. train: a training step of ConvNeXt-T-dcls against the same network with plain convolutions.

Files are written as the work goes on, so a call that is cut off loses its last row at most; ``--continue DIR`` takes up
an earlier one. Needs torch, triton, numpy, tabulate and Optuna, nothing else. On a CPU (``--device cpu``) it runs too,
to try it out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from adaptconv import records
from adaptconv.problem import Device, Direction
from benchmarks.facts import machine_facts, write_results
from benchmarks.gpu import checks, rows, training
from benchmarks.layers.tensors import DIRECTIONS, problems_of
from benchmarks.limits import rates
from benchmarks.suites import SUITES, Layer

STEPS = ("check", "tune", "time", "train")
_SHARES = {"check": 0.25, "tune": 0.4, "time": 0.27, "train": 0.08}
_MARGIN_S = 20.0  # of the minutes, for what a step finishes after its time is up


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, print the tables last; 1 if a result is wrong."""
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    campaign = Campaign(arguments, device)
    for step in STEPS:
        if step in arguments.steps:
            print(f"== {step}", flush=True)
            getattr(campaign, step)(campaign.deadline(step))
    print(campaign.tables(), flush=True)
    return 1 if campaign.is_wrong else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all files")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (9)")
    parser.add_argument("--continue", type=Path, dest="earlier", metavar="DIR", help="take up what is in this folder")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="these alone")
    parser.add_argument("--suite", choices=sorted(SUITES), default="gpu")
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="these layers of the suite")
    parser.add_argument("--directions", nargs="+", choices=list(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--rivals", choices=("eager", "compile"), default="eager", help="compile is slow to start")
    parser.add_argument("--seconds", type=float, default=0.5, help="timing a row (0.5)")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args(argv)
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu tries the command out, and its figures mean nothing")
    return arguments


class Campaign:
    """The files of one campaign, and what fills them."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.arguments, self.device = arguments, device
        self.end = monotonic() + 60 * arguments.minutes - _MARGIN_S
        self.folder: Path = arguments.out
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [layer.name for layer in SUITES[arguments.suite]]
        if unknown := sorted(set(arguments.only or ()) - set(names)):
            sys.exit(f"suite {arguments.suite} has no layer {', '.join(unknown)}; it has {', '.join(names)}")
        self.layers: list[Layer] = [
            layer for layer in SUITES[arguments.suite] if not arguments.only or layer.name in arguments.only
        ]
        self.directions: list[Direction] = [DIRECTIONS[name] for name in arguments.directions]
        self.facts = machine_facts(device)
        self.limits = {dtype: rates(device, dtype, 0.5) for dtype in ("bfloat16", "float32")}
        print(json.dumps({"machine": self.facts, "limits": self.limits}, indent=1), flush=True)
        self._database = tempfile.TemporaryDirectory(prefix="adaptconv-campaign-")
        records.use_database(self._database.name)
        self.checks: list[dict[str, Any]] = self._earlier("checks.json")
        self.rows: list[dict[str, Any]] = self._earlier("rows.json")
        self.steps: list[dict[str, Any]] = self._earlier("training.json")
        pack = None if arguments.earlier is None else arguments.earlier / f"{Device.of(device).slug}.json"
        if pack is not None and pack.exists():
            for record in records.merge(pack).records:
                records.default_store().write(record)

    def _earlier(self, name: str) -> list[dict[str, Any]]:
        folder = self.arguments.earlier
        if folder is None or not (folder / name).exists():
            return []
        found: list[dict[str, Any]] = json.loads((folder / name).read_text(encoding="utf-8"))["rows"]
        return found

    def deadline(self, step: str) -> float:
        """When a step must stop: its share of what is left among the steps still to come."""
        coming = [s for s in STEPS[STEPS.index(step) :] if s in self.arguments.steps]
        left: float = self.end - monotonic()
        return monotonic() + left * _SHARES[step] / sum(_SHARES[s] for s in coming)

    def _write(self, name: str, found: Sequence[dict[str, Any]]) -> None:
        write_results(self.folder / name, self.device, facts=self.facts, limits=self.limits, rows=found)

    # ---- steps --------------------------------------------------------------------------------

    def check(self, deadline: float) -> None:
        """Correctness of every backend."""
        self.checks = checks.run(
            self.device, deadline, self.checks, lambda found: self._write("checks.json", found)
        )  # fmt: skip
        print(checks.summary(self.checks), flush=True)

    def tune(self, deadline: float) -> None:
        """Records of the suite, its layers one by one so that a cut-off run keeps what is done."""
        from adaptconv.tuner import tune_problems

        for place, layer in enumerate(self.layers):
            left = deadline - monotonic()
            if left <= 0:
                break
            problems = [p for d in self.directions for p in problems_of(layer, d, self.device).values()]
            result = tune_problems(problems, budget_s=left / (len(self.layers) - place), progress=False)
            print(f"{layer.name}: {str(result).splitlines()[0]}", flush=True)
            here = f"@{Device.of(self.device).slug}"
            found = (hit.record for hit in records.default_store().records() if hit.record.key.endswith(here))
            records.write_packs(found, self.folder)

    def time(self, deadline: float) -> None:
        """Rows against torch."""
        self.rows = rows.run(
            self.layers, self.directions, self.device, self.limits["bfloat16"], deadline=deadline,
            level=self.arguments.rivals, seconds=self.arguments.seconds, old=self.rows,
            write=lambda found: self._write("rows.json", found),
        )  # fmt: skip

    def train(self, deadline: float) -> None:
        """Training steps of ConvNeXt-T-dcls."""
        self.steps = training.run(self.device, deadline, self.steps, lambda found: self._write("training.json", found))

    # ---- result -------------------------------------------------------------------------------

    @property
    def is_wrong(self) -> bool:
        """Whether any result was."""
        return any(check["wrong"] for check in self.checks) or any(row["wrong"] for row in self.rows)

    def tables(self) -> str:
        """Everything, most telling last."""
        return "\n\n".join(
            part for part in (checks.summary(self.checks), training.table(self.steps), rows.table(self.rows)) if part
        )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    raise SystemExit(main())
