"""The main job on real input: tune, compile, check and report two networks that never heard of adaptconv.

``adaptconv demo`` runs this: an atrous segmenter on a photograph and a partially dilated 1-D denoiser on an
electrocardiogram, both in training form, so that outputs *and* gradients are compared and timed. Everything it
prints was measured in this run.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate
from torch import Tensor, nn

import adaptconv
from adaptconv import measure
from benchmarks import models

Step = Callable[[], list[Tensor]]
NETWORKS = {"segmenter": models.segmenter, "denoiser": models.denoiser}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one network came to.

    Attributes:
        name: which network.
        times_ms: "what: how" -> 20th percentile in milliseconds.
        errors: "what: how" -> relative L2 error against the same network in float64.
        report: adaptconv's report of the optimized network.
        wrong: what was wrong, a line each; empty when all is well.
    """

    name: str
    times_ms: dict[tuple[str, str], float]
    errors: dict[tuple[str, str], float]
    report: str
    wrong: tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; exit status 1 if an output or gradient is wrong."""
    parser = argparse.ArgumentParser("adaptconv demo", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=15.0, metavar="SECONDS", help="tuning time a network (15)")
    parser.add_argument("--only", choices=sorted(NETWORKS), help="one network instead of both")
    arguments = parser.parse_args(argv)
    began = time.perf_counter()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    names = [arguments.only] if arguments.only else list(NETWORKS)
    outcomes = [run(name, arguments.budget) for name in names]
    for outcome in outcomes:
        print(f"\n{outcome.report}")
    print("\nend to end, 20th percentile, all variants interleaved in one run; ratio = theirs / adaptconv's")
    print(tabulate([row for outcome in outcomes for row in _time_rows(outcome)], headers=_TIME_HEADER))
    print("\nrelative error against float64: adaptconv's should be no worse than torch's own")
    print(tabulate([row for outcome in outcomes for row in _error_rows(outcome)], headers=_ERROR_HEADER))
    wrong = [line for outcome in outcomes for line in outcome.wrong]
    print("\n" + ("\n".join(wrong) if wrong else "all outputs and gradients agree with torch"))
    print(f"demo took {time.perf_counter() - began:.0f} s on {torch.get_num_threads()} threads")
    return 1 if wrong else 0


def run(name: str, budget_s: float) -> Outcome:
    """Tune, compile, check and time one network."""
    network, inputs = NETWORKS[name]()
    _say(f"{name}: tuning its convolutions, forward and both gradients, for about {budget_s:.0f} s")
    print(adaptconv.tune(network, inputs, train=True, budget_s=budget_s), flush=True)
    fast = adaptconv.optimize(network)
    variants: dict[str, Callable[..., Tensor]] = {
        "torch": network, "torch.compile": torch.compile(network), "adaptconv": fast,
    }  # fmt: skip
    cotangent = torch.randn_like(network(*inputs))
    steps = {how: _step(network, call, inputs, cotangent) for how, call in variants.items()}
    results = {}
    for how, step in steps.items():
        began = time.perf_counter()
        results[how] = step()
        if how != "torch":
            _say(f"{name}: {how} compiled in {time.perf_counter() - began:.0f} s")
    exact = _exact(network, inputs, cotangent)
    errors = {}
    for how, (output, *gradients) in results.items():
        errors["output", how] = _error([output], exact[:1])
        errors["gradients", how] = _error(gradients, exact[1:])
    _say(f"{name}: timing")
    times = _times(variants, steps, inputs)
    return Outcome(name, times, errors, str(adaptconv.report(fast)), tuple(_wrong(name, errors)))


def _say(text: str) -> None:
    print(f"[demo] {text}", flush=True)


def _step(network: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor) -> Step:
    """One training step's worth: the output, and the gradient of every parameter."""

    def step() -> list[Tensor]:
        output = call(*inputs)
        return [output, *torch.autograd.grad(output, list(network.parameters()), cotangent)]

    return step


def _exact(network: nn.Module, inputs: tuple[Tensor, ...], cotangent: Tensor) -> list[Tensor]:
    wide = copy.deepcopy(network).double()
    return _step(wide, wide, tuple(x.double() for x in inputs), cotangent.double())()


def _error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Relative L2 error over all tensors together."""
    difference = sum(
        float((a.detach().double() - b.detach()).square().sum()) for a, b in zip(results, exact, strict=True)
    )
    size = sum(float(b.detach().square().sum()) for b in exact)
    return float((difference / size) ** 0.5)


def _wrong(name: str, errors: dict[tuple[str, str], float]) -> list[str]:
    """Errors over twice those of torch's own float32 (with a floor where torch happens to be exact)."""
    lines = []
    for what in ("output", "gradients"):
        bound = 2 * max(errors[what, "torch"], errors[what, "torch.compile"], 1e-6)
        if not errors[what, "adaptconv"] <= bound:
            lines.append(f"WRONG: {name} {what}: error {errors[what, 'adaptconv']:.1e}, bound {bound:.1e}")
    return lines


def _times(
    variants: dict[str, Callable[..., Tensor]], steps: dict[str, Step], inputs: tuple[Tensor, ...]
) -> dict[tuple[str, str], float]:
    cpu = torch.device("cpu")
    forward = {how: (lambda call=call: call(*inputs)) for how, call in variants.items()}
    times = {}
    for what, candidates in (("forward", forward), ("forward + backward", steps)):
        timed = measure.interleave(candidates, budget_s=5.0, device=cpu)
        times.update({(what, how): timing.p20_us / 1e3 for how, timing in timed.items()})
    return times


_TIME_HEADER = ("network", "what", "torch ms", "torch.compile ms", "adaptconv ms", "vs torch", "vs torch.compile")
_ERROR_HEADER = ("network", "what", "torch", "torch.compile", "adaptconv")


def _time_rows(outcome: Outcome) -> list[list[str]]:
    rows = []
    for what in ("forward", "forward + backward"):
        eager, compiled, ours = (outcome.times_ms[what, how] for how in ("torch", "torch.compile", "adaptconv"))
        rows.append(
            [outcome.name, what, f"{eager:.1f}", f"{compiled:.1f}", f"{ours:.1f}", f"{eager / ours:.2f}x",
             f"{compiled / ours:.2f}x"]
        )  # fmt: skip
    return rows


def _error_rows(outcome: Outcome) -> list[list[str]]:
    hows = ("torch", "torch.compile", "adaptconv")
    return [
        [outcome.name, what, *(f"{outcome.errors[what, how]:.1e}" for how in hows)] for what in ("output", "gradients")
    ]
