"""Reports: what ran where, why, and what it gained, as rows of a table. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptconv import dispatch
from adaptconv.dispatch import Plan
from adaptconv.errors import AdaptConvError
from adaptconv.modules import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d
from adaptconv.problem import Device, Direction, Problem
from adaptconv.records import toolchain
from adaptconv.table import Report, Row
from adaptconv.trilinear import Plans

if TYPE_CHECKING:
    from adaptconv.compile.judging import SiteReport

_ADAPTIVE = (AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d)


class NothingToReport(AdaptConvError, ValueError):
    """An object that ``report`` or ``explain`` cannot say anything about."""


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
