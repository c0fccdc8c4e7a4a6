"""What predictions alone cost: the plan of an empty database against the tuned one, ``python -m benchmarks.regret``.

Every problem of a suite that the database knows is timed under two plans, interleaved in one run: the one that
dispatch makes from predicted costs, and the one its record names. Regret is the first over the second, 1.0 where
they are the same plan (those are not timed). With ``--native`` the plain torch call is timed too: how far
predictions are from never losing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

from adaptconv import dispatch, measure, trilinear
from adaptconv.dispatch import Plan, Source
from benchmarks.facts import write_results
from benchmarks.run import DIRECTIONS, native_choices, operands, problems_of
from benchmarks.suites import SUITES


@dataclass(frozen=True, slots=True)
class Row:
    """One problem; times are 20th percentiles in milliseconds.

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
    """Time, print the rows with regret and the summary, write the file."""
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    rows, unknown = [], 0
    for layer in SUITES[arguments.suite]:
        for name, direction in DIRECTIONS.items():
            for layout, problem in problems_of(layer, direction, device).items():
                tuned = dispatch.plan(problem)
                if tuned.source is not Source.RECORD:
                    unknown += 1
                    continue
                row = _timed(layer.name, name, layout, tuned, device, arguments)
                rows.append(row)
                print(f"{row.layer} {row.direction} {row.layout}: {row.regret:.2f}", file=sys.stderr, flush=True)
    cells = [
        [r.layer, r.direction, r.layout, r.predicted, r.tuned, f"{r.predicted_ms:.3g}", f"{r.tuned_ms:.3g}",
         f"{r.regret:.2f}", f"{r.native_ratio:.2f}"]
        for r in sorted(rows, key=lambda r: -r.regret) if r.regret > 1.05
    ]  # fmt: skip
    headers = ("layer", "direction", "layout", "predicted", "tuned", "predicted ms", "tuned ms", "regret", "vs native")
    print(tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True))
    print(_summary(rows, unknown))
    if arguments.out:
        write_results(arguments.out, device, suite=arguments.suite, rows=[asdict(row) for row in rows])
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.regret", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--native", action="store_true", help="time the plain torch call too")
    parser.add_argument("--seconds", type=float, default=0.5, help="timing a problem (0.5)")
    parser.add_argument("--out", type=Path, help="write JSON here")
    return parser.parse_args(argv)


def _timed(
    layer: str, direction: str, layout: str, tuned: Plan, device: torch.device, arguments: argparse.Namespace
) -> Row:  # fmt: skip
    problem = tuned.problem
    predicted = dispatch.plan_from_costs(problem)
    same = predicted.choice == tuned.choice
    plans = {"predicted": predicted} if same else {"predicted": predicted, "tuned": tuned}
    if same and not arguments.native:
        return Row(layer, direction, layout, predicted.text, tuned.text, math.nan, math.nan, 1.0, math.nan)
    a, b = operands(problem, device)
    calls: dict[str, Callable[[], object]] = {n: partial(trilinear.execute, plan, a, b) for n, plan in plans.items()}
    if arguments.native:
        for choice in native_choices(problem):
            plan = dispatch.plan_from_choice(problem, choice, Source.PINNED, "native")
            calls[f"native {choice.backend}"] = partial(trilinear.execute, plan, a, b)
    with torch.no_grad():
        timings = measure.interleave(calls, budget_s=arguments.seconds, device=device)
    ms = {name: timing.p20_us / 1e3 for name, timing in timings.items()}
    native = min((time for name, time in ms.items() if name.startswith("native")), default=math.nan)
    tuned_ms = ms.get("tuned", ms["predicted"])
    return Row(
        layer, direction, layout, predicted.text, tuned.text, ms["predicted"], tuned_ms, ms["predicted"] / tuned_ms,
        native / ms["predicted"],
    )  # fmt: skip


def _summary(rows: Sequence[Row], unknown: int) -> str:
    if not rows:
        return f"the database knows none of the {unknown} problems: tune first, python -m benchmarks.run --tune"
    worst = max(rows, key=lambda row: row.regret)
    mean = math.exp(math.fsum(math.log(row.regret) for row in rows) / len(rows))
    text = (
        f"{len(rows)} problems, {unknown} more without a record; regret of predictions: geometric mean {mean:.3f}, "
        f"worst {worst.regret:.2f} ({worst.layer} {worst.direction} {worst.layout}), "
        f"{sum(row.regret > 2 for row in rows)} over 2"
    )
    ratios = [row.native_ratio for row in rows if not math.isnan(row.native_ratio)]
    if ratios:
        text += f"; against native: least {min(ratios):.2f}x, {sum(r < 0.97 for r in ratios)} under 0.97"
    return text


if __name__ == "__main__":
    raise SystemExit(main())
