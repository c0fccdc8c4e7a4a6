"""One process of ``test_caches.py``: compiles a network in several ways, runs it, and prints what happened as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import adaptconv
from adaptconv import records
from adaptconv.backends import BACKENDS, Choice
from adaptconv.compile.optimize import collect_sites, forget_compiled, log_of


class Net(nn.Module):
    """A site of each kind: traced into the graph, an op of its own, and one whose author knows adaptconv."""

    def __init__(self) -> None:
        super().__init__()
        self.traced = nn.Conv1d(8, 8, 3, padding=4, dilation=4)
        self.opaque = nn.Conv2d(16, 16, 5, padding=6, dilation=3, groups=16)
        self.own = adaptconv.AdaptiveConv1d(8, 8, taps="1011101", padding=3)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return self.own(self.traced(x)), self.opaque(z)


def remember(net: nn.Module, inputs: Sequence[Tensor], where: str, choices: dict[str, str]) -> int:
    """Write records under which dispatch chooses so for a site; how many they were."""
    written = 0
    for site in collect_sites(net, inputs, train=True):
        for problem in site.problems() if site.where == where else ():
            if str(problem.direction) not in choices:
                continue
            choice = Choice.parse(choices[str(problem.direction)])
            record = records.Record(
                problem.key(), choice.backend, choice.version, dict(choice.config), 100.0, 100.0, 100.0, 1000.0,
                1e-7, 1e-7, records.toolchain(torch.device("cpu")), records.utc_now(),
            )  # fmt: skip
            records.default_store().write(record)
            written += 1
    return written


def release(name: str, version: int) -> None:
    """Stand in for another release of a backend."""
    kind: Any = type(next(backend for backend in BACKENDS if backend.name == name))
    kind.version = version


def run(model: Any, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Call a model for training and for inference; what the caches said, and which kernels the last call ran."""
    forget_compiled()  # one way is not to find what another compiled
    counters.clear()
    results = model(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    gradients = torch.autograd.grad([r.square().sum() for r in results], [*inputs, *model.parameters()])
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad():
        model(*inputs)
        with torch.profiler.profile(activities=activities) as profile:
            model(*inputs)
    log = log_of(model)
    return {
        "inductor": {name: n for name, n in counters["inductor"].items() if name.startswith("fxgraph_cache")},
        "aot": {name: n for name, n in counters["aot_autograd"].items() if name.startswith("autograd_cache")},
        "ran": sorted({event.key for event in profile.key_averages() if "::" in event.key}),
        "bits": hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (*results, *gradients))).hexdigest(),
        "plans": {} if log is None else {s.where: s.plans.text for s in log.sites if s.rewritten and s.plans},
        "norms": [float(t.double().norm()) for t in (*results, *gradients)],
    }


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked: ``records`` to write first, ``release`` of backends; then compile and run in three ways."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Net()
    x, z = torch.randn(2, 8, 64, requires_grad=True), torch.randn(2, 16, 12, 12, requires_grad=True)
    written = sum(remember(net, (x, z), where, choices) for where, choices in asked.get("records", {}).items())
    for name, version in asked.get("release", {}).items():
        release(name, version)
    ways: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "static": (adaptconv.optimize(net, dynamic=False), (x, z)),
        "stock": (torch.compile(net.own, dynamic=False), (x,)),
        "dynamic": (adaptconv.optimize(net.own, dynamic=True), (x,)),
    }
    return {"written": written, **{name: run(model, inputs) for name, (model, inputs) in ways.items()}}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
