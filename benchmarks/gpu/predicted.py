"""What the Triton kernels should take on a card: ``python -m benchmarks.gpu.predicted``, from counts of bytes and work.

For every layer of the workload suite and direction: the card's limits (operands once over the copy bandwidth; in-bounds
multiply-adds over the rate of the tensor cores, and of the vector units), and the best prediction of each kernel. No
GPU is asked. A run of ``benchmarks.gpu`` on the card confirms or refutes the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from adaptconv.backends import BACKENDS, Backend
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.backends.triton.hardware import CARDS, card
from adaptconv.problem import Device, Problem
from benchmarks.layers.tensors import DIRECTIONS, layouts_of
from benchmarks.limits import needed_flops
from benchmarks.suites import SUITES, Layer


def rows(device: Device, layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """A row a layer and direction: limits in microseconds, and predictions by backend with layout and configuration."""
    found = []
    facts = card(device)
    for layer in layers:
        for direction in DIRECTIONS.values():
            problems = [replace(layer.problem(direction, layout), device=device) for layout in layouts_of(layer)]
            flops = needed_flops(problems[0], layer.holes)
            row: dict[str, Any] = {
                "layer": layer.name, "direction": str(direction),
                "traffic_us": problems[0].bytes / facts.bandwidth_gb_s / 1e3,
                "tensor_us": flops / facts.tensor_tflop_s / 1e6, "vector_us": flops / facts.vector_tflop_s / 1e6,
            }  # fmt: skip
            for backend in BACKENDS:
                if isinstance(backend, TritonBackend):
                    best = min((p for problem in problems for p in _predicted(backend, problem)), default=None)
                    row[backend.name] = None if best is None else {"us": best[0], "layout": best[1], "config": best[2]}
            found.append(row)
    return found


def _predicted(backend: Backend, problem: Problem) -> list[tuple[float, str, str]]:
    assert isinstance(backend, TritonBackend)
    if backend.unsuited(problem):
        return []
    return [(backend.predicted_us(problem, c), problem.layout, str(c)) for c in backend.space(problem)]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text; a ratio is the best prediction over the larger of traffic and tensor cores."""
    names = [backend.name for backend in BACKENDS if isinstance(backend, TritonBackend)]
    lines = []
    for row in found:
        predictions = {name: row[name]["us"] for name in names if row[name]}
        least = max(row["traffic_us"], row["tensor_us"])
        best = min(predictions, key=predictions.__getitem__, default="")
        lines.append((
            row["layer"], row["direction"], f"{row['traffic_us']:.1f}", f"{row['tensor_us']:.1f}",
            f"{row['vector_us']:.1f}", *(f"{predictions[name]:.1f}" if name in predictions else "-" for name in names),
            f"{predictions[best] / least:.1f}" if best else "-", f"{best} {row[best]['layout']}" if best else "",
        ))  # fmt: skip
    head = ("layer", "direction", "traffic us", "tensor us", "vector us", *names, "over limit", "best")
    return str(tabulate(lines, head, tablefmt="github", disable_numparse=True))


def kernel_count(device: Device, layers: Sequence[Layer]) -> dict[str, int]:
    """How many problems the layers are, how many Triton configurations those have, and how many kernels these need.

    Asked of the launch code itself, for an sm_90; nothing is compiled. Triton compiles for no GPU in this process then.
    """
    from adaptconv.backends import Choice
    from adaptconv.backends.triton.compiler_process import Target, kernels_of, use

    use(Target("cuda", 90, 32))
    problems, pairs = 0, []
    for layer, direction in itertools.product(layers, DIRECTIONS.values()):
        for layout in layouts_of(layer):
            problem = replace(layer.problem(direction, layout), device=device)
            problems += 1
            for backend in BACKENDS:
                if isinstance(backend, TritonBackend) and not backend.unsuited(problem):
                    pairs += [(problem, Choice(backend.name, backend.version, c)) for c in backend.space(problem)]
    return {"problems": problems, "configurations": len(pairs), "kernels": len(kernels_of(pairs))}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, write the file."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.predicted", description=__doc__)
    parser.add_argument("--card", choices=list(CARDS), default="H200")
    parser.add_argument("--suite", choices=sorted(SUITES), default="gpu")
    parser.add_argument("--count", action="store_true", help="count the kernels that all configurations need, instead")
    parser.add_argument("--out", type=Path, help="write JSON here")
    arguments = parser.parse_args(argv)
    device = Device("cuda", f"NVIDIA {arguments.card}", 0)
    if arguments.count:
        print(", ".join(f"{n:,} {what}" for what, n in kernel_count(device, SUITES[arguments.suite]).items()))
        return 0
    found = rows(device, SUITES[arguments.suite])
    print(table(found))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"card": arguments.card, "measured": False, "rows": found}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
