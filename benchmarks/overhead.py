"""What a warm eager call costs over the same torch operations: ``python -m benchmarks.overhead``.

Tiny convolutions, so that the time is all dispatch. The comparison for a plan that is not native is the very
torch operations that plan runs, called by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from timeit import timeit

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import adaptconv
from adaptconv.backends import backend_named
from adaptconv.modules import AdaptiveConv2d
from benchmarks.facts import machine_facts

Call = Callable[[], object]
_CALLS, _ROUNDS = 1000, 15


def paired_us(theirs: Call, ours: Call) -> tuple[float, float]:
    """Microseconds a call of each, minimum over interleaved rounds."""
    best = [float("inf"), float("inf")]
    for call in (theirs, ours):
        call()
    for _ in range(_ROUNDS):
        for i, call in enumerate((theirs, ours)):
            best[i] = min(best[i], timeit(call, number=_CALLS) / _CALLS * 1e6)
    return best[0], best[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--out", type=Path, help="also write JSON here")
    arguments = parser.parse_args(argv)
    rows = measured()
    print(tabulate(rows, headers=("call", "torch us", "adaptconv us", "overhead us", "goal us"), floatfmt=".2f"))
    if arguments.out:
        facts = machine_facts(torch.device("cpu"))
        arguments.out.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def measured() -> list[list[str | float]]:
    """[what, torch's us, ours, difference, goal] a case."""
    x, w, b = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3), torch.randn(4)
    layer, native = AdaptiveConv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    cases: list[tuple[str, Call, Call, float]] = []

    def function(x: Tensor, w: Tensor) -> tuple[Call, Call]:
        return lambda: F.conv2d(x, w, b, 1, 1), lambda: adaptconv.conv2d(x, w, b, 1, 1)

    rows: list[list[str | float]] = []
    with torch.no_grad():
        cases = [
            ("function, native plan, no_grad", *function(x, w), 3.0),
            ("module, native plan, no_grad", lambda: native(x), lambda: layer(x), 3.0),
        ]
        rows += [_row(*case) for case in cases]
    rows.append(_row("function, native plan, with grad", *function(x, w.clone().requires_grad_()), 3.0))
    rows.append(_row("module, native plan, with grad", lambda: native(x), lambda: layer(x), 3.0))
    for knobs in ({"layout": "channels_last"}, {"pad": "explicit"}):
        with adaptconv.pinned("native", **knobs):
            rows += _planned("native " + ",".join(knobs.values()), x, w, b)
    for backend in ("dense", "gather"):
        with adaptconv.pinned(backend):
            rows += _planned(backend, x, w, b)
    return rows


def _planned(what: str, x: Tensor, w: Tensor, b: Tensor) -> list[list[str | float]]:
    """Rows for the backend pinned now: its run called by hand against the whole dispatched call."""
    call = adaptconv.functional.prepared(2, x, w, b, 1, 1, 1, 1, None)
    assert call.plans is not None
    plan = call.plans.forward
    run, problem, config = backend_named(plan.choice.backend).run, plan.problem, plan.choice.config
    taught = w.clone().requires_grad_()
    rows = []
    with torch.no_grad():
        rows.append(
            _row(f"function, {what} plan, no_grad", lambda: run(problem, config, x, w.flatten(2), b),
                 lambda: adaptconv.conv2d(x, w, b, 1, 1), 15.0)
        )  # fmt: skip
    rows.append(
        _row(f"function, {what} plan, with grad", lambda: run(problem, config, x, taught.flatten(2), b),
             lambda: adaptconv.conv2d(x, taught, b, 1, 1), 15.0)
    )  # fmt: skip
    return rows


def _row(what: str, theirs: Call, ours: Call, goal: float) -> list[str | float]:
    base, mine = paired_us(theirs, ours)
    return [what, base, mine, mine - base, goal]


if __name__ == "__main__":
    raise SystemExit(main())
