"""How far a plan is from the best there is: ``python -m benchmarks.regret`` and ``... --exhaustive``.

Every problem of a suite that the database knows is timed, all contenders interleaved in one run.

As it stands: what predictions alone cost. The plan that dispatch makes from predicted costs, which is what an empty
database gives, against the plan that the record names. Regret is the first's time over the second's, 1.0 where they are
the same plan (those are not timed). With ``--native`` the plain torch call is timed too: how far predictions are from
never losing.

With ``--exhaustive``: what the tuner has missed. Every configuration of every backend that accepts the problem is
checked against float64 and timed, save those that are over six times slower in their first calls; then the tuned plan
and the few best once more. Regret is the tuned plan's time over the fastest one's. The exit status is 1 if a candidate
gave a wrong result.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

from adaptconv import dispatch, measure, trilinear
from adaptconv.dispatch import Plan, Source
from adaptconv.tuner.entrants import by_hand
from benchmarks.facts import machine_facts, must_keep_freed_memory, write_results
from benchmarks.layers.exhaustive import Searched, searched
from benchmarks.layers.tensors import DIRECTIONS, problems_of, tensors_of
from benchmarks.suites import SUITES, Layer, check_layers


@dataclass(frozen=True, slots=True)
class Row:
    """One problem under predictions; times are 20th percentiles in milliseconds.

    Attributes:
        layer, direction, layout: which.
        predicted, tuned: the two plans.
        predicted_ms, tuned_ms: their times; nan where the plans are the same.
        regret: predicted over tuned.
        native_ratio: the best plain torch call over the predicted plan; nan where not timed.
    """

    layer: str
    direction: str
    layout: str
    predicted: str
    tuned: str
    predicted_ms: float
    tuned_ms: float
    regret: float
    native_ratio: float


def main(argv: Sequence[str] | None = None) -> int:
    """Time, print the rows with regret and the summary, write the file after every row; 1 if a result is wrong."""
    arguments = _arguments(argv)
    if arguments.keep_memory:
        must_keep_freed_memory()
    device = torch.device(arguments.device)
    facts = machine_facts(device) if arguments.out else None
    rows: list[Row | Searched] = []
    unknown = 0
    for layer, name, layout, tuned in _plans(arguments, device):
        if tuned.source is not Source.RECORD:
            unknown += 1
            continue
        if arguments.exhaustive:
            rows.append(searched((layer.name, name, layout), tuned, device, arguments.seconds))
        else:
            rows.append(_timed(layer, name, layout, tuned, device, arguments))
        print(f"{layer.name} {name} {layout}: {rows[-1].regret:.2f}", file=sys.stderr, flush=True)
        if arguments.out:
            write_results(
                arguments.out, device, facts=facts, suite=arguments.suite, exhaustive=arguments.exhaustive,
                seconds=arguments.seconds, keep_memory=arguments.keep_memory, unknown=unknown,
                rows=[asdict(row) for row in rows],
            )  # fmt: skip
    print(_table(rows))
    print(_summary(rows, unknown))
    wrong = [f"WRONG: {row.layer} {row.direction} {row.layout}: {text}" for row in rows for text in _wrong_of(row)]
    print("\n".join(wrong), end="\n" if wrong else "")
    return 1 if wrong else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.regret", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="these layers of the suite")
    parser.add_argument("--directions", nargs="+", choices=list(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--native", action="store_true", help="time the plain torch call too")
    parser.add_argument("--exhaustive", action="store_true", help="against everything there is, not predictions")
    parser.add_argument("--seconds", type=float, default=0.5, help="timing a problem (0.5; twice that if exhaustive)")
    parser.add_argument("--keep-memory", action="store_true", help="as for benchmarks.run")
    parser.add_argument("--out", type=Path, help="write JSON here, after every problem")
    arguments = parser.parse_args(argv)
    check_layers(parser, arguments.suite, arguments.only)
    if arguments.exhaustive and arguments.native:
        parser.error("--native belongs to predictions; --exhaustive times torch's own call anyway")
    return arguments


def _plans(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[Layer, str, str, Plan]]:
    for layer in SUITES[arguments.suite]:
        if arguments.only and layer.name not in arguments.only:
            continue
        for name in arguments.directions:
            for layout, problem in problems_of(layer, DIRECTIONS[name], device).items():
                yield layer, name, layout, dispatch.plan(problem)


def _timed(
    layer: Layer, direction: str, layout: str, tuned: Plan, device: torch.device, arguments: argparse.Namespace
) -> Row:  # fmt: skip
    problem = tuned.problem
    predicted = dispatch.plan_from_costs(problem)
    same = predicted.choice == tuned.choice
    plans = {"predicted": predicted} if same else {"predicted": predicted, "tuned": tuned}
    if same and not arguments.native:
        return Row(layer.name, direction, layout, predicted.text, tuned.text, math.nan, math.nan, 1.0, math.nan)
    a, b = tensors_of(layer, layout, device).operands(problem.direction)
    calls: dict[str, Callable[[], object]] = {n: partial(trilinear.execute, plan, a, b) for n, plan in plans.items()}
    if arguments.native:
        for choice in by_hand(problem):
            plan = dispatch.plan_from_choice(problem, choice, Source.PINNED, "native")
            calls[f"native {choice.backend}"] = partial(trilinear.execute, plan, a, b)
    with torch.no_grad():
        timings = measure.interleave(calls, budget_s=arguments.seconds, device=device)
    ms = {name: timing.p20_us / 1e3 for name, timing in timings.items()}
    native = min((time for name, time in ms.items() if name.startswith("native")), default=math.nan)
    tuned_ms = ms.get("tuned", ms["predicted"])
    return Row(
        layer.name, direction, layout, predicted.text, tuned.text, ms["predicted"], tuned_ms,
        ms["predicted"] / tuned_ms, native / ms["predicted"],
    )  # fmt: skip


def _wrong_of(row: Row | Searched) -> list[str]:
    return row.wrong if isinstance(row, Searched) else []


def _table(rows: Sequence[Row | Searched]) -> str:
    """The rows with regret worth the name, worst first."""
    cells = []
    for row in sorted(rows, key=lambda row: -row.regret):
        if row.regret <= (1.02 if isinstance(row, Searched) else 1.05):
            continue
        start, end = [row.layer, row.direction, row.layout], [f"{row.regret:.2f}"]
        if isinstance(row, Searched):
            cells.append([*start, row.tuned, row.best, f"{row.tuned_ms:.3g}", f"{row.best_ms:.3g}", *end,
                          f"{row.timed}/{row.candidates}"])  # fmt: skip
        else:
            cells.append([*start, row.predicted, row.tuned, f"{row.predicted_ms:.3g}", f"{row.tuned_ms:.3g}", *end,
                          f"{row.native_ratio:.2f}"])  # fmt: skip
    exhaustive = any(isinstance(row, Searched) for row in rows)
    first, second, last = ("tuned", "best", "timed") if exhaustive else ("predicted", "tuned", "vs native")
    headers = ("layer", "direction", "layout", first, second, f"{first} ms", f"{second} ms", "regret", last)
    return str(tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True))


def _summary(rows: Sequence[Row | Searched], unknown: int) -> str:
    if not rows:
        return f"the database knows none of the {unknown} problems: tune first, python -m benchmarks.run --tune"
    worst = max(rows, key=lambda row: row.regret)
    mean = math.exp(math.fsum(math.log(row.regret) for row in rows) / len(rows))
    searches = [row for row in rows if isinstance(row, Searched)]
    what = "tuned plans against every candidate" if searches else "predictions"
    text = (
        f"{len(rows)} problems, {unknown} more without a record; regret of {what}: geometric mean {mean:.3f}, "
        f"worst {worst.regret:.2f} ({worst.layer} {worst.direction} {worst.layout}), "
        f"{sum(row.regret > 1.1 for row in rows)} over 1.1, {sum(row.regret > 2 for row in rows)} over 2"
    )
    if searches:
        tried, unsound = sum(row.candidates for row in searches), sum(row.unsound for row in searches)
        return f"{text}; {tried} candidates, {sum(row.timed for row in searches)} of them timed, {unsound} unsound"
    ratios = [row.native_ratio for row in rows if isinstance(row, Row) and not math.isnan(row.native_ratio)]
    if ratios:
        text += f"; against native: least {min(ratios):.2f}x, {sum(r < 0.97 for r in ratios)} under 0.97"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
