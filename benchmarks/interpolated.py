"""Interpolated kernels against the dense kernels they stand for: ``python -m benchmarks.interpolated --out FILE.json``.

64 -> 64 channels on 8x56x56, float32: one round (7x7 from 3x3 weights) and two (15x15), forward and a training step
(forward, then the gradients of input, weight and bias). Dense is torch's own convolution by a kernel of that size, in
contiguous and in channels_last memory; ours is the layer with backend ``factored`` pinned, and as dispatch chooses, in
both layouts too. All are interleaved in one run; a ratio is dense's better layout over ours in its better one. Before
anything is timed, every way is checked against float64, borders included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from adaptconv import AdaptiveConv2d, measure, pinned
from adaptconv.kernels.interpolated import Interpolated
from benchmarks.facts import machine_facts

CHANNELS, BATCH, EXTENT = 64, 8, 56
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
GOALS = {1: 2.5, 2: 8.0}  # forward, by rounds


@dataclass(frozen=True)
class Row:
    """One kernel in one pass; times are 20th percentiles in milliseconds.

    Attributes:
        window: extent of the dense kernel.
        what: forward or training step.
        ms: way and layout -> time.
        ratio: way -> best dense time over its best.
        plans: layout -> what dispatch chose, forward first, then the gradients of input and weight.
        error: way and layout -> largest error over the largest output, borders included.
        border_error: the same over outputs whose window reaches past the border.
    """

    window: int
    what: str
    ms: dict[str, float]
    ratio: dict[str, float]
    plans: dict[str, str]
    error: dict[str, float]
    border_error: dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, print the table, write the file."""
    arguments = _arguments(argv)
    rows = [row for rounds in arguments.rounds for row in timed(rounds, arguments.seconds)]
    cells = [
        [
            f"{row.window}x{row.window} {row.what}", *(min(_of(row.ms, way)) for way in ("dense", "plain 3x3")),
            *(value for way in ("factored", "dispatched") for value in (min(_of(row.ms, way)), row.ratio[way])),
            f"{max(row.error.values()):.1e}", f"{max(row.border_error.values()):.1e}",
        ]
        for row in rows
    ]  # fmt: skip
    header = (
        "kernel",
        "dense ms",
        "plain 3x3 ms",
        "factored ms",
        "ratio",
        "dispatched ms",
        "ratio",
        "error",
        "at borders",
    )
    print(tabulate(cells, headers=header, tablefmt="github", floatfmt=".2f", disable_numparse=[7, 8]))
    for row in rows:
        print(f"{row.window}x{row.window} {row.what}: {'; '.join(f'{k}: {v}' for k, v in row.plans.items())}")
    for rounds, row in zip(arguments.rounds, rows[::2], strict=True):
        verdict = "met" if row.ratio["factored"] >= GOALS[rounds] else "not met"
        print(f"goal {row.window}x{row.window} forward, factored at least {GOALS[rounds]}x: {verdict}")
    if arguments.out:
        content = {"machine": machine_facts(torch.device("cpu")), "rows": [asdict(row) for row in rows]}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.interpolated", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, nargs="+", choices=sorted(GOALS), default=sorted(GOALS))
    parser.add_argument("--seconds", type=float, default=10.0, help="timing a kernel and pass (10)")
    parser.add_argument("--out", type=Path, help="write JSON here")
    return parser.parse_args(argv)


def _of(by_way_and_layout: dict[str, float], way: str) -> list[float]:
    return [value for name, value in by_way_and_layout.items() if name.startswith(f"{way} ")]


def timed(rounds: int, seconds: float) -> list[Row]:
    """The rows of one kernel: forward, then training step."""
    torch.manual_seed(0)
    window = 2 ** (rounds + 2) - 1
    layer = AdaptiveConv2d(CHANNELS, CHANNELS, Interpolated(3, rounds), padding=window // 2)
    x = torch.randn(BATCH, CHANNELS, EXTENT, EXTENT)
    ways = _ways(layer, window)
    inputs = {layout: x.contiguous(memory_format=memory).requires_grad_() for layout, memory in LAYOUTS.items()}
    rows: list[Row] = []
    for what in ("forward", "training step"):
        calls: dict[str, Callable[[], object]] = {}
        plans: dict[str, str] = {}
        error: dict[str, float] = {}
        border: dict[str, float] = {}
        for name, (forward, parameters, pin) in ways.items():
            for layout, memory in LAYOUTS.items():
                own = inputs[layout]
                # A layer trained in channels_last has its weight so too.
                held = [p.detach().contiguous(memory_format=memory) if p.dim() == 4 else p.detach() for p in parameters]
                held = [p.clone().requires_grad_() for p in held]
                call = partial(_step if what != "forward" else _forward, forward, own, held, pin)
                calls[f"{name} {layout}"] = call
                if name != "plain 3x3" and what == "forward":
                    y = call()
                    error[f"{name} {layout}"], border[f"{name} {layout}"] = _errors(layer, x, y, window)
                else:
                    call()
                if name == "dispatched" and layer.plans is not None:
                    made = (layer.plans.forward, layer.plans.grad_input, layer.plans.grad_weight)
                    plans[layout] = ", ".join(f"{plan.choice} ({plan.source})" for plan in made if plan is not None)
        timings = measure.interleave(calls, budget_s=seconds, device=torch.device("cpu"))
        ms = {name: timing.p20_us / 1e3 for name, timing in timings.items()}
        ratio = {way: min(_of(ms, "dense")) / min(_of(ms, way)) for way in ("factored", "dispatched")}
        rows.append(Row(window, what, ms, ratio, plans, error or rows[0].error, border or rows[0].border_error))
    return rows


Forward = Callable[..., Tensor]


def _ways(layer: AdaptiveConv2d, window: int) -> dict[str, tuple[Forward, list[Tensor], str | None]]:
    """Name -> how it is called with an input and its parameters, these, and the pinned backend."""
    wide = layer.kernel.dense().detach()
    assert layer.bias is not None

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
        return y

    return {
        "dense": (partial(F.conv2d, padding=window // 2), [wide, layer.bias], None),
        "plain 3x3": (partial(F.conv2d, padding=1), [layer.weight, layer.bias], None),
        "factored": (ours, [layer.weight, layer.bias], "factored"),
        "dispatched": (ours, [layer.weight, layer.bias], None),
    }


def _pin(backend: str | None) -> Any:
    return nullcontext() if backend is None else pinned(backend)


def _forward(forward: Forward, x: Tensor, parameters: Sequence[Tensor], backend: str | None) -> Tensor:
    with torch.no_grad(), _pin(backend):
        return forward(x, *parameters)


def _step(forward: Forward, x: Tensor, parameters: Sequence[Tensor], backend: str | None) -> tuple[Tensor, ...]:
    with _pin(backend):
        y = forward(x, *parameters)
        return torch.autograd.grad(y, (x, *parameters), y.detach())


def _errors(layer: AdaptiveConv2d, x: Tensor, y: Any, window: int) -> tuple[float, float]:
    """Largest error of the first image over its largest output: everywhere, and where windows reach past borders."""
    assert layer.bias is not None
    with torch.no_grad():
        weight = layer.kernel.dense().double()
        exact = F.conv2d(x[:1].double(), weight, layer.bias.double(), padding=window // 2)
        off = (y[:1].double() - exact).abs() / exact.abs().max()
    inside = slice(window // 2, -(window // 2))
    everywhere = float(off.max())
    off[:, :, inside, inside] = 0
    return everywhere, float(off.max())


if __name__ == "__main__":
    raise SystemExit(main())
