"""Rewriting: plan every site of a graph and put the logical op, its plan in the arguments, where it pays."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from adaptconv import ops, trilinear
from adaptconv.backends import Config, backend_named
from adaptconv.backends.weights import constant
from adaptconv.compile.nodes import Conv, value
from adaptconv.compile.sites import Site, common_window, find_sites, find_sums
from adaptconv.dispatch import COST_GAIN, Source, decisions
from adaptconv.problem import Problem
from adaptconv.trilinear import Plans

_LOG = logging.getLogger("adaptconv.compile")


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What was done with one site, in values that outlive its graph.

    Attributes:
        where: module path in the model.
        source: "file:line".
        kind: "conv", "sum of 2 convs".
        rewritten: whether the op took its place.
        reason: why it was left as it was, or "".
        problem: the FORWARD problem; None where there is none.
        plans: the plans of the directions it needs; None likewise.
        dynamic: whether its plan is made at run time.
    """

    where: str
    source: str
    kind: str
    rewritten: bool
    reason: str
    problem: Problem | None
    plans: Plans | None
    dynamic: bool = False


def rewrite(gm: fx.GraphModule) -> list[SiteReport]:
    """Rewrite a dynamo graph in place, child graphs included; a site that fails is left as it was."""
    reports: list[SiteReport] = []
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            reports += _rewrite_one(module)
    return reports


def _rewrite_one(gm: fx.GraphModule) -> list[SiteReport]:
    reports = []
    taken: set[fx.Node] = set()
    try:
        singles = find_sites(gm)  # before any sum becomes an op of ours
        sums = find_sums(gm)
    except Exception as error:  # noqa: BLE001 - nothing was changed yet: the graph stays as it is
        _warn("left a graph as it was", error)
        return []
    for site in sums:
        report = _guarded(gm, site)
        if report.rewritten:
            taken.update(member.node for member in site.members)
            reports.append(report)
    for site in singles:
        if site.result not in taken and not any(m.node in taken for m in site.members):
            reports.append(_guarded(gm, site))
    if any(report.rewritten for report in reports):
        gm.recompile()
    return reports


def _guarded(gm: fx.GraphModule, site: Site) -> SiteReport:
    """Plan and replace one site; nothing unexpected in here may cost the user their model."""
    try:
        return _one(gm, site)
    except Exception as error:  # noqa: BLE001 - the last line of defence: leave the node, say so once
        _warn(f"left {site.where or site.source or site.result} as it was", error)
        return _report(site, False, f"{type(error).__name__}: {error}", None)


