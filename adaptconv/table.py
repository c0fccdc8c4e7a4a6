"""The table of a report: a row for each site and direction, the text, the Markdown and the JSON made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from adaptconv._version import __version__
from adaptconv.problem import Direction


@dataclass(frozen=True, slots=True)
class Row:
    """One site in one direction.

    Attributes:
        where: module path in the model.
        source: "file:line" that called it; "" where unknown.
        kind: "conv", "sum of 2 convs", "layer".
        direction: forward, grad_input or grad_weight; "" for a site that is no problem.
        problem: the problem, for people.
        backend, config: what was chosen.
        decided_by: pinned, record, nearest, cost or fallback.
        why: that decision's reason, or why the site was left alone.
        time_us: measured 20th percentile of the choice in microseconds; None if it rests on no measurement.
        native_us: the same of plain native in the same run.
        gain: ``native_us / time_us``.
        rewritten: whether adaptconv's op runs there (False: the torch call was left untouched).
        left: why it was left untouched; "" where it was not.
        remark: what else was found: how its weight is constructed, what keeps its taps, what follows it.
    """

    where: str
    source: str
    kind: str
    direction: str
    problem: str
    backend: str
    config: str
    decided_by: str
    why: str
    time_us: float | None
    native_us: float | None
    gain: float | None
    rewritten: bool
    left: str = ""
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A table of rows with the machine they are about.

    ``str(report)`` is the table, in which sites that are the same problem with the same plan share a line;
    ``to_markdown()`` and ``to_json()`` are for files, ``rows`` has every site and direction.
    """

    title: str
    rows: tuple[Row, ...]
    machine: str
    toolchain: Mapping[str, str]
    note: str = ""

    @property
    def summary(self) -> str:
        """One line: how many sites, how many changed, what the measured ones gained."""
        if not self.rows:
            return self.note or "no convolutions were found"
        sites = {(row.where, row.source, row.kind) for row in self.rows}
        changed = {(row.where, row.source, row.kind) for row in self.rows if row.rewritten}
        parts = [f"{len(sites)} sites, {len(changed)} rewritten"]
        for direction in Direction:
            known = [row for row in self.rows if row.direction == direction.value and row.gain is not None]
            if known:
                native = sum(row.native_us or 0.0 for row in known)
                ours = sum(row.time_us or 0.0 for row in known)
                parts.append(f"{direction}: {_ms(native)} -> {_ms(ours)} ms measured ({native / ours:.2f}x)")
        unmeasured = sum(row.gain is None and bool(row.direction) for row in self.rows)
        if unmeasured:
            parts.append(f"{unmeasured} rows rest on no measurement of their own: adaptconv.tune measures them")
        return "; ".join(parts)

    def table(self, style: str = "simple") -> str:
        """The rows as text in one of tabulate's styles, what is the same told once."""
        from tabulate import tabulate

        alike: dict[Row, list[str]] = {}
        for row in self.rows:
            alike.setdefault(replace(row, where="", source=""), []).append(_place(row))
        header = ("where", "problem", "plan", "from", "ms", "native ms", "gain", "note")
        notes = self._notes()
        cells = [[*_cells(row, places), _noted(row, notes)] for row, places in alike.items()]
        text: str = tabulate(cells, headers=header, tablefmt=style, disable_numparse=True)
        return "\n".join([text, *(f"[{number}] {note}" for note, number in notes.items())])

    def _notes(self) -> dict[str, int]:
        """What the table refers to by number, in the order in which it is first said."""
        said = dict.fromkeys(text for row in self.rows for text in _remarks(row))
        return {text: number for number, text in enumerate(said, 1)}

    def __str__(self) -> str:
        lines = [self.title]
        if self.rows:
            lines += [self.table(), ""]
        lines += [self.summary, self._setting()]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The table in GitHub's Markdown."""
        lines = [f"## {self.title}", ""]
        if self.rows:
            lines += [self.table("github"), ""]
        return "\n".join([*lines, self.summary, "", self._setting()])

    def to_json(self) -> str:
        """Everything, as JSON text; times in microseconds."""
        return json.dumps(
            {
                "title": self.title, "adaptconv": __version__, "machine": self.machine,
                "toolchain": dict(self.toolchain), "summary": self.summary, "rows": [asdict(row) for row in self.rows],
            },
            indent=1,
        )  # fmt: skip

    def _setting(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.toolchain.items())
        return f"on {self.machine}; {versions}; adaptconv {__version__}"


def _ms(microseconds: float) -> str:
    return f"{microseconds / 1e3:.3g}" if microseconds < 1e5 else f"{microseconds / 1e3:,.0f}"


def _place(row: Row) -> str:
    return row.where or row.source.rpartition("/")[2]


def _cells(row: Row, places: Sequence[str]) -> list[str]:
    short = {"grad_input": "dx", "grad_weight": "dw", "forward": "y"}.get(row.direction, "")
    plan = row.backend + (f" {row.config}" if row.config else "")
    kind = "" if row.kind in ("conv", "layer") else f" ({row.kind})"
    more = f" (+{len(places) - 1})" if len(places) > 1 else ""
    return [
        f"{places[0]}{kind}{more}", f"{short}: {row.problem}" if short else row.problem, plan, row.decided_by,
        "" if row.time_us is None else _ms(row.time_us), "" if row.native_us is None else _ms(row.native_us),
        "" if row.gain is None else f"{row.gain:.2f}x",
    ]  # fmt: skip


_NOT_WORTH_A_NOTE = "native is the plan"


def _remarks(row: Row) -> list[str]:
    left = "" if row.left == _NOT_WORTH_A_NOTE else row.left
    return [text for text in (left, row.remark) if text and row.direction in ("", Direction.FORWARD.value)]


def _noted(row: Row, notes: Mapping[str, int]) -> str:
    """What became of a site, said once, in its first row."""
    if row.direction not in ("", Direction.FORWARD.value):
        return ""
    done = "" if row.kind == "layer" else "rewritten" if row.rewritten else "as written"
    return " ".join([done, *(f"[{notes[text]}]" for text in _remarks(row))]).strip()
