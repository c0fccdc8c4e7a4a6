"""The campaign's tables: whole for a file, and short enough for the end of a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import checks, rows, training
from benchmarks.suites import MUST_SHOW

Found = Mapping[str, Sequence[dict[str, Any]]]


def is_wrong(found: Found) -> bool:
    """Whether any result was."""
    return any(check["wrong"] for check in found["check"]) or any(row["wrong"] for row in found["time"])


def whole(found: Found, crashes: Sequence[dict[str, Any]]) -> str:
    """Everything, most telling last."""
    return _joined(
        _crashes(crashes), checks.summary(found["check"], most=1000), training.table(found["train"]),
        rows.table(found["time"]), rows.means(found["time"]),
    )  # fmt: skip


def short(found: Found, crashes: Sequence[dict[str, Any]]) -> str:
    """What is wrong, the rows that every summary shows, the means."""
    shown = [row for row in found["time"] if row["layer"] in MUST_SHOW] or found["time"]
    return _joined(
        checks.summary(found["check"], most=4), rows.brief(shown), rows.means(found["time"]),
        training.table(found["train"]), _crashes(crashes),
    )  # fmt: skip


def _crashes(crashes: Sequence[dict[str, Any]]) -> str:
    return "\n".join(f"CRASH: the worker {row['how']} at: {' '.join(row['item'])}" for row in crashes)


def _joined(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part)
