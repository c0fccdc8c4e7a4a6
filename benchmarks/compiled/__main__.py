"""Whole models, ``optimize`` against plain ``torch.compile``: ``python -m benchmarks.compiled --out FILE``.

Each model is compiled in processes of its own, each with an empty Inductor cache, in evaluation and in training
(forward and backward), first at one input size and then at four others. Three ways: plain torch.compile;
optimize with the database as it is here; "forced", optimize with a database that names, for every convolution, some
backend that is not torch's, whichever accepts it.

What is checked, and ends with the exit status 1 where it does not hold:

  values     error against float64 at most twice the largest of eager's, torch.compile's and that of eager on inputs off
             by a rounding (a ReLU on the other side of zero changes every gradient below it); the table also has the
             distance to eager itself, of the output and of all gradients; forced and run in float64: within 1e-9
  graphs     as many as plain torch.compile's after each size, so no recompilation of its own, and as many graph breaks
  compiling  at most 1.10 times plain torch.compile's seconds plus 2, forward and training each; where a first pair does
             not show that, up to --repeats pairs are taken and the fastest of each side compared
  overhead   (--overhead instead of all this) every plan native: generated code equal to torch.compile's but for
             comments, and the 20th percentile of interleaved calls within 1 % of it; "again" is torch.compile against
             itself, compiled a second time: where that is over 1, it is what ours may take and 1 % more

Three to six minutes a model on two quiet cores, one with --overhead; the file is written after every model, and
--resume goes on. Seconds of a busy machine say little: look at "load_average".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.compiled import rows
from benchmarks.compiled.models import MODELS
from benchmarks.facts import machine_facts, merged, now, read_rows, write_results

_CPU = torch.device("cpu")
_ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Check the models asked for, print the tables, write the file; 1 if anything does not hold."""
    arguments = _arguments(argv)
    facts = machine_facts(_CPU)
    done = _done(arguments.out, facts) if arguments.resume else set()
    what = "overhead" if arguments.overhead else "check"
    found: list[Row] = []
    for name in arguments.only or MODELS:
        needs = MODELS[name].network.needs
        if needs and importlib.util.find_spec(needs) is None:
            _say(f"{name}: left out, the package {needs} is not installed")
        elif (name, what) not in done:
            found.append(_overhead(name, arguments) if arguments.overhead else _checked(name, arguments))
            if arguments.out:
                key = lambda row: (row["model"], row["what"])  # noqa: E731
                write_results(arguments.out, _CPU, facts=facts, rows=merged(read_rows(arguments.out), found, key))
    print(rows.table(found))
    for row in found:
        for reason in row["wrong"]:
            print(f"WRONG: {row['model']}: {reason}")
    return 1 if any(row["wrong"] for row in found) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--sizes", type=int, default=5, choices=range(1, 6), help="input sizes (5)")
    parser.add_argument("--repeats", type=int, default=3, help="most pairs of timed compilations (3)")
    parser.add_argument(
        "--variants", nargs="+", default=list(rows.VARIANTS), choices=rows.VARIANTS, help="not all three"
    )
    parser.add_argument("--overhead", action="store_true", help="compare code and times of all-native plans instead")
    parser.add_argument("--seconds", type=float, default=8.0, help="of timing with --overhead, each (8)")
    parser.add_argument("--out", type=Path, help="JSON to write after every model, keeping its other rows")
    parser.add_argument("--resume", action="store_true", help="skip what --out has from this machine and versions")
    arguments = parser.parse_args(argv)
    if arguments.resume and not arguments.out:
        parser.error("--resume needs --out: the file to go on with")
    return arguments


def _done(path: Path, facts: dict[str, object]) -> set[tuple[str, str]]:
    """The models a file has already, if it is of this machine and these versions."""
    if not path.exists():
        return set()
    machine = json.loads(path.read_text(encoding="utf-8"))["machine"]
    if any(machine.get(name) != facts[name] for name in ("device", "toolchain", "adaptconv")):
        return set()
    return {(row["model"], row["what"]) for row in read_rows(path)}


def _checked(name: str, arguments: argparse.Namespace) -> Row:
    began = time.monotonic()
    row: Row = {"model": name, "source": MODELS[name].network.source, "what": "check", "times": [], "failed": {}}
    for variant in arguments.variants:
        _child(row, variant, variant, arguments.sizes)
    row["times"].append(rows.times_of(row))
    while 0 < len(row["times"]) < arguments.repeats and rows.slow(row):
        again: Row = {"model": name, "failed": {}}
        for variant in ("optimize", "compile") if len(row["times"]) % 2 else ("compile", "optimize"):
            _child(again, variant, variant, 1)
        row["times"].append(rows.times_of(again))
    row["wrong"] = rows.faults(row)
    return _finished(row, began)


def _overhead(name: str, arguments: argparse.Namespace) -> Row:
    began = time.monotonic()
    row: Row = {"model": name, "source": MODELS[name].network.source, "what": "overhead", "failed": {}}
    _child(row, "overhead", "overhead", arguments.seconds)
    row["wrong"] = rows.overhead_faults(row)
    return _finished(row, began)


def _finished(row: Row, began: float) -> Row:
    row["seconds"] = round(time.monotonic() - began, 1)
    row["load_average"] = round(os.getloadavg()[0], 2)
    row["measured_on"] = now()
    _say(f"{row['model']}: {row['seconds']:.0f} s" + "".join(f"; {reason}" for reason in row["wrong"]))
    return row


_ERROR = re.compile(r"[\w.]+(Error|Exception|Failed)\b")


def _child(row: Row, key: str, task: str, number: float) -> None:
    """Put what a process of its own answers into a row, or why there is no answer into its "failed"."""
    _say(f"{row['model']}: {task}")
    with tempfile.TemporaryDirectory(prefix="adaptconv-compiled-") as folder:
        answer = Path(folder) / "answer.json"
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compiled.child"]
        ran = subprocess.run(
            [*command, row["model"], task, str(number), answer],
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"), "PYTHONPATH": path},
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        if ran.returncode == 0 and answer.exists():
            row[key] = json.loads(answer.read_text(encoding="utf-8"))
        else:
            said = ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"]
            errors = [line for line in said if _ERROR.match(line)]  # torch ends with advice, not with the error
            row["failed"][key] = (errors or said)[-1][:300]


def _say(text: str) -> None:
    print(f"[compiled] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
