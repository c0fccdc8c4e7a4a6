"""Time a suite of layers: all that torch has against all that adaptconv has, interleaved in one run.

``python -m benchmarks.run --suite quick --tune --out benchmarks/results/NAME.json --chart PNG``

Torch's side, for each layer and direction: eager, torch.compile, and forward torch.compile with Inductor's freezing;
each with contiguous and channels_last operands, and for taps that are no regular grid as a dense-constructed kernel
and as a sum of convolutions. Ours: the eager call as dispatch plans it, and forward ``adaptconv.optimize``, without and
with freezing. The ratio is torch's fastest over our fastest, so that a layout or a compiler that torch would merely
have liked better is no gain; under 1.0 is a loss. Rows under 0.97 are timed again, longer, before they are believed.
"vs eager" compares the eager calls of both sides alone; "over limit" is our fastest over what the machine's copy
bandwidth and matrix product allow, both measured in the same run.

Every result is compared with float64 first. One is wrong, and the exit status 1, where its relative error is over four
times that of torch's eager calls (and over a few roundings of the dtype).
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.facts import machine_facts, merged, must_keep_freed_memory, read_rows, write_results
from benchmarks.layers.rows import Row, measured
from benchmarks.layers.summary import means, summary, table
from benchmarks.layers.tensors import DIRECTIONS, problems_of
from benchmarks.layers.variants import LEVELS
from benchmarks.limits import rates
from benchmarks.suites import SUITES, Layer

Key = tuple[str, str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Tune if asked, time, print the tables, write the file and the chart; 1 if a result is wrong."""
    arguments = _arguments(argv)
    rows: list[dict[str, Any]] = []
    if arguments.draw is None:
        rows = _measured(arguments)
        print(table(rows))
        print(summary(rows))
    if arguments.chart:
        from benchmarks.layers.chart import draw

        draw(json.loads((arguments.draw or arguments.out).read_text(encoding="utf-8")), arguments.chart)
    return 1 if any(row["wrong"] for row in rows) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=sorted(SUITES), default="quick")
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="these layers of the suite")
    parser.add_argument("--list", action="store_true", help="name the layers of the suite and stop")
    parser.add_argument("--directions", nargs="+", choices=list(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument(
        "--rivals", choices=LEVELS, default="all",
        help="eager: nothing is compiled, on either side; compile: with torch.compile and optimize; "
        "all: with freezing, and the dcls package where it has the layer (all)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tune", action="store_true", help="tune what the database does not know yet, first")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="tuning time in all (about 3 s a problem)")
    parser.add_argument("--force", action="store_true", help="tune again what is known")
    parser.add_argument("--seconds", type=float, default=1.5, help="timing a layer and direction (1.5)")
    parser.add_argument(
        "--keep-memory", action="store_true",
        help="have the C library keep freed memory, so that no time is one of page faults, on either side",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="write JSON here, after every row")
    parser.add_argument("--add", action="store_true", help="keep what --out has of other layers and directions")
    parser.add_argument("--resume", action="store_true", help="and skip rows that it has with the same settings")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the ratios in the JSON file")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="measure nothing: draw --chart from this file")
    arguments = parser.parse_args(argv)
    names = [layer.name for layer in SUITES[arguments.suite]]
    unknown = sorted(set(arguments.only or ()) - set(names))
    if arguments.list:
        print("\n".join(f"{layer.name:24} {layer.kind:10} {layer.model}" for layer in SUITES[arguments.suite]))
        parser.exit()
    if unknown:
        parser.error(f"suite {arguments.suite} has no layer {', '.join(unknown)}; --list names them")
    if (arguments.add or arguments.resume) and not arguments.out:
        parser.error("--add and --resume need --out: the file to add to")
    if arguments.chart and not (arguments.out or arguments.draw):
        parser.error("--chart draws from a file: name it with --out, or with --draw to measure nothing")
    if arguments.draw and not arguments.chart:
        parser.error("--draw needs --chart: the picture to make")
    return arguments


def _measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every row asked for, those taken over from the file included."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if arguments.keep_memory:
        must_keep_freed_memory()
    device = torch.device(arguments.device)
    facts = machine_facts(device)
    settings = _settings(arguments, facts)
    old = read_rows(arguments.out) if arguments.out and (arguments.add or arguments.resume) else []
    layers = [layer for layer in SUITES[arguments.suite] if not arguments.only or layer.name in arguments.only]
    asked = [(layer, name) for layer in layers for name in arguments.directions]
    known = {_key(row): row for row in old if arguments.resume and row.get("settings") == settings}
    due = [(layer, name) for layer, name in asked if _asked_key(layer, name) not in known]
    if arguments.tune:
        _tune(due, device, arguments)
    limits = {dtype: rates(device, dtype) for dtype in sorted({layer.dtype for layer, _ in due})}
    new: list[dict[str, Any]] = []
    for layer, name in due:
        row = measured(
            layer, DIRECTIONS[name], device, limits[layer.dtype],
            level=arguments.rivals, seconds=arguments.seconds, settings=settings,
        )  # fmt: skip
        new.append(row.as_json())
        _say(row, len(new), len(due))
        if arguments.out:
            rows = merged(old, new, _key)
            write_results(
                arguments.out, device, facts=facts, limits=limits, suite=arguments.suite, means=means(rows), rows=rows
            )
    found = known | {_key(row): row for row in new}
    return [found[_asked_key(layer, name)] for layer, name in asked]


def _settings(arguments: argparse.Namespace, facts: dict[str, object]) -> dict[str, Any]:
    """What two rows must share for one to stand for the other."""
    return {
        "rivals": arguments.rivals, "seconds": arguments.seconds, "keep_memory": arguments.keep_memory,
        "device": facts["device"],
        "toolchain": facts["toolchain"], "adaptconv": facts["adaptconv"],
    }  # fmt: skip


def _key(row: dict[str, Any]) -> Key:
    return row["layer"], row["dtype"], row["direction"]


def _asked_key(layer: Layer, name: str) -> Key:
    return layer.name, layer.dtype, str(DIRECTIONS[name])


def _tune(due: Sequence[tuple[Layer, str]], device: torch.device, arguments: argparse.Namespace) -> None:
    from adaptconv.tuner import tune_problems

    problems = [p for layer, name in due for p in problems_of(layer, DIRECTIONS[name], device).values()]
    if problems:
        print(tune_problems(problems, budget_s=arguments.budget, force=arguments.force, progress=True), flush=True)


def _say(row: Row, done: int, of: int) -> None:
    text = f"[{done}/{of}] {row.layer} {row.direction}: {row.ratio:.2f}x, {row.native_ratio:.2f}x vs eager"
    print(
        f"{text}, {row.seconds} s", *(f"WRONG: {reason}" for reason in row.wrong), sep="\n", file=sys.stderr, flush=True
    )


if __name__ == "__main__":
    raise SystemExit(main())
