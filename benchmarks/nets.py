"""Whole networks, every variant interleaved in one run: ``python -m benchmarks.nets --tune --train --out FILE``.

Torch's side: eager in both memory formats, ``torch.compile``, and the same with Inductor's freezing (forward only).
Ours: ``adapt`` in both formats, ``optimize``, and that with freezing. The ratio is torch's fastest over our fastest;
under 1.0 is a loss. Where a network takes its layers from the dcls package, torch's side runs that package, and
``optimize`` runs the adapted network. A result is wrong, and the exit status 1, where its error against float64 is
over twice the largest of torch's own variants, and of eager torch on inputs that are off by a rounding (a network may
be ill-conditioned: a ReLU on the other side of zero). Torch goes wrong itself in places (bfloat16 gradients of grouped
convolutions on a CPU): variants a hundred times as far off as its best one, and by over a twentieth, are named, and set
no bound.
Times are 20th percentiles.

"grouped" is the share of eager's time in depthwise and other grouped convolutions, "copies" how many kernels in
Inductor's code for ``torch.compile`` and for ``optimize`` do nothing but move data (layout conversions among them).
Times and ratios on a busy machine say little: look at "load_average" in the file.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tabulate import tabulate

import adaptconv
from adaptconv import measure
from adaptconv.backends.halves import HALVES
from benchmarks.facts import keep_freed_memory, machine_facts, merged, now, read_rows, write_results
from benchmarks.zoo import NETWORKS, Network
from benchmarks.zoo.variants import (
    FLOAT32,
    OURS,
    TORCH,
    Precision,
    Run,
    conditioning,
    copies_in,
    error,
    exact,
    grouped_share,
    made,
    names_for,
)

_CPU = torch.device("cpu")
_ASTRAY = 100.0  # times the least error, beyond which a result of torch's has nothing to do with the truth,
_KINKED = 0.05  # unless it is still as near as this: one ReLU that falls on the other side of zero moves all gradients
_FLOOR = 1e-6  # relative error under which nobody asks which of two float32 results is nearer


@dataclass(slots=True)
class Row:
    """One network, forward or a training step.

    Attributes:
        network, source: which, and where it comes from.
        what: "forward" (evaluation, no gradients) or "training step" (forward, backward, SGD).
        times_ms: variant -> 20th percentile in milliseconds.
        errors: variant -> relative L2 error against float64, of the output and all gradients together.
        conditioning: the largest error of eager torch on inputs that are off by a rounding.
        first_call_s: variant -> seconds of the first call, compilation included; what an earlier variant compiled
            alike comes from Inductor's cache, so these do not compare variants.
        copies: compiled variant -> kernels that only move data.
        failed: variant -> the error that kept it from running.
        wrong: our variants that failed, or whose error is too large.
        torch_wrong: torch's variants whose result is of no use.
        grouped: share of eager's time in grouped convolutions, 0 to 1.
        rounds: interleaved rounds behind the times.
        seconds: wall time of the row, tuning included.
        load_average: of the machine when the row was done.
        measured_on: when that was.
    """

    network: str
    source: str
    what: str
    times_ms: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    conditioning: float = 0.0
    first_call_s: dict[str, float] = field(default_factory=dict)
    copies: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    torch_wrong: list[str] = field(default_factory=list)
    grouped: float = 0.0
    rounds: int = 0
    seconds: float = 0.0
    load_average: float = 0.0
    measured_on: str = ""

    def fastest(self, variants: Sequence[str]) -> str | None:
        """The fastest variant of those named; None if none ran."""
        return min((v for v in variants if v in self.times_ms), key=lambda v: self.times_ms[v], default=None)

    @property
    def ratio(self) -> float | None:
        """Torch's fastest over our fastest."""
        return self._over(self.fastest(TORCH), self.fastest(OURS))

    @property
    def compile_ratio(self) -> float | None:
        """Plain ``torch.compile`` over ``optimize``."""
        return self._over("compile", "optimize")

    def _over(self, theirs: str | None, ours: str | None) -> float | None:
        times = self.times_ms
        return times[theirs] / times[ours] if theirs in times and ours in times else None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the networks asked for; print the table, write the file and the chart."""
    arguments = _arguments(argv)
    if arguments.list:
        print(tabulate([(n.name, n.source, n.shape, n.needs or "torch") for n in NETWORKS.values()], tablefmt="plain"))
        return 0
    rows: list[Row] = []
    if arguments.draw is None:
        rows = _measured(arguments)
    if arguments.chart:
        from benchmarks.zoo.chart import draw

        draw(json.loads((arguments.draw or arguments.out).read_text(encoding="utf-8")), arguments.chart)
    return 1 if any(row.wrong for row in rows) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.nets", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(NETWORKS), help="these networks")
    parser.add_argument("--list", action="store_true", help="name the networks and stop")
    parser.add_argument("--dtype", choices=("float32", *HALVES), default="float32", help="of parameters and inputs")
    parser.add_argument("--autocast", action="store_true", help="parameters stay float32; --dtype is autocast's")
    parser.add_argument("--train", action="store_true", help="training steps as well as forward")
    parser.add_argument("--tune", action="store_true", help="tune what the database does not know yet, first")
    parser.add_argument("--budget", type=float, default=120.0, metavar="SECONDS", help="tuning time a network (120)")
    parser.add_argument("--seconds", type=float, default=8.0, help="timing a network, forward or training (8)")
    parser.add_argument("--rounds", type=int, default=5, help="least rounds, even past --seconds (5)")
    parser.add_argument("--out", type=Path, help="write JSON here, after every network")
    parser.add_argument("--add", action="store_true", help="keep what --out has of other networks")
    parser.add_argument("--chart", type=Path, metavar="PNG", help="draw the ratios in the JSON file")
    parser.add_argument("--resume", action="store_true", help="and skip what is there from this machine and versions")
    parser.add_argument("--keep-memory", action="store_true", help="have the C library keep what is freed")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="measure nothing: draw --chart from this file")
    arguments = parser.parse_args(argv)
    if arguments.chart and not (arguments.out or arguments.draw):
        parser.error("--chart draws from a file: name it with --out, or with --draw to measure nothing")
    if arguments.draw and not arguments.chart:
        parser.error("--draw needs --chart: the picture to make")
    if (arguments.add or arguments.resume) and not arguments.out:
        parser.error("--add and --resume need --out: the file to add to")
    if arguments.autocast and arguments.dtype == "float32":
        parser.error("--autocast needs --dtype bfloat16 or float16: what to narrow to")
    arguments.add |= arguments.resume
    return arguments


# ---- measuring ----------------------------------------------------------------------------------


def _measured(arguments: argparse.Namespace) -> list[Row]:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    precision = Precision(getattr(torch, arguments.dtype), arguments.autocast)
    facts = machine_facts(_CPU) | {
        "keep_memory": arguments.keep_memory and keep_freed_memory(),
        "dtype": arguments.dtype,
        "autocast": arguments.autocast,
    }
    done = _done(arguments.out, facts) if arguments.resume else set()
    rows: list[Row] = []
    for name in arguments.only or NETWORKS:
        network = NETWORKS[name]
        if network.needs and importlib.util.find_spec(network.needs) is None:
            _say(f"{name}: left out, the package {network.needs} is not installed")
            continue
        wanted = ["forward"] + ["training step"] * (arguments.train and network.trains)
        wanted = [what for what in wanted if (name, what) not in done]
        if arguments.tune and wanted:
            _tune(network, arguments.budget, train="training step" in wanted, precision=precision)
        for what in wanted:
            rows.append(measured(network, what, arguments.seconds, arguments.rounds, precision))
            if arguments.out:
                _write(arguments.out, facts, rows, arguments.add)
    print(tabulate([_cells(row) for row in rows], headers=_HEADER, tablefmt="github"))
    print(_summary(rows))
    for row in rows:
        for name, reason in row.failed.items():
            print(f"{row.network}, {row.what}: {name} did not run: {reason}")
        for reason in row.torch_wrong:
            print(f"torch is wrong: {row.network}, {row.what}: {reason}")
        for reason in row.wrong:
            print(f"WRONG: {row.network}, {row.what}: {reason}")
    return rows


def _done(path: Path, facts: dict[str, object]) -> set[tuple[str, str]]:
    """What a file has already, if it is of this machine, these versions and the same settings."""
    if not path.exists():
        return set()
    content = json.loads(path.read_text(encoding="utf-8"))
    same = ("device", "toolchain", "adaptconv", "keep_memory", "dtype", "autocast")
    if any(content["machine"].get(name) != facts[name] for name in same):
        return set()
    return {(row["network"], row["what"]) for row in content["rows"]}


def _tune(network: Network, budget_s: float, *, train: bool, precision: Precision) -> None:
    """Tune what our variants run: as traced, then what the adapted network adds in each memory format."""
    names = [name for name in ("optimize", *OURS) if name in names_for(network, "forward")]
    runs = [name for name in dict.fromkeys(names) if name in ("adapt", "adapt channels_last", "optimize")]
    began = time.monotonic()
    for done, name in enumerate(runs):
        model, inputs, _ = made(name, network, train=train, compiled=False, precision=precision)
        left = budget_s - (time.monotonic() - began)
        with precision.context():
            result = adaptconv.tune(model, inputs, train=train, budget_s=max(1.0, left / min(2, len(runs) - done)))
        _say(f"{network.name}: {name}: {result}")
        torch._dynamo.reset()


def measured(network: Network, what: str, seconds: float, rounds: int, precision: Precision = FLOAT32) -> Row:
    """Check and time every variant of one network.

    Args:
        network: which.
        what: "forward" or "training step".
        seconds: of timing, all variants together.
        rounds: the least number of rounds.
        precision: what it computes in.
    """
    row, began, train = Row(network.name, network.source, what), time.monotonic(), what != "forward"
    runs: dict[str, Run] = {}
    truth = exact(network, train=train, precision=precision)
    with nullcontext() if train else torch.no_grad():
        for name in names_for(network, what):
            _say(f"{network.name}, {what}: {name}")
            start = time.perf_counter()
            try:
                run = Run(name, network, train=train, precision=precision)
                result, row_copies = copies_in(run) if run.compiled else (run.results(), None)
            except Exception as failure:  # noqa: BLE001 - one variant's failure leaves the others their results
                row.failed[name] = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:200]}"
                continue
            row.first_call_s[name] = round(time.perf_counter() - start, 2)
            row.errors[name] = error(result, truth)
            if row_copies is not None:
                row.copies[name] = row_copies
            runs[name] = run
        timings = measure.interleave(runs, budget_s=seconds, device=_CPU, min_rounds=rounds)
        row.grouped = grouped_share(runs["eager"])
    theirs = {name: row.errors[name] for name in TORCH if name in row.errors}
    draws = conditioning(network, truth, train=train, precision=precision)
    sound = _sound([*theirs.values(), *draws])
    row.torch_wrong = [f"{name}: error {found:.1e}" for name, found in theirs.items() if found not in sound]
    row.conditioning = max((found for found in draws if found in sound), default=0.0)
    row.times_ms = {name: timing.p20_us / 1e3 for name, timing in timings.items()}
    row.rounds = min(timing.rounds for timing in timings.values())
    row.wrong = _wrong(row, 2 * max(_FLOOR, *sound))
    row.seconds = round(time.monotonic() - began, 1)
    row.load_average = round(os.getloadavg()[0], 2)
    row.measured_on = now()
    runs.clear()
    torch._dynamo.reset()
    gc.collect()
    _say(f"{network.name}, {what}: {row.ratio or 0:.2f}x, {row.seconds:.0f} s")
    return row


def _sound(errors: Sequence[float]) -> list[float]:
    """The errors that tell what rounding does: not those of results that have nothing to do with the truth."""
    return [error for error in errors if error <= max(_KINKED, _ASTRAY * max(min(errors), _FLOOR))]


def _wrong(row: Row, bound: float) -> list[str]:
    lines = [f"{name} did not run" for name in OURS if name in row.failed]
    for name in OURS:
        if name in row.errors and not row.errors[name] <= bound:
            lines.append(f"{name}: error {row.errors[name]:.1e}, bound {bound:.1e}")
    return lines


# ---- what is said of it -------------------------------------------------------------------------


_HEADER = (
    "network",
    "what",
    *TORCH,
    *OURS,
    "best / best",
    "compile / optimize",
    "grouped",
    "copies",
    "error",
    "eager's",
)


def _cells(row: Row) -> list[str]:
    def ms(name: str) -> str:
        return f"{row.times_ms[name]:.3g}" if name in row.times_ms else "fails" if name in row.failed else "-"

    def times(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio:.2f}x"

    worst = max((row.errors[name] for name in OURS if name in row.errors), default=float("nan"))
    copies = "/".join(str(row.copies.get(name, "-")) for name in ("compile", "optimize"))
    return [
        row.network, row.what, *(ms(name) for name in (*TORCH, *OURS)), times(row.ratio), times(row.compile_ratio),
        f"{row.grouped:.0%}", copies, f"{worst:.1e}", f"{row.errors['eager']:.1e}",
    ]  # fmt: skip


def _summary(rows: Sequence[Row]) -> str:
    groups = {
        "all": list(rows),
        "where grouped convolutions are over 30 %": [row for row in rows if row.grouped >= 0.3],
    }
    groups |= {what: [row for row in rows if row.what == what] for what in ("forward", "training step")}
    parts = []
    for name, some in groups.items():
        ratios = [row.ratio for row in some if row.ratio is not None]
        if ratios:
            mean = torch.tensor(ratios, dtype=torch.float64).log().mean().exp()
            parts.append(
                f"{name}: {len(ratios)} rows, best / best {min(ratios):.2f}x to {max(ratios):.2f}x, mean {mean:.2f}x"
            )
    return "; ".join(parts) or "nothing was measured"


def _write(path: Path, facts: dict[str, object], rows: Sequence[Row], add: bool) -> None:
    new = [{**asdict(row), "ratio": row.ratio, "compile_ratio": row.compile_ratio} for row in rows]
    old = read_rows(path) if add else []
    write_results(path, _CPU, facts=facts, rows=merged(old, new, lambda row: (row["network"], row["what"])))


def _say(text: str) -> None:
    print(f"[nets] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
