"""What the campaign's two processes agree on: the steps, the files, and how it is said what is being done."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STEPS = ("check", "tune", "time", "train")
FILES = {"check": "checks.json", "time": "rows.json", "train": "training.json"}
CRASHES = "crashes.json"
FAILURES = "failures.txt"
TABLES = "tables.txt"
DEAD = 77  # exit status of a worker whose device answers no more
AT = "ADAPTCONV_CAMPAIGN_AT"  # environment: the file that says what is being done


def read_rows(folder: Path | None, name: str) -> list[dict[str, Any]]:
    """The rows of one of the files; none if there is no such file."""
    if folder is None or not (folder / name).exists():
        return []
    found: list[dict[str, Any]] = json.loads((folder / name).read_text(encoding="utf-8"))["rows"]
    return found


def begin(*item: str) -> None:
    """Say what is begun: its step, then what identifies it there. Should it end the process, this is what did."""
    path = os.environ.get(AT)
    if path:
        part = Path(f"{path}.part")
        part.write_text(json.dumps(item), encoding="utf-8")
        part.replace(path)


def crashed(rows: Sequence[dict[str, Any]], step: str) -> dict[tuple[str, ...], str]:
    """What ended a process in a step, and how, by what identifies it."""
    return {tuple(row["item"][1:]): row["how"] for row in rows if row["item"][:1] == [step]}
