"""What a problem gets that was not tuned itself, but one like it was: ``python -m benchmarks.nearby``.

Every layer of a suite is changed as people change layers: another batch, another map, other channels, another window.
Where the database knows the changed problem, or nothing near it, it is left out; else the plan that dispatch carries
over from the nearest record is timed, interleaved with torch's own call (for taps that are no grid, with the better of
what one would write by hand) and with the plan of predictions alone. Ratios are torch's time over ours: under 1.0 is a
loss. Which changes are made is drawn with ``--seed``; times are 20th percentiles.
"""

from __future__ import annotations

import argparse
import math
import random
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
from benchmarks.layers.changes import changed
from benchmarks.layers.tensors import DIRECTIONS, problems_of, tensors_of
from benchmarks.suites import SUITES, Layer, check_layers

_LOSS = 0.97
_TOLD = 1.5  # times the fastest of the run, from which on a row is in the table


@dataclass(frozen=True, slots=True)
class Row:
    """One changed problem; times are 20th percentiles in milliseconds.

    Attributes:
        layer, change, direction, layout: which.
        plan, why: what dispatch decided, and its reason.
        predicted: the plan of predictions alone.
        torch_ms, plan_ms, predicted_ms: their times.
        ratio: torch over the plan.
        predicted_ratio: torch over the predicted plan.
    """

    layer: str
    change: str
    direction: str
    layout: str
    plan: str
    why: str
    predicted: str
    torch_ms: float
    plan_ms: float
    predicted_ms: float
    ratio: float
    predicted_ratio: float


def main(argv: Sequence[str] | None = None) -> int:
    """Time, print the rows that lose or leave much, and the summary; write the file after every problem."""
    arguments = _arguments(argv)
    if arguments.keep_memory:
        must_keep_freed_memory()
    device = torch.device("cpu")
    facts = machine_facts(device) if arguments.out else None
    rows: list[Row] = []
    for layer, change, name, layout, plan in _plans(arguments, device):
        row = _timed(layer, change, name, layout, plan, device, arguments.seconds)
        rows.append(row)
        print(f"{layer.name} {change} {name} {layout}: {row.ratio:.2f}x", file=sys.stderr, flush=True)
        if arguments.out:
            write_results(
                arguments.out, device, facts=facts, suite=arguments.suite, seed=arguments.seed,
                changes=arguments.changes, seconds=arguments.seconds, keep_memory=arguments.keep_memory,
                rows=[asdict(row) for row in rows],
            )  # fmt: skip
    print(_table(rows))
    print(_summary(rows))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.nearby", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="these layers of the suite")
    parser.add_argument("--changes", type=int, default=2, metavar="N", help="so many changes of each layer (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    parser.add_argument("--seconds", type=float, default=0.5, help="timing a problem (0.5)")
    parser.add_argument("--keep-memory", action="store_true", help="as for benchmarks.run")
    parser.add_argument("--out", type=Path, help="write JSON here, after every problem")
    arguments = parser.parse_args(argv)
    check_layers(parser, arguments.suite, arguments.only)
    return arguments


def _plans(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[Layer, str, str, str, Plan]]:
    draw = random.Random(arguments.seed)
    for layer in SUITES[arguments.suite]:
        every = list(changed(layer))
        drawn = sorted(every, key=lambda _: draw.random())[: arguments.changes]  # drawn for all: --only changes nothing
        if arguments.only and layer.name not in arguments.only:
            continue
        for change, other in drawn:
            for name, direction in DIRECTIONS.items():
                for layout, problem in problems_of(other, direction, device).items():
                    plan = dispatch.plan(problem)
                    if plan.source is Source.NEAREST:
                        yield other, change, name, layout, plan


def _timed(
    layer: Layer, change: str, direction: str, layout: str, plan: Plan, device: torch.device, seconds: float
) -> Row:  # fmt: skip
    problem = plan.problem
    predicted = dispatch.plan_from_costs(problem)
    own = [dispatch.plan_from_choice(problem, choice, Source.PINNED, "by hand") for choice in by_hand(problem)]
    a, b = tensors_of(layer, layout, device).operands(problem.direction)
    plans = {each.text: each for each in (plan, predicted, *own)}  # what is the same is timed once
    calls: dict[str, Callable[[], object]] = {
        text: partial(trilinear.execute, each, a, b) for text, each in plans.items()
    }  # fmt: skip
    with torch.no_grad():
        timings = measure.interleave(calls, budget_s=seconds if len(calls) > 1 else 0.0, device=device)
    ms = {text: timing.p20_us / 1e3 for text, timing in timings.items()}
    torch_ms = min(ms[each.text] for each in own)
    return Row(
        layer.name, change, direction, layout, plan.text, plan.why, predicted.text, torch_ms, ms[plan.text],
        ms[predicted.text], torch_ms / ms[plan.text], torch_ms / ms[predicted.text],
    )  # fmt: skip


def _table(rows: Sequence[Row]) -> str:
    """The rows that lose to torch or to the predicted plan, worst first."""
    told = [row for row in rows if row.ratio < _LOSS or row.plan_ms > _TOLD * min(row.torch_ms, row.predicted_ms)]
    cells = [
        [row.layer, row.change, row.direction, row.layout, row.plan, row.predicted, f"{row.ratio:.2f}",
         f"{row.predicted_ratio:.2f}"]
        for row in sorted(told, key=lambda row: row.ratio)
    ]  # fmt: skip
    headers = ("layer", "change", "direction", "layout", "plan", "predicted", "ratio", "of the predicted")
    return str(tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True))


def _summary(rows: Sequence[Row]) -> str:
    if not rows:
        return "the database knows nothing near these layers: tune first, python -m benchmarks.run --tune"
    texts = []
    for what, ratios in (
        ("carried over from the nearest record", [row.ratio for row in rows]),
        ("predictions alone", [row.predicted_ratio for row in rows]),
    ):
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        texts.append(f"{what}: {mean:.2f}x, least {min(ratios):.2f}x, {sum(r < _LOSS for r in ratios)} under {_LOSS}")
    return f"{len(rows)} problems near tuned ones, against torch's own call; " + "; ".join(texts)


if __name__ == "__main__":
    raise SystemExit(main())
