"""Runs the campaign's worker, ends it when it hangs, starts it again without what killed it, and prints the tables."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import tables
from benchmarks.gpu.steps import AT, CRASHES, DEAD, FILES, STEPS, TABLES, read_rows

_SILENT_S = 60.0  # on one item, after which it is taken to hang; a single kernel compiles in a few seconds
_PATIENT_S = 240.0  # likewise for what has cuDNN try its algorithms, or compiles whole networks
_MARGIN_S = 12.0  # for the tables, and for the worker to end by itself
_LEAST_S = 25.0  # left, or no worker is started again: importing and the first context take some of it
_PATIENT = ("start", "tune", "time", "train")


def run(arguments: argparse.Namespace, argv: Sequence[str], until: float) -> int:
    """Run workers until the work is done or it is time; the tables, and 1 if a result is wrong, 3 if there is none."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    if arguments.earlier is not None and arguments.earlier.resolve() != out.resolve():
        for path in arguments.earlier.glob("*.json"):
            shutil.copy2(path, out / path.name)
    with tempfile.TemporaryDirectory(prefix="adaptconv-campaign-") as scratch:
        started = False
        while not started or until - time.time() > _LEAST_S:
            started = True
            item, how = _worker(argv, out, Path(scratch) / "at.json", until - _MARGIN_S)
            if how is None:
                break
            print(f"!! the worker {how} at: {' '.join(item)}", flush=True)
            rows = read_rows(out, CRASHES)
            if not item or [row for row in rows if row["item"] == item]:  # it ends there again: what comes after it?
                later = _after(item, arguments.steps)
                if not later:
                    break
                argv = [*argv, "--steps", *later]
            rows.append({"item": item, "how": how})
            (out / CRASHES).write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    found = {step: read_rows(out, name) for step, name in FILES.items()}
    crashes = read_rows(out, CRASHES)
    (out / TABLES).write_text(tables.whole(found, crashes) + "\n", encoding="utf-8")
    print(tables.short(found, crashes), flush=True)
    if not any(found.values()) and set(arguments.steps) & set(FILES):
        return 3
    return 1 if crashes or tables.is_wrong(found) else 0


def _worker(argv: Sequence[str], out: Path, at: Path, until: float) -> tuple[list[str], str | None]:
    """One worker: what it was at when it ended, and how it ended, None if it had nothing more to do."""
    at.write_text(json.dumps(["start"]), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.gpu", *argv, "--continue", str(out), "--worker", str(until)]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    child = subprocess.Popen(command, env={**os.environ, AT: str(at), "PYTHONPATH": path})
    try:
        while True:
            try:
                status = child.wait(timeout=1.0)
                return _item(at), None if status == 0 else _told(status)
            except subprocess.TimeoutExpired:
                pass
            item = _item(at)
            silent = time.time() - at.stat().st_mtime
            if time.time() > until + _MARGIN_S / 2:
                return item, None  # out of time, like everything: what it was at is not to blame
            if silent > (_PATIENT_S if item[:1] and item[0] in _PATIENT else _SILENT_S):
                return item, f"was silent for {silent:.0f} s"
    finally:
        child.kill()
        child.wait()


def _after(item: list[str], steps: Sequence[str]) -> list[str]:
    """The steps that follow the one an item belongs to; none where it belongs to none."""
    if not item or item[0] not in STEPS:
        return []
    return [step for step in STEPS[STEPS.index(item[0]) + 1 :] if step in steps]


def _told(status: int) -> str:
    if status == DEAD:
        return "lost its GPU (an error after which no call works)"
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _item(at: Path) -> list[str]:
    item: Any = json.loads(at.read_text(encoding="utf-8"))
    return [str(part) for part in item]
