"""Rewriting: plan every site of a graph and put the logical op, its plan in the arguments, where it pays."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import replace

from torch import fx

from adaptconv import ops
from adaptconv.backends import Config
from adaptconv.compile.agreement import agreed
from adaptconv.compile.building import built, torchs_own
from adaptconv.compile.judging import SiteReport, is_opaque, judge, pads_itself, report, settle
from adaptconv.compile.nodes import replaced
from adaptconv.compile.sites import Site, find_sites
from adaptconv.trilinear import Plans

_LOG = logging.getLogger("adaptconv.compile")


def rewrite(gm: fx.GraphModule) -> list[SiteReport]:
    """Rewrite a dynamo graph in place, child graphs included; a site that fails is left as it was."""
    reports: list[SiteReport] = []
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            reports += _rewrite_one(module)
    return reports


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph that rewriting another leaves as it is, child graphs included; tensors are shared."""
    twin = fx.GraphModule(gm, copy.deepcopy(gm.graph), class_name=type(gm).__name__)
    twin.meta = dict(gm.meta)
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, copied(child))
    return twin


def _rewrite_one(gm: fx.GraphModule) -> list[SiteReport]:
    try:
        sites = find_sites(gm)
    except Exception as error:  # noqa: BLE001 - nothing was changed yet: the graph stays as it is
        _warn("left a graph as it was", error)
        return []
    reports = settle(sites, lambda site: _guarded(gm, site))
    if any(verdict.rewritten for verdict in reports):
        gm.recompile()
    return reports


def _guarded(gm: fx.GraphModule, site: Site) -> SiteReport:
    """Plan and replace one site; nothing unexpected in here may cost the user their model."""
    place = " ".join(filter(None, (site.kind, site.where, site.source)))
    try:
        verdict = _one(gm, site)
        done = f"rewritten, {verdict.plans.text}" if verdict.rewritten and verdict.plans else f"left, {verdict.reason}"
        _LOG.info("%s: %s", place, done)
        return verdict
    except Exception as error:  # noqa: BLE001 - the last line of defence: leave the node, say so once
        _warn(f"left {place} as it was", error)
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
    site, verdict = agreed(site, *judge(site))
    if verdict.plans is None:
        return verdict
    if verdict.rewritten:
        _replace(gm, site, verdict.plans)
    elif len(site.members) == 1:
        _settle_op(site, verdict.plans)
    return verdict


def _settle_op(site: Site, plans: Plans) -> None:
    """Write the resolved plan into an op that is already in the graph."""
    conv = site.members[0]
    if conv.compact and not site.dynamic:
        conv.node.args = (*conv.node.args[:7], graph_text(site, plans))


def _replace(gm: fx.GraphModule, site: Site, plans: Plans) -> None:
    with gm.graph.inserting_before(site.result):
        if pads_itself(site, plans):
            node = torchs_own(gm.graph, site)
        else:
            node = built(gm.graph, site, ops.auto_plan() if site.dynamic else graph_text(site, plans))
        replaced(site.result, node)
    _erase(gm.graph, site)


def _erase(graph: fx.Graph, site: Site) -> None:
    """Take out the site's own nodes and no other.

    Not by eliminate_dead_code: to it a method that changes its tensor in place and whose result nobody
    uses is dead, and dynamo's graphs are full of those. What constructed a weight stays, for others may read it;
    tracing the graph drops what nobody does.
    """
    members = {member.node for member in site.members}
    doomed = [site.result]
    while doomed:
        node = doomed.pop()
        inner = [] if node in members else node.all_input_nodes  # an addition of the sum
        graph.erase_node(node)
        doomed += inner
    for node in dict.fromkeys(node for member in site.members for node in member.inner):
        if not node.users:
            graph.erase_node(node)
