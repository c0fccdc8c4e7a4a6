"""The C++ tap kernel against torch and against the machine: ``python -m benchmarks.cpp``.

Depthwise convolutions in float32, every direction. Torch's side is the best of its own calls: contiguous and
channels_last (operands already in that format, so that the change costs it nothing), its own padding and an explicit
one; where the taps are no regular grid, on the dense-constructed kernel. "routes" are the other rewrites of this
package: the flipped forward for the gradient of the input, the grouped convolution for that of the weight. The limit
is the larger of the bytes over the copy bandwidth and the arithmetic over the rate of a large matrix product, both
measured in the same run (``limits.py``). All candidates of a row are interleaved; times are the fastest sample.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor

from adaptconv.backends import Config, backend_named
from adaptconv.measure import interleave
from adaptconv.problem import Device, Direction, Problem, same_padding
from adaptconv.taps import TapPattern
from benchmarks.facts import machine_facts
from benchmarks.limits import limit_ms

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Layer:
    """A depthwise layer; ``holes`` leaves each channel that many of the window's weights, the rest exactly zero."""

    name: str
    batch: int
    channels: int
    spatial: tuple[int, ...]
    taps: str
    holes: int = 0


def _scattered(size: int, count: int) -> str:
    """Text of a square window with some taps at random places."""
    order = torch.randperm(size * size, generator=torch.Generator().manual_seed(1))[:count]
    mask = torch.zeros(size * size)
    mask[order] = 1
    return TapPattern.from_mask(mask.reshape(size, size)).text


LAYERS = (
    Layer("partially dilated 1-D", 8, 256, (1024,), "101010101111101010101"),
    Layer("1-D k3 d32", 4, 512, (2000,), "3d32"),
    Layer("1-D k31", 8, 256, (1000,), "31"),
    Layer("34 shared of 17x17", 4, 96, (56, 56), _scattered(17, 34)),
    Layer("34 a channel of 17x17", 4, 96, (56, 56), "17x17", 34),
    Layer("k7", 4, 96, (56, 56), "7x7"),
    Layer("k7 d3", 4, 64, (56, 56), "7x7d3x3"),
    Layer("k17", 4, 96, (56, 56), "17x17"),
    Layer("3-D k5", 1, 64, (16, 28, 28), "5x5x5"),
    Layer("3-D k7", 1, 32, (16, 28, 28), "7x7x7"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One layer in one direction; times in milliseconds."""

    layer: str
    direction: str
    cpp_ms: float
    torch_ms: float
    torch_call: str
    routes_ms: float | None
    limit_ms: float
    over_torch: float
    over_limit: float
    predicted_ms: float


def problem_of(layer: Layer, direction: Direction, layout: str = "contiguous") -> Problem:
    """The layer as a problem in float32 with the padding that keeps its extent."""
    taps = TapPattern.parse(layer.taps)
    return Problem(
        direction, layer.batch, layer.channels, layer.channels, layer.channels, layer.spatial, taps,
        (1,) * len(layer.spatial), same_padding(taps.window), "float32", layout, Device.of(CPU),
    )  # fmt: skip


def operands_of(layer: Layer, problem: Problem) -> tuple[Tensor, Tensor]:
    """Random operands, most weights of a channel zero where the layer has holes."""
    generator = torch.Generator().manual_seed(0)
    shapes = problem.input_shape, problem.weight_shape, problem.output_shape
    x, w, dy = (torch.randn(shape, generator=generator) for shape in shapes)
    if layer.holes:
        w = w * (torch.rand(w.shape, generator=generator).argsort(-1) < layer.holes)
    a, b = {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}[problem.direction]
    return a, b


def measured(layer: Layer, direction: Direction, limits: dict[str, float], budget_s: float) -> Row:
    """Time the kernel and its rivals side by side."""
    problem = problem_of(layer, direction)
    a, b = operands_of(layer, problem)
    cpp = backend_named("cpp")
    default = cpp.space(problem).default
    calls: dict[str, Callable[[], object]] = {"cpp": lambda: cpp.run(problem, default, a, b)}
    native = backend_named("native")
    rival = native if native.rejects(problem) is None else backend_named("dense")
    for layout in ("contiguous", "channels_last") if problem.axes > 1 else ("contiguous",):
        there = replace(problem, layout=layout)
        here = a.contiguous(memory_format=there.memory_format)
        other = b if b.dim() != a.dim() else b.contiguous(memory_format=there.memory_format)
        for config in rival.space(there):
            if config["layout"] != "asis" and problem.axes > 1:
                continue  # the other layout has a turn of its own, with the change for nothing
            calls[f"{rival.name} {layout} {config}"] = _call(rival.run, there, config, here, other)
    times = {name: timing.min_us / 1e3 for name, timing in interleave(calls, budget_s=budget_s, device=CPU).items()}
    torchs = {name: ms for name, ms in times.items() if name != "cpp" and not _is_route(name)}
    routes = [ms for name, ms in times.items() if _is_route(name)]
    call = min(torchs, key=lambda name: torchs[name])
    limit = limit_ms(problem, limits, layer.holes)
    return Row(
        layer.name, str(direction), times["cpp"], torchs[call], call, min(routes) if routes else None, limit,
        torchs[call] / times["cpp"], times["cpp"] / limit, cpp.cost(problem, default) / 1e3,
    )  # fmt: skip


def _is_route(name: str) -> bool:
    return "route=adjoint" in name or "route=grouped" in name


def _call(run: Callable[..., Tensor], problem: Problem, config: Config, a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    return lambda: run(problem, config, a, b)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser("python -m benchmarks.cpp", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="torch's intra-op threads (default 2)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a row (default 1)")
    parser.add_argument("--only", default="", help="only layers whose name contains this")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    reason = backend_named("cpp").rejects(problem_of(LAYERS[0], Direction.FORWARD))
    if reason:
        parser.error(f"the kernel is not available: {reason}")
    facts = machine_facts(CPU)
    limits = facts["limits"]
    assert isinstance(limits, dict)
    print(f"copy {limits['copy_gb_s']:.0f} GB/s, matrix product {limits['gemm_gflop_s']:.0f} GFLOP/s, "
          f"{arguments.threads} threads")  # fmt: skip
    chosen = [layer for layer in LAYERS if arguments.only in layer.name]
    rows = [measured(layer, direction, limits, arguments.budget) for layer in chosen for direction in Direction]
    headers = (
        "layer",
        "direction",
        "cpp ms",
        "torch ms",
        "routes ms",
        "limit ms",
        "torch/cpp",
        "cpp/limit",
        "predicted",
    )
    table = [
        (
            r.layer,
            r.direction,
            r.cpp_ms,
            r.torch_ms,
            r.routes_ms,
            r.limit_ms,
            r.over_torch,
            r.over_limit,
            r.predicted_ms,
        )
        for r in rows
    ]
    print(tabulate(table, headers=headers, floatfmt=".2f"))
    if arguments.out:
        text = json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
