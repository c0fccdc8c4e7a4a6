"""What Python spends on a call of a Triton kernel before the GPU has work: ``python -m benchmarks.gpu.host``.

For layers of the workload suite and each direction: microseconds of the backend's host code and of Triton's look-ups,
with operands that have no memory and launches that go nowhere. No GPU is asked; a launch adds a few microseconds of the
driver's. A kernel that takes less than this waits for Python in eager calls, and not in a captured graph. The least of
many calls, as a table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tabulate import tabulate

from adaptconv.backends import BACKENDS
from adaptconv.backends.triton import op
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.backends.triton.compiler_process import Target, nowhere, use
from adaptconv.problem import Device, Problem
from benchmarks.layers.tensors import DIRECTIONS
from benchmarks.suites import SUITES, Layer

_USUAL = ("unireplknet-k13", "slak-51x5", "van-k7d3", "dcls-s3-34of17", "hdc-d5")
_ROUNDS, _CALLS = 30, 20


def host_us(backend: TritonBackend, problem: Problem) -> float:
    """Microseconds of Python in one call of a backend by its default configuration, its kernels compiled before."""
    compute, config, operands = op.compute_of(backend.name), backend.space(problem).default, nowhere(problem)
    compute(problem, config, *operands)
    rounds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(_CALLS):
            compute(problem, config, *operands)
        rounds.append((time.perf_counter() - start) / _CALLS)
    return min(rounds) * 1e6


def rows(device: Device, layers: Sequence[Layer]) -> Iterator[tuple[Any, ...]]:
    """Layer, direction, backend, microseconds of Python, and those predicted of the GPU."""
    for layer in layers:
        for direction in DIRECTIONS.values():
            problem = replace(layer.problem(direction, "contiguous"), device=device)
            for backend in BACKENDS:
                if isinstance(backend, TritonBackend) and not backend.unsuited(problem):
                    predicted = backend.predicted_us(problem, backend.space(problem).default)
                    took = host_us(backend, problem)
                    yield layer.name, str(direction), backend.name, f"{took:.0f}", f"{predicted:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    names = [layer.name for layer in SUITES["gpu"]]
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.host", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, default=list(_USUAL), metavar="LAYER", help="of the suite")
    chosen = parser.parse_args(argv).only
    use(Target("cuda", 90, 32))
    found = rows(Device("cuda", "NVIDIA H200", 0), [layer for layer in SUITES["gpu"] if layer.name in chosen])
    print(tabulate(list(found), ("layer", "direction", "backend", "Python us", "GPU us, predicted"), tablefmt="github"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