def _warn(what: str, error: Exception) -> None:
    warnings.warn(f"adaptconv {what}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)


def judge(site: Site) -> SiteReport:
    """Plan a site and say whether it should be rewritten; changes nothing."""
    if site.problem is None:
        return _report(site, False, site.reason, None)
    plans = trilinear.plan_all(site.problem, site.grad_input, site.grad_weight)
    _LOG.debug("%s %s at %s:\n%s", site.kind, site.where, site.source, plans.forward)
    if len(site.members) > 1 and not _sum_pays(plans):
        return _report(site, False, "the sum as written is as fast as any single call known", plans)
    if plans.plain:
        return _report(site, False, "native is the plan", plans)
    if _is_prepacked(site, plans):
        return _report(site, False, "frozen: Inductor lays the weights out beforehand, which no eager plan can", plans)
    ours = len(site.members) == 1 and site.members[0].compact  # an op already: there is no graph to stay in
    if is_opaque(site, plans) and not ours and not _pays_for_op(plans):
        return _report(site, False, f"gains less than the {_OPAQUE_US:.0f} us an op of its own costs", plans)
    if not ours and not _gains_in_training(site, plans):
        return _report(site, False, "gains too little to part torch's backward, which makes both gradients", plans)
    return _report(site, True, "", plans)


_TRAINING_GAIN = 1.3  # measured, over all directions together; small gains of eager calls were losses in a graph


def _gains_in_training(site: Site, plans: Plans) -> bool:
    """Whether plans for a convolution over several channels gain enough for a training graph.

    Each direction is measured alone. Torch's backward makes both gradients in one call, and what is traced into a graph
    Inductor compiles anew: HiFi-GAN's step, its sites gaining 1.1 to 1.25 in eager calls, took 1.1 times torch's.
    """
    needed = [p for p in (plans.forward, plans.grad_input, plans.grad_weight) if p is not None]
    if len(needed) == 1 or len(site.members) > 1 or plans.forward.problem.groups > 1:
        return True
    measured = [p.record for p in needed if p.record is not None]
    if len(measured) < len(needed):
        return True
    return sum(r.native_us for r in measured) >= _TRAINING_GAIN * sum(r.p20_us for r in measured)


def _is_prepacked(site: Site, plans: Plans) -> bool:
    """Whether torch's own convolution, left as it is, gets better under Inductor's freezing than its plan knows.

    Weights over several channels are then kept in the blocks that oneDNN wants: a dilated 3x3x3 took 1.7 ms that way,
    and 6.3 by the best plan measured in eager calls.
    """
    problem = plans.forward.problem
    return (
        torch._inductor.config.freezing
        and problem.device.kind == "cpu"
        and problem.axes > 1
        and problem.groups == 1
        and not (site.grad_input or site.grad_weight)
        and len(site.members) == 1
        and not site.members[0].compact
        and plans.forward.choice.backend == "native"
        and plans.forward.source is not Source.PINNED
    )


_OPAQUE_US = 50.0  # what calling out of a compiled graph costs, rounded up


def _pays_for_op(plans: Plans) -> bool:
    """Whether the measured gains outweigh leaving the graph; without measurements, assume so."""
    needed = [p for p in (plans.forward, plans.grad_input, plans.grad_weight) if p is not None]
    if any(p.record is None for p in needed):
        return True
    return sum(p.record.native_us - p.record.p20_us for p in needed if p.record) > _OPAQUE_US * len(needed)


def is_opaque(site: Site, plans: Plans) -> bool:
    """Whether Inductor would undo these plans: they convolve in another layout than its own.

    Inductor turns the operands of every convolution it sees to the layout it prefers, so a plan that gains
    by not doing that must stay out of its sight.
    """
    if site.problem is None or site.problem.layout == site.layout:
        return False
    needed = [p for p in (plans.forward, plans.grad_input, plans.grad_weight) if p is not None]
    return any(p.choice.config.get("layout") == site.layout for p in needed)


def graph_text(site: Site, plans: Plans) -> str:
    """The plans' text for the layout the site was traced in, which is what its op will see."""
    texts = []
    for plan in (plans.forward, plans.grad_input, plans.grad_weight):
        if plan is None:
            texts.append("-")
            continue
        choice, layout = plan.choice, plan.choice.config.get("layout")
        if layout is not None and site.layout != plan.problem.layout:
            runs_in = plan.problem.layout if layout == "asis" else layout
            named = "asis" if runs_in == site.layout else runs_in
            choice = replace(choice, config=Config({**choice.config, "layout": named}))
        texts.append(str(choice))
    return (ops.OPAQUE if is_opaque(site, plans) else "") + "|".join(texts)


def _one(gm: fx.GraphModule, site: Site) -> SiteReport:
    verdict = judge(site)
    if verdict.plans is None:
        return verdict
    if verdict.rewritten:
        _replace(gm, site, ops.auto_plan() if site.dynamic else graph_text(site, verdict.plans))
    elif len(site.members) == 1:
        _settle_op(site, verdict.plans)
    return verdict


def _settle_op(site: Site, plans: Plans) -> None:
    """Write the resolved plan into an op that is already in the graph."""
    conv = site.members[0]
    if conv.compact and not site.dynamic:
        conv.node.args = (*conv.node.args[:7], graph_text(site, plans))


def _sum_pays(plans: Plans) -> bool:
    """Whether one call beats the sum as written; adding up grids natively *is* the sum as written.

    A record says so outright: what it was measured against includes that sum. A prediction must be clear.
    """
    needed = [p for p in (plans.forward, plans.grad_input, plans.grad_weight) if p is not None]
    guessed = [p for p in needed if p.source not in (Source.RECORD, Source.PINNED)]
    if all(p.choice.backend == "dual" for p in needed) or any(p.source is Source.FALLBACK for p in needed):
        return False
    pairs = [(answer, p) for p in guessed for answer in decisions(p.problem) if answer.backend == "dual"]
    if any(answer.predicted_us is None for answer, _ in pairs):
        return False
    as_written = sum(answer.predicted_us or 0.0 for answer, _ in pairs)
    as_planned = sum(backend_named(p.choice.backend).cost(p.problem, p.choice.config) for _, p in pairs)
    return as_written >= COST_GAIN * as_planned


def _report(site: Site, rewritten: bool, reason: str, plans: Plans | None) -> SiteReport:
    return SiteReport(
        site.where, site.source, site.kind, rewritten, reason, site.problem, plans, site.dynamic and rewritten
    )


def _replace(gm: fx.GraphModule, site: Site, plan: str) -> None:
    assert site.taps is not None and site.problem is not None
    graph = gm.graph
    first = site.members[0]
    with graph.inserting_before(site.result):
        weight = _compact(graph, first) if len(site.members) == 1 else _merged_weight(graph, site)
        bias = first.bias if len(site.members) == 1 else _merged_bias(graph, site)
        flat = [zeros for pair in site.padding for zeros in pair]
        node = graph.call_function(
            torch.ops.adaptconv.conv.default,
            (first.x, weight, bias, str(site.taps), list(first.stride), flat, first.groups, plan),
        )
    node.meta = dict(site.result.meta)
    site.result.replace_all_uses_with(node)
    _erase(graph, site)


def _erase(graph: fx.Graph, site: Site) -> None:
    """Take out the site's own nodes and no other.

    Not by eliminate_dead_code: to it a method that changes its tensor in place and whose result nobody
    uses is dead, and dynamo's graphs are full of those.
    """
    members = {member.node for member in site.members}
    doomed = [site.result]
    while doomed:
        node = doomed.pop()
        inner = [] if node in members else node.all_input_nodes  # an addition of the sum
        graph.erase_node(node)
        doomed += inner


def _derived(graph: fx.Graph, target: object, args: tuple[object, ...], like: fx.Node, example: Tensor) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = {**like.meta, "example_value": example}
    return node


def _compact(graph: fx.Graph, conv: Conv) -> fx.Node:
    if conv.compact:
        return conv.weight
    return _derived(graph, torch.flatten, (conv.weight, 2), conv.weight, value(conv.weight).flatten(2))


def _merged_weight(graph: fx.Graph, site: Site) -> fx.Node:
    """The sum's compact weight: every member's columns, placed on the union's taps and added."""
    merged = common_window(site.members)
    assert merged is not None
    union, _, moved = merged
    index = {offset: t for t, offset in enumerate(union.offsets)}
    total: fx.Node | None = None
    for member, offsets in zip(site.members, moved, strict=True):
        own = {index[offset]: t for t, offset in enumerate(offsets)}
        columns = [own.get(t, -1) for t in range(len(union))]
        compact = _compact(graph, member)
        placed = _derived(
            graph, torch.ops.adaptconv.place.default, (compact, columns), member.weight,
            value(compact).new_empty((*value(compact).shape[:2], len(columns))),
        )  # fmt: skip
        total = placed if total is None else _derived(graph, torch.add, (total, placed), member.weight, value(placed))
    assert total is not None
    return total


def _merged_bias(graph: fx.Graph, site: Site) -> fx.Node | None:
    total: fx.Node | None = None
    for bias in (member.bias for member in site.members):
        if bias is not None:
            total = bias if total is None else _derived(graph, torch.add, (total, bias), bias, value(bias))
    return total


def place(weight: Tensor, columns: list[int]) -> Tensor:
    """Columns of a compact weight by index, zeros for -1: ``[O, I, T]`` -> ``[O, I, len(columns)]``."""
    padded = torch.nn.functional.pad(weight, (0, 1))
    index = constant(tuple(c if c >= 0 else weight.shape[2] for c in columns), weight.device)
    return padded.index_select(2, index)


_LIBRARY = torch.library.Library("adaptconv", "FRAGMENT")
_LIBRARY.define("place(Tensor weight, int[] columns) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("place", place, "CompositeImplicitAutograd")
