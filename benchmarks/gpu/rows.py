"""The workload suite on the device: our plans against all that torch has, each row written as it is finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

import torch
from tabulate import tabulate

from adaptconv.errors import told
from adaptconv.problem import Direction
from benchmarks.facts import now
from benchmarks.gpu.clock import device_us
from benchmarks.layers.summary import mean
from benchmarks.layers.tensors import Truth, tensors_of
from benchmarks.layers.variants import OURS, TORCH, Variant, variants_of
from benchmarks.limits import needed_flops
from benchmarks.suites import Layer

_WRONG = 4.0  # times torch's own error
_FLOORS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}
_FAR = 20.0  # times the fastest first call: not timed


@dataclass(slots=True)
class Row:
    """One layer in one direction; times are microseconds on the device.

    Attributes:
        layer, dtype, direction, kind: which.
        cold_us, warm_us: variant -> time, caches emptied before each call and not.
        plans: layout -> our plan and its source.
        errors: variant -> relative L2 error against float64.
        failed: variant -> why it did not run.
        traffic_us, product_us: operands once over the copy bandwidth, in-bounds multiply-adds over the product rate.
        best_rival, best_ours: the fastest cold ones.
        ratio: torch's fastest over our fastest, cold.
        over_limit: our fastest over the larger limit.
        wrong: what is wrong with ours.
        measured_on: when.
    """

    layer: str
    dtype: str
    direction: str
    kind: str
    cold_us: dict[str, float] = field(default_factory=dict)
    warm_us: dict[str, float] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    traffic_us: float = 0.0
    product_us: float = 0.0
    best_rival: str = ""
    best_ours: str = ""
    ratio: float = float("nan")
    over_limit: float = float("nan")
    wrong: list[str] = field(default_factory=list)
    measured_on: str = ""


def key_of(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a row is of."""
    return row["layer"], row["dtype"], row["direction"]


def run(
    layers: Sequence[Layer], directions: Sequence[Direction], device: torch.device, limits: Mapping[str, float], *,
    deadline: float, level: str, seconds: float, old: Sequence[dict[str, Any]], write: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time layers until the deadline.

    Args:
        layers: which.
        directions: which.
        device: where.
        limits: ``copy_gb_s`` and ``gemm_gflop_s`` as measured.
        deadline: by ``time.monotonic``.
        level: of ``benchmarks.layers.variants``: "eager", "compile" or "all".
        seconds: for one row.
        old: rows of an earlier run, not repeated.
        write: called with all rows after each.
    """
    rows = list(old)
    done = {key_of(row) for row in rows}
    for layer in layers:
        for direction in directions:
            if (layer.name, layer.dtype, str(direction)) in done:
                continue
            if monotonic() > deadline:
                return rows
            rows.append(asdict(measured(layer, direction, device, limits, level=level, seconds=seconds)))
            write(rows)
            row = rows[-1]
            print(f"{layer.name} {direction}: {row['ratio']:.2f}x", *row["wrong"], flush=True)
    return rows


def measured(
    layer: Layer, direction: Direction, device: torch.device, limits: Mapping[str, float], *, level: str, seconds: float
) -> Row:  # fmt: skip
    """One row: every variant run once and checked, then those within reach timed together."""
    problem = layer.problem(direction, "contiguous", device)
    row = Row(layer.name, layer.dtype, str(direction), layer.kind, measured_on=now())
    row.traffic_us = problem.bytes / limits["copy_gb_s"] / 1e3
    row.product_us = needed_flops(problem, layer.holes) / limits["gemm_gflop_s"] / 1e3
    truth = Truth(problem, tensors_of(layer, "contiguous", device))
    variants = [v for v in variants_of(layer, direction, device, level) if v.kind != "dcls" or device.type == "cuda"]
    ran: dict[str, Variant] = {}
    for variant in variants:
        if variant.plan:
            row.plans[variant.layout] = variant.plan
        try:
            result = variant.first()
        except Exception as failure:  # noqa: BLE001 - a rival may fail in any way: it is then none
            row.failed[variant.name] = told(failure)
            continue
        if variant.kind != "dcls":
            row.errors[variant.name] = truth.error(result)
        ran[variant.name] = variant
        del result
    timings = device_us({name: variant.call for name, variant in ran.items()}, device, seconds)
    row.cold_us = {name: timing.cold_us for name, timing in timings.items()}
    row.warm_us = {name: timing.warm_us for name, timing in timings.items()}
    _settle(row, {name: variant.kind for name, variant in ran.items()})
    return row


def _settle(row: Row, kinds: Mapping[str, str]) -> None:
    """Ratios and what is wrong."""

    def fastest(wanted: Sequence[str]) -> str:
        return min((n for n in row.cold_us if kinds[n] in wanted), key=row.cold_us.__getitem__, default="")

    row.best_rival, row.best_ours = fastest(TORCH), fastest(OURS)
    native = max((e for name, e in row.errors.items() if kinds[name] == "eager"), default=0.0)
    bound = max(_WRONG * native, _FLOORS.get(row.dtype, 1e-6))
    row.wrong = [
        f"{name}: error {error:.1e}, {bound:.1e} allowed"
        for name, error in row.errors.items() if kinds[name] in OURS and not error <= bound
    ]  # fmt: skip
    row.wrong += [f"{name} did not run: {why}" for name, why in row.failed.items() if name.startswith(OURS)]
    if row.best_ours:
        row.over_limit = row.cold_us[row.best_ours] / max(row.traffic_us, row.product_us)
        if row.best_rival:
            row.ratio = row.cold_us[row.best_rival] / row.cold_us[row.best_ours]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a row, and the geometric means."""
    lines = []
    for row in rows:
        ours, rival = row["best_ours"], row["best_rival"]
        layout = next((name for name in row["plans"] if name in ours), "")
        lines.append((
            row["layer"], row["direction"], f"{row['cold_us'].get(rival, float('nan')):.1f}", rival,
            f"{row['cold_us'].get(ours, float('nan')):.1f}", row["plans"].get(layout, ours), f"{row['ratio']:.2f}",
            f"{row['over_limit']:.1f}", f"{max(row['traffic_us'], row['product_us']):.1f}",
            "WRONG" if row["wrong"] else "",
        ))  # fmt: skip
    head = ("layer", "direction", "torch us", "its way", "ours us", "our plan", "ratio", "over limit", "limit us", "")
    text = str(tabulate(lines, head, tablefmt="github", disable_numparse=True))
    for kind in sorted({row["kind"] for row in rows}):
        for direction in map(str, Direction):
            ratios = [r["ratio"] for r in rows if (r["kind"], r["direction"]) == (kind, direction) and r["ratio"] > 0]
            if ratios:
                text += f"\n{kind:10} {direction:12} {len(ratios):3} rows, geometric mean {mean(ratios):.2f}x"
    return text
