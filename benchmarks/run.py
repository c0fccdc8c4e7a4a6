"""Time a suite of layers: native in both layouts against adaptconv in both, interleaved in one run.

``python -m benchmarks.run --suite quick --tune --out benchmarks/results/NAME.json``

The ratio is native's better layout over adaptconv's better layout, so a layout that torch would merely have
liked better does not count as a gain. For taps that are no regular grid, native is what one writes by hand:
the dense-constructed kernel, or the sum of grids, whichever is faster. Under 1.0 is a loss; rows under 0.97
are timed again, longer, before they are believed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from adaptconv import dispatch, measure, trilinear
from adaptconv.backends import Choice, backend_named
from adaptconv.problem import Direction, Problem
from benchmarks.facts import write_results
from benchmarks.suites import SUITES, Layer

DIRECTIONS = {"forward": Direction.FORWARD, "dx": Direction.GRAD_INPUT, "dw": Direction.GRAD_WEIGHT}
SUSPICIOUS = 0.97


@dataclass(frozen=True, slots=True)
class Row:
    """One layer in one direction; times are 20th percentiles in milliseconds.

    Attributes:
        layer, direction: which.
        native_ms: layout -> plain native.
        adaptconv_ms: layout -> the plan dispatch made.
        plans: layout -> that plan and where it came from.
        ratio: best native over best adaptconv.
        rounds: interleaved rounds behind it.
    """

    layer: str
    direction: str
    native_ms: dict[str, float]
    adaptconv_ms: dict[str, float]
    plans: dict[str, str]
    ratio: float
    rounds: int


def main(argv: Sequence[str] | None = None) -> int:
    """Tune if asked, time, print the table, write the file."""
    arguments = _arguments(argv)
    device = torch.device(arguments.device)
    layers = [layer for layer in SUITES[arguments.suite] if not arguments.only or layer.name in arguments.only]
    directions = [DIRECTIONS[name] for name in arguments.directions]
    if arguments.tune:
        from adaptconv.tuner import tune_problems

        problems = [p for layer in layers for d in directions for p in problems_of(layer, d, device).values()]
        print(tune_problems(problems, budget_s=arguments.budget, force=arguments.force, progress=True), flush=True)
    rows = []
    for layer in layers:
        for direction in directions:
            row = timed(layer, direction, device, arguments.seconds)
            if row.ratio < SUSPICIOUS:
                row = timed(layer, direction, device, 4 * arguments.seconds)
            rows.append(row)
            print(f"{row.layer} {row.direction}: {row.ratio:.2f}x", file=sys.stderr, flush=True)
    print(tabulate([_cells(row) for row in rows], headers=_HEADER, tablefmt="github"))
    print(_summary(rows))
    if arguments.out:
        write_results(arguments.out, device, suite=arguments.suite, rows=[asdict(row) for row in rows])
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="quick")
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="these layers of the suite")
    parser.add_argument("--directions", nargs="+", choices=list(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tune", action="store_true", help="tune what the database does not know yet, first")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="tuning time in all (about 3 s a problem)")
    parser.add_argument("--force", action="store_true", help="tune again what is known")
    parser.add_argument("--seconds", type=float, default=1.5, help="timing a layer and direction (1.5)")
    parser.add_argument("--out", type=Path, help="write JSON here")
    return parser.parse_args(argv)


def problems_of(layer: Layer, direction: Direction, device: torch.device) -> dict[str, Problem]:
    """The layer's problem by layout; a 1-D layer has only one."""
    layouts = ("contiguous",) if len(layer.spatial) == 1 else ("contiguous", "channels_last")
    return {layout: layer.problem(direction, layout, device) for layout in layouts}


def operands(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random operands of a problem, in its layout."""

    def normal(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device).mul_(scale).to(problem.torch_dtype)

    fan_in = max(problem.weight_shape[1] * problem.weight_shape[2], 1)
    x = normal(problem.input_shape).contiguous(memory_format=problem.memory_format)
    dy = normal(problem.output_shape).contiguous(memory_format=problem.memory_format)
    w = normal(problem.weight_shape, fan_in**-0.5)
    return {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}[problem.direction]


def timed(layer: Layer, direction: Direction, device: torch.device, seconds: float) -> Row:
    """Time one layer in one direction, every variant interleaved."""
    calls: dict[str, Callable[[], object]] = {}
    plans: dict[str, str] = {}
    for layout, problem in problems_of(layer, direction, device).items():
        a, b = operands(problem, device)
        for choice in native_choices(problem):
            calls[f"native {layout} {choice.backend}"] = _call(problem, choice, a, b)
        plan = dispatch.plan(problem)
        plans[layout] = f"{plan.choice} ({plan.source})"
        calls[f"adaptconv {layout}"] = partial(trilinear.execute, plan, a, b)
    with torch.no_grad():
        timings = measure.interleave(calls, budget_s=seconds, device=device)
    times = {name: timing.p20_us / 1e3 for name, timing in timings.items()}
    native = {layout: min(ms for name, ms in times.items() if name.startswith(f"native {layout} ")) for layout in plans}
    ours = {layout: times[f"adaptconv {layout}"] for layout in plans}
    rounds = min(timing.rounds for timing in timings.values())
    return Row(layer.name, str(direction), native, ours, plans, min(native.values()) / min(ours.values()), rounds)


def native_choices(problem: Problem) -> list[Choice]:
    """What one would write with torch alone: its own call, or dense and dual where the taps are no grid."""
    accepting = [backend_named(name) for name in ("native", "dense", "dual")]
    choices = [backend.default(problem) for backend in accepting if not backend.rejects(problem)]
    return choices[:1] if choices[0].backend == "native" else choices


def _call(problem: Problem, choice: Choice, a: Tensor, b: Tensor) -> Callable[[], object]:
    run = backend_named(choice.backend).run
    return lambda: run(problem, choice.config, a, b)


_HEADER = ("layer", "direction", "native nchw ms", "native nhwc ms", "ours nchw ms", "ours nhwc ms", "ratio", "plan")


def _cells(row: Row) -> list[str]:
    def ms(times: dict[str, float], layout: str) -> str:
        return f"{times[layout]:.3g}" if layout in times else "-"

    best = min(row.adaptconv_ms, key=lambda layout: row.adaptconv_ms[layout])
    return [
        row.layer, row.direction, ms(row.native_ms, "contiguous"), ms(row.native_ms, "channels_last"),
        ms(row.adaptconv_ms, "contiguous"), ms(row.adaptconv_ms, "channels_last"), f"{row.ratio:.2f}",
        f"{best}: {row.plans[best]}",
    ]  # fmt: skip


def _summary(rows: Sequence[Row]) -> str:
    if not rows:
        return "no layer matched"
    ratios = torch.tensor([row.ratio for row in rows], dtype=torch.float64)
    worst = min(rows, key=lambda row: row.ratio)
    return (
        f"{len(rows)} rows; ratio to native's best layout: geometric mean {ratios.log().mean().exp():.2f}x, "
        f"least {worst.ratio:.2f}x ({worst.layer} {worst.direction}), most {ratios.max():.1f}x; "
        f"{int((ratios < SUSPICIOUS).sum())} under {SUSPICIOUS}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
