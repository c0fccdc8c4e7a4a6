"""Whether a look-alike was left alone and stayed right, in words."""

from __future__ import annotations

from collections.abc import Sequence

from adaptconv.compile.judging import SiteReport
from tests.compared import answer, built, difference, optimized, uncompiled
from tests.lookalikes.base import Lookalike


def verdict(lookalike: Lookalike) -> str:
    """What is wrong with a look-alike, or "".

    Under a pin every site that is found is rewritten, so the reports tell what was taken for what.
    """
    xs = lookalike.inputs()
    model = built(lookalike.make)
    right = answer(model, model, xs, train=lookalike.train)
    for pin in ("gather",) if lookalike.seems else ("gather", "dense"):
        try:
            with uncompiled():
                given, reports, _ = optimized(lookalike.make, xs, pin, train=lookalike.train)
        except Exception as error:  # noqa: BLE001 - a model that runs in torch must run
            return f"{pin}: {type(error).__name__}: {error}"
        wrong = difference(given, right, lookalike.tolerance)
        if wrong:
            return f"{pin}: {wrong}"
        touched = taken(lookalike.seems, reports)
        if touched:
            return f"{pin}: taken for {lookalike.seems}: {touched}"
    return ""


def taken(seems: str, sites: Sequence[SiteReport]) -> list[str]:
    """The sites that were taken for what a look-alike only looks like."""
    known = [(site, site.problem) for site in sites if site.problem is not None]
    if seems == "sum":
        return [site.kind for site, _ in known if site.kind.startswith("sum")]
    if seems == "unfold":
        return [site.kind for site, _ in known if site.kind == "unfold"]
    if seems == "holes":
        holes = [str(problem.taps) for _, problem in known if not problem.taps.is_dense()]
        return [site.made for site, _ in known if site.made] + holes
    if seems == "padding":
        return [str(problem.padding) for _, problem in known if any(map(any, problem.padding))]
    return []
