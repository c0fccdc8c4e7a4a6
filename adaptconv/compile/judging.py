"""Judging: whether a site of a graph should be rewritten, and if not, why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from adaptconv import trilinear
from adaptconv.backends import backend_named
from adaptconv.backends.costs import is_modelled
from adaptconv.backends.halves import has_kernels, is_half
from adaptconv.backends.pointwise import is_pointwise
from adaptconv.compile.sites import Site
from adaptconv.dispatch import Plan, Source, decisions
from adaptconv.errors import BackendRejected
from adaptconv.predictions import COST_GAIN
from adaptconv.problem import Problem
from adaptconv.taps import TapPattern
from adaptconv.trilinear import Plans

_TRAINING_GAIN = 1.3  # measured, over all directions together; small gains of eager calls were losses in a graph
_OPAQUE_US = 50.0  # what calling out of a compiled graph costs, rounded up


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What was done with one site, in values that outlive its graph.

    Attributes:
        where: module path in the model.
        source: "file:line".
        kind: "conv", "sum of 2 convs", "unfold", or the name of a call that is left to torch.
        rewritten: whether the op took its place.
        reason: why it was left as it was, or "".
        problem: the FORWARD problem; None where there is none.
        plans: the plans of the directions it needs; None likewise.
        dynamic: whether its plan is made at run time.
        taps: where the taps were found to sit; None where it was not understood.
        made: what is known of the construction of its weight.
        note: what else people should know about it.
    """

    where: str
    source: str
    kind: str
    rewritten: bool
    reason: str
    problem: Problem | None
    plans: Plans | None
    dynamic: bool = False
    taps: TapPattern | None = None
    made: str = ""
    note: str = ""


def judge(site: Site) -> tuple[Site, SiteReport]:
    """Plan a site and say whether it should be rewritten; changes nothing.

    Returns:
        The site as it would be rewritten, and the verdict. A kernel whose holes gain nothing may still gain in full.

    Raises:
        BackendRejected: a pinned backend declines it.
    """
    if site.as_written is None:
        return site, _verdict(site)
    try:
        verdict = _verdict(site)
    except BackendRejected:
        return site.stated(), _verdict(site.stated())
    if not verdict.rewritten:
        in_full = _verdict(site.stated())
        if in_full.rewritten:
            return site.stated(), in_full
    return site, verdict


def settle(sites: Sequence[Site], decide: Callable[[Site], SiteReport]) -> list[SiteReport]:
    """Decide site by site, a sum before its convolutions; those of a sum that is rewritten are not asked again."""
    reports = []
    taken: set[fx.Node] = set()
    for site in sites:
        if site.result in taken or any(member.node in taken for member in site.members):
            continue
        verdict = decide(site)
        if verdict.rewritten:
            taken.update(member.node for member in site.members)
        if verdict.rewritten or len(site.members) < 2:
            reports.append(verdict)  # of a sum left as written, its convolutions have rows of their own
    return reports


def _verdict(site: Site) -> SiteReport:
    if site.problem is None:
        return report(site, False, site.reason, None)
    plans = trilinear.plan_all(site.problem, site.grad_input, site.grad_weight)
    if len(site.members) > 1 and not _sum_pays(plans):
        return report(site, False, "the sum as written is as fast as any single call known", plans)
    written = _written_well(site, plans)
    if written:
        return report(site, False, written, plans)
    if pads_itself(site, plans):
        return report(site, True, "", plans)
    if _is_product(site, plans):
        return report(
            site, False, "in the layout Inductor gives it a 1x1 convolution is a matrix product already", plans
        )
    if _is_prepacked(site, plans):
        return report(site, False, "frozen: Inductor lays the weights out beforehand, which no eager plan can", plans)
    ours = len(site.members) == 1 and site.members[0].kind == "op"  # an op already: there is no graph to stay in
    if is_opaque(site, plans) and not ours and not _pays_for_op(plans):
        return report(site, False, f"gains less than the {_OPAQUE_US:.0f} us an op of its own costs", plans)
    if not ours and not _gains_in_training(site, plans):
        return report(site, False, "gains too little to part torch's backward, which makes both gradients", plans)
    return report(site, True, "", plans)


def _written_well(site: Site, plans: Plans) -> str:
    """Why the graph as it is written is at least as good as the plans; "" if it is not."""
    needed = plans_needed(plans)
    backends = {p.choice.backend for p in needed}
    if site.folded and site.members[0].kind == "op":
        return ""  # its plan is for the padding it takes in
    if any(p.source is Source.PINNED for p in needed):
        return "native is the plan" if plans.plain and not site.folded and site.kind == "conv" and not site.made else ""
    if site.kind == "unfold":
        return "gathering columns is the plan, which is what the graph does" if backends == {"gather"} else ""
    if site.as_written is not None:
        return _constructed_well(site, plans, backends)
    if site.folded:  # torch's own padding may spare a copy; uneven, it pads first itself, as the graph does
        every_default = all(p.choice == backend_named("native").default(p.problem) for p in needed)
        return "native is the plan" if every_default and not plans.plain else ""
    return "native is the plan" if plans.plain else ""


