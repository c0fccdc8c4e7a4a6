"""Agreement: ranks that read different tuning databases compile the same plans.

Why it matters. Every plan is exact, and none communicates, so that ranks with different plans still answer right; but
the slowest sets the pace, replicas drift apart by rounding, and Inductor orders a graph's own collectives by the code
around them: ranks with different code may order them differently, and wait for each other for ever.

How. The first rank to decide about a site says so in the default process group's store; whoever comes to the same site
later takes that decision, with one warning if its own would have been another. Nobody waits: ranks may compile other
graphs, in another order, or fewer. What was weighed:

- An error where ranks differ is loud, but one rank's raising leaves the others in their next collective, until the
  group's timeout (30 minutes for gloo); and a record more on one machine would stop a training run.
- Predictions alone, where ranks differ, would be the same plans on all. But the first has compiled by its records
  before the second can tell it.
- One rank deciding for all would have the rest wait for a rank that may never compile that graph.

So with different databases it is a race whose plans are taken, and the warning says how to end that: give all ranks
one database. A site is its problem, device included: ranks on different processors decide apart, since a plan is a
statement about a processor. Pinned plans are the program's own word and are not exchanged. Extents known at run time
only, eager calls, and stock ``torch.compile`` are planned by each rank's own database.
"""

from __future__ import annotations

import json
import logging
import warnings

import torch

from adaptconv import records
from adaptconv.backends import backend_named
from adaptconv.compile.judging import SiteReport, report
from adaptconv.compile.sites import Site
from adaptconv.dispatch import Source
from adaptconv.errors import AdaptConvError, BackendRejected
from adaptconv.problem import Problem
from adaptconv.ranks import RanksDisagree, first_said, rank_and_world
from adaptconv.trilinear import Plans, plans_from_text

_LOG = logging.getLogger("adaptconv.compile")
_databases: list[str] = []
_warned = False


def agreed(site: Site, own: Site, verdict: SiteReport) -> tuple[Site, SiteReport]:
    """The decision about a site that every rank takes.

    Args:
        site: the site as it was found.
        own: the site as this rank would rewrite it: ``site``, or ``site.stated()``.
        verdict: what this rank decided.

    Returns:
        The site as it is to be rewritten, and the verdict: this rank's, or that of the rank that decided first.
    """
    rank, world = rank_and_world()
    if world < 2 or verdict.plans is None or _is_pinned(verdict.plans):
        return own, verdict
    mine = {"stated": own is not site, "rewritten": verdict.rewritten, "plans": verdict.plans.text}
    said = json.loads(first_said(_topic(site), json.dumps({**mine, "reason": verdict.reason, "rank": rank})))
    if {name: said.get(name) for name in mine} == mine:
        return own, verdict
    chosen = site.stated() if said["stated"] else site
    assert chosen.problem is not None
    try:
        plans = _read(chosen.problem, said["plans"])
    except AdaptConvError as error:
        what = f"cannot run its plan, {said['plans']}, and keeps its own, {mine['plans']} ({error})"
        _tell(site, said["rank"], rank, what)
        return own, verdict
    _tell(site, said["rank"], rank, f"would have taken {mine['plans']}, and takes its decision: {said['plans']}")
    return chosen, report(chosen, said["rewritten"], said["reason"], plans)


def _read(problem: Problem, text: str) -> Plans:
    """Plans by their text, of the very backends that this rank has."""
    plans = plans_from_text(problem, text)
    for plan in (plans.forward, plans.grad_input, plans.grad_weight):
        own = None if plan is None else backend_named(plan.choice.backend).version
        if plan is not None and plan.choice.version != own:
            raise BackendRejected(plan.choice.backend, f"it is version {own} here", problem)
    return plans


def _is_pinned(plans: Plans) -> bool:
    needed = (plans.forward, plans.grad_input, plans.grad_weight)
    return any(p is not None and p.source is Source.PINNED for p in needed)


def _topic(site: Site) -> str:
    """All that a decision about a site rests on, but the database.

    A database that this process has come to since counts on: after tuning, graphs are compiled and decided on anew.
    """
    digest = records.default_store().digest()
    if digest not in _databases:
        _databases.append(digest)
    as_written = site.as_written.key() if site.as_written is not None else ""
    problem = site.problem.key() if site.problem is not None else ""
    kinds = [member.kind for member in site.members]
    facts = (
        "site", site.kind, kinds, problem, as_written, site.made, site.folded, site.layout, site.grad_input,
        site.grad_weight, site.dynamic, torch._inductor.config.freezing, _databases.index(digest),
    )  # fmt: skip
    return repr(facts)


def _tell(site: Site, other: int, rank: int, what: str) -> None:
    global _warned
    where = site.where or site.source or site.kind
    _LOG.info("rank %d decided on %s first; rank %d %s", other, where, rank, what)
    if not _warned:
        _warned = True
        warnings.warn(
            f"adaptconv: ranks read different tuning databases. Rank {other} decided on {where} first; rank {rank} "
            f"{what}. Give every rank one database, say by {records.store.ENVIRONMENT} naming a folder that all can "
            f"read. Further sites are logged, not warned of",
            RanksDisagree,
            stacklevel=2,
        )
