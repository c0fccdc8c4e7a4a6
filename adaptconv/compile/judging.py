"""Judging: whether a site of a graph should be rewritten, and if not, why."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from adaptconv import trilinear
from adaptconv.backends import backend_named
from adaptconv.compile.sites import Site
from adaptconv.dispatch import COST_GAIN, Source, decisions
from adaptconv.problem import Problem
from adaptconv.trilinear import Plans

_LOG = logging.getLogger("adaptconv.compile")
_TRAINING_GAIN = 1.3  # measured, over all directions together; small gains of eager calls were losses in a graph
_OPAQUE_US = 50.0  # what calling out of a compiled graph costs, rounded up


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


def judge(site: Site) -> SiteReport:
    """Plan a site and say whether it should be rewritten; changes nothing."""
    if site.problem is None:
        return report(site, False, site.reason, None)
    plans = trilinear.plan_all(site.problem, site.grad_input, site.grad_weight)
    _LOG.debug("%s %s at %s:\n%s", site.kind, site.where, site.source, plans.forward)
    if len(site.members) > 1 and not _sum_pays(plans):
        return report(site, False, "the sum as written is as fast as any single call known", plans)
    if plans.plain:
        return report(site, False, "native is the plan", plans)
    if _is_prepacked(site, plans):
        return report(site, False, "frozen: Inductor lays the weights out beforehand, which no eager plan can", plans)
    ours = len(site.members) == 1 and site.members[0].compact  # an op already: there is no graph to stay in
    if is_opaque(site, plans) and not ours and not _pays_for_op(plans):
        return report(site, False, f"gains less than the {_OPAQUE_US:.0f} us an op of its own costs", plans)
    if not ours and not _gains_in_training(site, plans):
        return report(site, False, "gains too little to part torch's backward, which makes both gradients", plans)
    return report(site, True, "", plans)


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


def report(site: Site, rewritten: bool, reason: str, plans: Plans | None) -> SiteReport:
    """A site with its verdict and the plans it rests on."""
    return SiteReport(
        site.where, site.source, site.kind, rewritten, reason, site.problem, plans, site.dynamic and rewritten
    )
