"""Time a partially dilated depthwise layer as its user writes it: ``python -m benchmarks.partial``.

The kernel is ``101010101111101010101``: a dense island of 5 with 4 wings of dilation 2 on each side. Four ways to
compute the same function, timed side by side in one run, in the forward pass and in a training step (forward and
backward to input and parameters):

- ``dense``: what one writes by hand, the 13 values scattered into a kernel 21 wide at each call, then ``F.conv1d``;
- ``dual``: two ``nn.Conv1d``, the island and the dilated grid, added;
- ``layer``: ``AdaptiveConv1d(..., PartiallyDilated(5, 4, 2))``, eager;
- ``optimized``: the same layer in ``adaptconv.optimize``.

Ratios are dense's and dual's time over adaptconv's: over 1 is a gain. Outputs and the gradients of the input, and of
the weight where it is the compact one, are compared with float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import adaptconv
from adaptconv import AdaptiveConv1d, measure
from adaptconv.kernels.partial import PartiallyDilated
from benchmarks.facts import machine_facts

ISLAND, WING, DILATION = 5, 4, 2
GRID = 2 * (ISLAND // 2 // DILATION + WING) + 1
WAYS = ("dense", "dual", "layer", "optimized")
TOLERANCE = 1e-4  # relative L2 error in float32; sums over batch and length are long

Model = Callable[[Tensor], Tensor]


class DenseConstructed(nn.Module):
    """A compact weight written into its window at each call."""

    def __init__(self, layer: AdaptiveConv1d) -> None:
        super().__init__()
        assert layer.taps is not None
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.window, self.groups = layer.taps.window[0], layer.groups
        self.register_buffer("places", torch.tensor([place for (place,) in layer.taps.offsets]))

    def forward(self, x: Tensor) -> Tensor:
        """Scatter, then convolve."""
        dense = self.weight.new_zeros(*self.weight.shape[:2], self.window)
        dense = dense.index_copy(2, self.get_buffer("places"), self.weight)
        return F.conv1d(x, dense, self.bias, padding=self.window // 2, groups=self.groups)


class DualSum(nn.Module):
    """The island's convolution and the dilated grid's, added; the island has the values where both have a tap."""

    def __init__(self, layer: AdaptiveConv1d) -> None:
        super().__init__()
        channels, window = layer.in_channels, layer.kernel.dense().shape[2]
        self.island = nn.Conv1d(channels, channels, ISLAND, padding=ISLAND // 2, groups=channels)
        reach = GRID // 2 * DILATION
        self.grid = nn.Conv1d(channels, channels, GRID, 1, reach, DILATION, channels, bias=False)
        with torch.no_grad():
            dense = layer.kernel.dense().clone()
            middle = slice(window // 2 - ISLAND // 2, window // 2 + ISLAND // 2 + 1)
            self.island.weight.copy_(dense[:, :, middle])
            dense[:, :, middle] = 0
            self.grid.weight.copy_(dense[:, :, ::DILATION])
            if self.island.bias is not None and layer.bias is not None:
                self.island.bias.copy_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and a sum."""
        y: Tensor = self.island(x) + self.grid(x)
        return y


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of pass; times are 20th percentiles in milliseconds.

    Attributes:
        what: forward or step.
        times_ms: way -> time.
        ratios: "dense/layer" and so on -> the first's time over the second's.
        rounds: interleaved rounds behind it.
    """

    what: str
    times_ms: dict[str, float]
    ratios: dict[str, float]
    rounds: int


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, print the table, write the file; exit status 1 if a result is wrong."""
    arguments = _arguments(argv)
    device, shape = torch.device(arguments.device), (arguments.batch, arguments.channels, arguments.length)
    torch.manual_seed(0)
    layer = AdaptiveConv1d(
        arguments.channels, arguments.channels, PartiallyDilated(ISLAND, WING, DILATION), padding="same",
        groups=arguments.channels, device=device,
    )  # fmt: skip
    modules = {"dense": DenseConstructed(layer).to(device), "dual": DualSum(layer).to(device), "layer": layer}
    x = torch.randn(shape, device=device, requires_grad=True)
    if arguments.tune:
        print(adaptconv.tune(layer, x, train=True, budget_s=arguments.budget), flush=True)
    ways: dict[str, Model] = {**modules, "optimized": adaptconv.optimize(layer)}
    parameters = {way: _weight_first(modules[way if way in modules else "layer"]) for way in WAYS}
    errors = _errors(ways, parameters, layer, x)
    dy = torch.randn(shape, device=device)
    rows = [
        _forward(ways, x.detach(), arguments.seconds, device),
        _step(ways, parameters, x, dy, arguments.seconds, device),
    ]
    plans = layer.plans
    print(tabulate([_cells(row) for row in rows], headers=_HEADER, tablefmt="github"))
    print(f"eager plans: {_said(plans)}")
    print(f"largest relative error against float64: {max(errors.values()):.1e}")
    if arguments.out:
        content = {
            "machine": machine_facts(device), "taps": str(layer.taps), "shape": shape, "plans": _said(plans),
            "errors": errors, "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    wrong = [what for what, error in errors.items() if not error < TOLERANCE]
    if wrong:
        print("WRONG: " + ", ".join(wrong))
    return 1 if wrong else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.partial", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tune", action="store_true", help="tune what the database does not know yet, first")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="tuning time in all (about 3 s a problem)")
    parser.add_argument("--seconds", type=float, default=5.0, help="timing a kind of pass, all ways together (5)")
    parser.add_argument("--out", type=Path, help="write JSON here")
    return parser.parse_args(argv)


