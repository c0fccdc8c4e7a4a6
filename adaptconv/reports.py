"""Reports: what ran where, why, and what it gained. Rows in, text out; nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptconv import dispatch
from adaptconv._version import __version__
from adaptconv.dispatch import Plan
from adaptconv.errors import AdaptConvError
from adaptconv.modules import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d
from adaptconv.problem import Device, Direction, Problem
from adaptconv.records import toolchain
from adaptconv.trilinear import Plans

if TYPE_CHECKING:
    from adaptconv.compile.judging import SiteReport

_ADAPTIVE = (AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d)


class NothingToReport(AdaptConvError, ValueError):
    """An object that ``report`` or ``explain`` cannot say anything about."""


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


def report(model: Any, example_inputs: Any = None, *, train: bool = False) -> Report:
    """What runs where in a model, why, and what it gained.

    Args:
        model: something ``optimize`` returned and that has run at least once; or a module with
            ``AdaptiveConv`` layers that have run; or, with ``example_inputs``, any module or function.
        example_inputs: a tensor, tuple or dict. The model is then traced, not compiled, and the report
            shows what ``optimize`` would do.
        train: with ``example_inputs``, include both gradients.

    Raises:
        NothingToReport: ``model`` is not a module or function.
    """
    if not callable(model):
        raise NothingToReport(f"adaptconv.report takes a module or a function, got {type(model).__name__}")
    if example_inputs is not None:
        return _dry_run(model, example_inputs, train)
    from adaptconv.compile.optimize import log_of

    log = log_of(model)
    if log is not None:
        rows = [row for site in log.sites for row in _site_rows(site)]
        note = "" if log.graphs else "optimized but not compiled yet: call it once, or pass example_inputs"
        return _report(f"adaptconv report: {_name(model)}", rows, note)
    rows = _layer_rows(model) if isinstance(model, nn.Module) else []
    note = "no AdaptiveConv layer has run and the model is not optimized: call it, optimize it, or pass example_inputs"
    return _report(f"adaptconv report: {_name(model)}", rows, note)


def explain(target: Any, *example_inputs: Any, train: bool = False) -> str:
    """Every candidate for a problem, what it answered and why, and what was decided.

    Args:
        target: a ``Problem``; or a layer, model or function, with the inputs to call it on. Nothing is
            compiled and nothing is measured.
        example_inputs: what to call ``target`` with.
        train: for a layer or model, explain both gradients too.

    Raises:
        NothingToReport: ``target`` is none of those, or a layer came without inputs.
    """
    if isinstance(target, Problem):
        return dispatch.explain_problem(target)
    if not callable(target):
        raise NothingToReport(f"adaptconv.explain takes a Problem, a layer or a model, got {type(target).__name__}")
    if not example_inputs:
        raise NothingToReport("adaptconv.explain(layer) needs the inputs to call it on: adaptconv.explain(layer, x)")
    from adaptconv.compile.judging import judge
    from adaptconv.compile.optimize import collect_sites

    lines = []
    for site in collect_sites(target, example_inputs, train=train):
        lines.append(f"{site.where or _name(target)} ({site.kind}) {site.source}".rstrip())
        lines += [f"  {remark}" for remark in (site.made, site.note) if remark]
        if site.problem is None:
            lines.append(f"  left to torch: {site.reason}")
            continue
        verdict = judge(site)[1]
        lines.append("  rewritten" if verdict.rewritten else f"  left as written: {verdict.reason}")
        for direction in Direction:
            wanted = {Direction.GRAD_INPUT: site.grad_input, Direction.GRAD_WEIGHT: site.grad_weight}
            if wanted.get(direction, True):
                lines.append(dispatch.explain_problem(site.problem.facing(direction)))
    return "\n".join(lines) if lines else f"{_name(target)} calls no convolution on these inputs"


def _name(model: Any) -> str:
    plain = getattr(model, "_orig_mod", model)
    return getattr(plain, "__qualname__", None) or type(plain).__qualname__


def _report(title: str, rows: Iterable[Row], note: str = "", device: torch.device | None = None) -> Report:
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Report(title, tuple(rows), str(Device.of(device)), toolchain(device), note)


def _dry_run(model: Any, example_inputs: Any, train: bool) -> Report:
    from adaptconv.compile.judging import judge, settle
    from adaptconv.compile.optimize import as_arguments, collect_sites

    args, kwargs = as_arguments(example_inputs)
    sites = collect_sites(model, args, kwargs, train=train)
    rows = [row for verdict in settle(sites, lambda site: judge(site)[1]) for row in _site_rows(verdict)]
    return _report(f"adaptconv report (dry run): {_name(model)}", rows)


def _site_rows(site: SiteReport) -> list[Row]:
    left = "" if site.rewritten else site.reason
    remark = "; ".join(filter(None, (site.made, site.note)))
    if site.plans is None:
        bare = Row(site.where, site.source, site.kind, "", "", "native", "", "", site.reason, None, None, None, False)
        return [replace(bare, left=left, remark=remark)]
    rows = _plan_rows(site.where, site.source, site.kind, site.plans, site.rewritten)
    return [replace(row, left=left, remark=remark) for row in rows]


def _layer_rows(model: nn.Module) -> list[Row]:
    rows: list[Row] = []
    for name, layer in model.named_modules():
        if isinstance(layer, _ADAPTIVE) and layer.plans is not None:
            rows += _plan_rows(name or type(layer).__name__, "", "layer", layer.plans, not layer.plans.plain)
    return rows


def _plan_rows(where: str, source: str, kind: str, plans: Plans, rewritten: bool) -> list[Row]:
    planned: Sequence[Plan | None] = (plans.forward, plans.grad_input, plans.grad_weight)
    return [_row(where, source, kind, plan, rewritten) for plan in planned if plan is not None]


def _row(where: str, source: str, kind: str, plan: Plan, rewritten: bool) -> Row:
    record = plan.record
    time_us = record.p20_us if record else None
    native_us = record.native_us if record else None
    problem = str(plan.problem).removeprefix(f"{plan.problem.direction} ")
    return Row(
        where, source, kind, plan.problem.direction.value, problem, plan.choice.backend,
        "" if plan.plain else str(plan.choice.config), str(plan.source), plan.why, time_us, native_us,
        native_us / time_us if time_us and native_us else None, rewritten,
    )  # fmt: skip
