"""The workload suite on the device: our plans against all that torch has, each row written as it is finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

import torch
from tabulate import tabulate

from adaptconv import dispatch
from adaptconv.errors import told
from adaptconv.precision import fp32_precision
from adaptconv.problem import Direction
from benchmarks.facts import now
from benchmarks.gpu.clock import device_us
from benchmarks.gpu.steps import begin
from benchmarks.layers.summary import mean
from benchmarks.layers.tensors import Truth, layouts_of, tensors_of
from benchmarks.layers.variants import OURS, TORCH, Variant, variants_of
from benchmarks.limits import needed_flops
from benchmarks.suites import Layer

_WRONG = 4.0  # times torch's own error
_TF32 = 2.0**-9  # relative error that tf32 may have where torch's flags allow it
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
    layers: Sequence[Layer], directions: Sequence[Direction], device: torch.device,
    limits: Mapping[str, Mapping[str, float]], *, deadline: float, level: str, seconds: float,
    rows: list[dict[str, Any]], write: Callable[[], None], skip: Mapping[tuple[str, ...], str],
    alive: Callable[[], None],
) -> None:  # fmt: skip
    """Time layers until the deadline, one direction after the other.

    Args:
        layers: which.
        directions: which.
        device: where.
        limits: ``copy_gb_s`` and ``gemm_gflop_s`` as measured, by dtype.
        deadline: by ``time.monotonic``.
        level: of ``benchmarks.layers.variants``: "eager", "compile" or "all".
        seconds: for one row.
        rows: those of an earlier run, not repeated while their plans are today's; new ones are added or put in place.
        write: called after each row.
        skip: what ended a process, and how.
        alive: called after each row.
    """
    for direction in directions:
        for layer in layers:
            key = (layer.name, layer.dtype, str(direction))
            old = next((i for i, row in enumerate(rows) if key_of(row) == key), None)
            if key in skip or (old is not None and _is_current(rows[old], layer, direction, device)):
                continue
            if monotonic() > deadline:
                return
            begin("time", *key)
            limit = limits["float32" if layer.dtype == "float32" else "bfloat16"]
            try:
                row = measured(layer, direction, device, limit, level=level, seconds=seconds)
            except Exception as failure:  # noqa: BLE001 - out of memory, a capture that broke: the other rows count too
                row = Row(*key, layer.kind, failed={"all": told(failure)}, measured_on=now())
            if old is None:
                rows.append(asdict(row))
            else:
                rows[old] = asdict(row)
            write()
            print(f"{layer.name} {direction}: {row.ratio:.2f}x", *row.wrong, flush=True)
            if level != "eager":
                torch._dynamo.reset()
            alive()


def _is_current(row: Mapping[str, Any], layer: Layer, direction: Direction, device: torch.device) -> bool:
    """Whether dispatch would still run what the row timed."""
    plans = {layout: dispatch.plan(layer.problem(direction, layout, device)) for layout in layouts_of(layer)}
    return bool(row["plans"] == {layout: f"{plan.choice} ({plan.source})" for layout, plan in plans.items()})


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
    timings = device_us({name: variant.call for name, variant in ran.items()}, device, seconds, _FAR)
    row.cold_us = {name: timing.cold_us for name, timing in timings.items()}
    row.warm_us = {name: timing.warm_us for name, timing in timings.items()}
    _settle(row, {name: variant.kind for name, variant in ran.items()}, device)
    return row


def _settle(row: Row, kinds: Mapping[str, str], device: torch.device) -> None:
    """Ratios and what is wrong."""

    def fastest(wanted: Sequence[str]) -> str:
        return min((n for n in row.cold_us if kinds[n] in wanted), key=row.cold_us.__getitem__, default="")

    row.best_rival, row.best_ours = fastest(TORCH), fastest(OURS)
    native = max((e for name, e in row.errors.items() if kinds[name] == "eager"), default=0.0)
    floor = _TF32 if row.dtype == "float32" and "conv-tf32" in fp32_precision(torch.float32, device) else None
    bound = max(_WRONG * native, floor or _FLOORS.get(row.dtype, 1e-6))
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
    """One line a row."""
    lines = []
    for row in rows:
        ours, rival = row["best_ours"], row["best_rival"]
        layout = next((name for name in row["plans"] if name in ours), "")
        lines.append((
            row["layer"], row["direction"], f"{row['cold_us'].get(rival, float('nan')):.1f}", rival,
            f"{row['cold_us'].get(ours, float('nan')):.1f}", row["plans"].get(layout, ours), f"{row['ratio']:.2f}",
            f"{row['over_limit']:.1f}", f"{max(row['traffic_us'], row['product_us']):.1f}", _remark(row),
        ))  # fmt: skip
    head = ("layer", "direction", "torch us", "its way", "ours us", "our plan", "ratio", "over limit", "limit us", "")
    return str(tabulate(lines, head, tablefmt="github", disable_numparse=True)) if rows else ""


def brief(rows: Sequence[Mapping[str, Any]]) -> str:
    """One short line a row: a terminal's last lines may be all that comes back."""
    lines = []
    for row in rows:
        ours, rival = row["best_ours"], row["best_rival"]
        plan = next((plan for layout, plan in row["plans"].items() if layout in ours), ours)
        lines.append((
            row["layer"], row["direction"].replace("grad_", "d"), f"{row['cold_us'].get(rival, float('nan')):.1f}",
            f"{row['cold_us'].get(ours, float('nan')):.1f}", f"{row['ratio']:.2f}", f"{row['over_limit']:.1f}",
            plan.partition("@")[0], _remark(row),
        ))  # fmt: skip
    head = ("layer", "", "torch us", "ours us", "ratio", "over limit", "plan", "")
    return str(tabulate(lines, head, tablefmt="plain", disable_numparse=True)) if rows else ""


def means(rows: Sequence[Mapping[str, Any]]) -> str:
    """Geometric means by kind and direction, of rows in which our side ran what a record names."""
    lines = []
    for kind in sorted({row["kind"] for row in rows}):
        for direction in map(str, Direction):
            here = [r for r in rows if (r["kind"], r["direction"]) == (kind, direction) and r["ratio"] > 0]
            ratios = [r["ratio"] for r in here if any("(record)" in plan for plan in r["plans"].values())]
            if ratios:
                lines.append(f"{kind:10} {direction:12} {len(ratios):3} rows, geometric mean {mean(ratios):.2f}x")
            if len(here) > len(ratios):
                lines.append(f"{kind:10} {direction:12} {len(here) - len(ratios):3} rows without a record: not counted")
    return "\n".join(lines)


def _remark(row: Mapping[str, Any]) -> str:
    return "WRONG" if row["wrong"] else next(iter(row["failed"].values()), "")[:40] if not row["best_ours"] else ""