def _errors(
    ways: dict[str, Model], parameters: dict[str, list[nn.Parameter]], layer: AdaptiveConv1d, x: Tensor
) -> dict[str, float]:
    """Relative L2 error of every way's output and gradients against float64."""
    assert layer.taps is not None
    wide = x.detach().double().requires_grad_()
    dense = layer.kernel.dense().detach().double().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double()
    right = F.conv1d(wide, dense, bias, padding="same", groups=layer.groups)
    dy = torch.randn_like(right)
    right_dx, right_dw = torch.autograd.grad(right, (wide, dense), dy)
    right_dw = right_dw[:, :, [place for (place,) in layer.taps.offsets]]
    errors = {}
    for way, model in ways.items():
        with torch.no_grad():
            errors[f"{way} forward"] = _relative(model(x), right)
        y = model(x)
        weight = parameters[way][0]
        dx, dw = torch.autograd.grad(y, (x, weight), dy.to(y.dtype))
        errors[f"{way} output"] = _relative(y, right)
        errors[f"{way} input gradient"] = _relative(dx, right_dx)
        if dw.shape == right_dw.shape:
            errors[f"{way} weight gradient"] = _relative(dw, right_dw)
    return errors


def _weight_first(module: nn.Module) -> list[nn.Parameter]:
    return sorted(module.parameters(), key=lambda parameter: -parameter.dim())


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right.detach()).norm() / right.detach().norm())


def _forward(ways: dict[str, Model], x: Tensor, seconds: float, device: torch.device) -> Row:
    with torch.no_grad():
        return _timed("forward", {way: _call(model, x) for way, model in ways.items()}, seconds, device)


def _call(model: Model, x: Tensor) -> Callable[[], object]:
    return lambda: model(x)


def _step(
    ways: dict[str, Model], parameters: dict[str, list[nn.Parameter]], x: Tensor, dy: Tensor, seconds: float,
    device: torch.device,
) -> Row:  # fmt: skip
    def step(way: str) -> Callable[[], object]:
        model, wanted = ways[way], [x, *parameters[way]]
        return lambda: torch.autograd.grad(model(x), wanted, dy)

    return _timed("training step", {way: step(way) for way in ways}, seconds, device)


def _timed(what: str, calls: dict[str, Callable[[], object]], seconds: float, device: torch.device) -> Row:
    timings = measure.interleave(calls, budget_s=seconds, device=device, warmup=3)
    times = {way: timing.p20_us / 1e3 for way, timing in timings.items()}
    ratios = {f"{a}/{b}": times[a] / times[b] for b in WAYS[2:] for a in WAYS[:2]}
    return Row(what, times, ratios, min(timing.rounds for timing in timings.values()))


_RATIOS = tuple(f"{a}/{b}" for b in WAYS[2:] for a in WAYS[:2])
_HEADER = ("pass", *(f"{way} ms" for way in WAYS), *_RATIOS, "rounds")


def _cells(row: Row) -> list[str]:
    return [
        row.what, *(f"{row.times_ms[way]:.3g}" for way in WAYS), *(f"{row.ratios[name]:.2f}x" for name in _RATIOS),
        str(row.rounds),
    ]  # fmt: skip


def _said(plans: adaptconv.trilinear.Plans | None) -> str:
    if plans is None:
        return "none"
    named = (("forward", plans.forward), ("dx", plans.grad_input), ("dw", plans.grad_weight))
    return ", ".join(f"{name} {plan.choice} ({plan.source})" for name, plan in named if plan is not None)


if __name__ == "__main__":
    raise SystemExit(main())
