"""Rewriting: plan every site of a graph and put the logical op, its plan in the arguments, where it pays."""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch
from torch import Tensor, fx

from adaptconv import ops
from adaptconv.backends import Config
from adaptconv.backends.weights import constant
from adaptconv.compile.judging import SiteReport, is_opaque, judge, report
from adaptconv.compile.nodes import Conv, value
from adaptconv.compile.sites import Site, common_window, find_sites, find_sums
from adaptconv.trilinear import Plans


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
        verdict = _guarded(gm, site)
        if verdict.rewritten:
            taken.update(member.node for member in site.members)
            reports.append(verdict)
    for site in singles:
        if site.result not in taken and not any(m.node in taken for m in site.members):
            reports.append(_guarded(gm, site))
    if any(verdict.rewritten for verdict in reports):
        gm.recompile()
    return reports


def _guarded(gm: fx.GraphModule, site: Site) -> SiteReport:
    """Plan and replace one site; nothing unexpected in here may cost the user their model."""
    try:
        return _one(gm, site)
    except Exception as error:  # noqa: BLE001 - the last line of defence: leave the node, say so once
        _warn(f"left {site.where or site.source or site.result} as it was", error)
        return report(site, False, f"{type(error).__name__}: {error}", None)


def _warn(what: str, error: Exception) -> None:
    warnings.warn(f"adaptconv {what}: {type(error).__name__}: {error}", RuntimeWarning, stacklevel=3)


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
