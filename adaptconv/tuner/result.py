"""What tuning returns: a row for each problem, and a sentence for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from adaptconv.errors import AdaptConvError
from adaptconv.problem import Problem
from adaptconv.records import Record

TUNED = "tuned"
KNOWN = "known"
NOT_TUNED = "not tuned: "


class TuneError(AdaptConvError, ValueError):
    """Something tuning was given that it cannot work with: a model, its inputs, a factory, a setting."""


@dataclass(frozen=True, slots=True)
class TuneRow:
    """What became of one problem.

    Attributes:
        problem: the problem.
        record: what is known of it now; None where it was not tuned.
        status: "tuned", "known" (a current record was there already) or "not tuned: <reason>".
    """

    problem: Problem
    record: Record | None
    status: str

    @property
    def gain(self) -> float | None:
        """How many times faster than native the record is, 1.0 where native stays; None without one."""
        return None if self.record is None else gain(self.record)


@dataclass(frozen=True, slots=True)
class TuneResult:
    """The outcome of a tuning session; ``str`` is a short summary.

    Attributes:
        rows: one a problem, in the order in which the problems were given.
        seconds: wall time.
        interrupted: whether Ctrl-C ended it early.
        database: the directory the records were written to; None if nothing could be written there.
        note: what else there is to say, in a sentence, or "".
    """

    rows: tuple[TuneRow, ...] = ()
    seconds: float = 0.0
    interrupted: bool = False
    database: Path | None = None
    note: str = ""

    @property
    def records(self) -> tuple[Record, ...]:
        """The records of the problems that are tuned or were known."""
        return tuple(row.record for row in self.rows if row.record is not None)

    def __str__(self) -> str:
        """The session in one line, e.g. "tuned 12 problems in 41 s; 7 faster than native by 1.1-22x, 5 stay native"."""
        parts = []
        tuned = [row.record for row in self.rows if row.status == TUNED and row.record is not None]
        if self.rows or not self.note:
            digits = 0 if self.seconds >= 10 else 1
            parts.append(f"tuned {_count(len(tuned), 'problem')} in {self.seconds:.{digits}f} s")
        if tuned:
            gains = sorted(gain(record) for record in tuned if record.p20_us < record.native_us)
            span = "" if not gains else _times(gains[0]) if len(gains) == 1 else f"{gains[0]:.2g}-{_times(gains[-1])}"
            faster = f"{len(gains)} faster than native by {span}, " if gains else ""
            parts.append(f"{faster}{len(tuned) - len(gains)} stay native")
        known = sum(row.status == KNOWN for row in self.rows)
        if known:
            parts.append(f"{known} already known")
        reasons = Counter(row.status.removeprefix(NOT_TUNED) for row in self.rows if row.status.startswith(NOT_TUNED))
        parts += [f"{count} not tuned ({reason})" for reason, count in reasons.items()]
        if self.note:
            parts.append(self.note)
        if self.interrupted:
            parts.append("interrupted, what was finished is kept")
        if tuned:
            parts.append(f"database {self.database}" if self.database else "nothing could be written to a database")
        return "; ".join(parts)


def gain(record: Record) -> float:
    """How many times faster than native a record is."""
    return record.native_us / record.p20_us if record.p20_us > 0 else 1.0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _times(ratio: float) -> str:
    return f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x"