def _constructed_well(site: Site, plans: Plans, backends: set[str]) -> str:
    """Whether a convolution with the kernel constructed in full is as good as one with its taps alone.

    A record was measured against that; a prediction must be clear, and where nothing is predicted nothing is done.
    """
    needed = plans_needed(plans)
    assert site.as_written is not None
    if backends == {"dense"}:
        return "convolving with the kernel in full is the plan, which is what the graph does"
    in_full = plans_needed(trilinear.plan_all(site.as_written, site.grad_input, site.grad_weight))
    if all(p.source is Source.RECORD for p in needed):
        slower = all(p.source is Source.RECORD for p in in_full) and _us(in_full) < _us(needed)
        return "convolving with the kernel in full was measured to be faster" if slower else ""
    if not is_modelled(site.as_written.device):
        return "no measurement says that leaving out the holes gains: adaptconv.tune makes one"
    if _us(in_full) < COST_GAIN * _us(needed):
        return "leaving out the holes gains too little to be sure by prediction"
    return ""


def _us(plans: Sequence[Plan]) -> float:
    """Microseconds of these plans together, measured or predicted."""
    return sum(
        p.record.p20_us if p.record else backend_named(p.choice.backend).cost(p.problem, p.choice.config) for p in plans
    )


def plans_needed(plans: Plans) -> list[Plan]:
    """The plans of the directions that are asked for."""
    return [p for p in (plans.forward, plans.grad_input, plans.grad_weight) if p is not None]


def _gains_in_training(site: Site, plans: Plans) -> bool:
    """Whether plans for a convolution over several channels gain enough for a training graph.

    Each direction is measured alone. Torch's backward makes both gradients in one call, and what is traced into a graph
    Inductor compiles anew: HiFi-GAN's step, its sites gaining 1.1 to 1.25 in eager calls, took 1.1 times torch's.
    """
    needed = plans_needed(plans)
    if len(needed) == 1 or len(site.members) > 1 or plans.forward.problem.groups > 1:
        return True
    if site.kind == "unfold" or plans.plain:  # the graph's own way is another
        return True
    measured = [p.record for p in needed if p.record is not None]
    if len(measured) < len(needed):
        return True
    return sum(r.native_us for r in measured) >= _TRAINING_GAIN * sum(r.p20_us for r in measured)


def _is_product(site: Site, plans: Plans) -> bool:
    """Whether the plan is the matrix product that a 1x1 convolution in channels_last is, which Inductor turns it to.

    Torch's own there keeps what follows fused and its weights packed: MobileNetV2, rewritten, lost 15 % frozen and 10 %
    in training, by plans that gained up to a third in eager calls. On one axis there is no such layout.
    """
    return (
        len(site.members) == 1
        and site.members[0].kind == "conv"
        and plans.forward.problem.axes > 1
        and is_pointwise(plans.forward.problem)
        and all(p.choice.backend in ("native", "gather") and p.source is not Source.PINNED for p in plans_needed(plans))
        and plans.forward.problem.device.kind == "cpu"
    )


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
        and site.members[0].kind == "conv"
        and plans.forward.choice.backend == "native"
        and (not is_half(problem) or has_kernels(problem.dtype))
        and plans.forward.source is not Source.PINNED
    )


def pads_itself(site: Site, plans: Plans) -> bool:
    """Whether torch's own convolution, told to pad, is the plan: it takes the site's place, and Inductor's care of it.

    An op of ours would part the backward, which makes both gradients in one call, for nothing but the padding.
    """
    return (
        plans.plain
        and site.folded
        and site.as_written is None
        and [(member.kind, member.made) for member in site.members] == [("conv", None)]
        and all(before == after for before, after in site.members[0].padding)
    )


def _pays_for_op(plans: Plans) -> bool:
    """Whether the measured gains outweigh leaving the graph; without measurements, assume so."""
    needed = plans_needed(plans)
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
    needed = plans_needed(plans)
    return any(p.choice.config.get("layout") == site.layout for p in needed)


def _sum_pays(plans: Plans) -> bool:
    """Whether one call beats the sum as written; adding up grids natively *is* the sum as written.

    A record says so outright: what it was measured against includes that sum. A prediction must be clear.
    """
    needed = plans_needed(plans)
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
        site.where, site.source, site.kind, rewritten, reason, site.problem, plans,
        site.dynamic and rewritten and plans is not None and not pads_itself(site, plans),
        site.taps, site.made, site.note,
    )  # fmt: skip
