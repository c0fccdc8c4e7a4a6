"""What is said of rows: a table, means by direction and kind of layer, and the losses. Rows are as in the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from benchmarks.layers.rows import SUSPICIOUS
from benchmarks.layers.variants import OURS, TORCH
from benchmarks.suites import MUST_SHOW

Rows = Sequence[Mapping[str, Any]]
_GRADIENTS = ("grad_input", "grad_weight")
_DIRECTIONS = {
    "forward": ("forward",), "input gradient": ("grad_input",), "weight gradient": ("grad_weight",),
    "both gradients": _GRADIENTS, "all": ("forward", *_GRADIENTS),
}  # fmt: skip
_SHORT = {"optimized freezing": "opt. freezing", "optimized": "optimized"}
_LAYOUTS = {"contiguous": "nchw", "channels_last": "nhwc"}


def table(rows: Rows) -> str:
    """One line a row: the fastest of each kind of variant in milliseconds, the ratios, the plan."""
    headers = (
        "layer", "direction", *(f"{k} ms" for k in TORCH), *(f"{_SHORT.get(k, k)} ms" for k in OURS), "dcls ms",
        "ratio", "vs eager", "over limit", "error", "torch's", "rival", "ours",
    )  # fmt: skip
    return str(tabulate([_cells(row) for row in rows], headers=headers, tablefmt="github", disable_numparse=True))


def _cells(row: Mapping[str, Any]) -> list[str]:
    best = row["best_ours"]
    layout = next((layout for layout in _LAYOUTS if layout in best), "")
    plan = row["plans"].get(layout, "") if best.startswith("dispatch ") else ""
    return [
        f"{row['layer']}{'' if row['dtype'] == 'float32' else ' ' + row['dtype']}", row["direction"],
        *(_least(row, kind) for kind in (*TORCH, *OURS, "dcls")), f"{row['ratio']:.2f}", f"{row['native_ratio']:.2f}",
        f"{row['over_limit']:.1f}", f"{row['error']:.0e}", f"{row['native_error']:.0e}", row["best_rival"],
        f"{best}: {plan}" if plan else best,
    ]  # fmt: skip


def _least(row: Mapping[str, Any], kind: str) -> str:
    """The least time of a kind, and in which layout."""
    names = {f"{kind} {layout}": short for layout, short in _LAYOUTS.items()}
    found = [
        (ms, short) for name, ms in row["times_ms"].items()
        for start, short in names.items() if name == start or name.startswith(f"{start} ")
    ]  # fmt: skip
    if not found:
        return "-"
    ms, short = min(found)
    return f"{ms:.3g} {short}"


def mean(values: Sequence[float]) -> float:
    """The geometric mean; nan of nothing."""
    return math.exp(math.fsum(math.log(v) for v in values) / len(values)) if values else math.nan


def means(rows: Rows) -> list[dict[str, Any]]:
    """Geometric means of the ratio by kind of layer and direction, with how many rows are under 0.97."""
    found = []
    for kind in ("depthwise", "control", "other", "all"):
        here = [row for row in rows if kind in (row["kind"], "all")]
        for name, directions in _DIRECTIONS.items():
            chosen = [row for row in here if row["direction"] in directions]
            if chosen and (kind == "all" or len(here) < len(rows) or name != "all"):
                worst = min(chosen, key=lambda row: float(row["ratio"]))
                found.append({
                    "layers": kind, "direction": name, "rows": len(chosen),
                    "ratio": mean([row["ratio"] for row in chosen]), "least": worst["ratio"],
                    "of": f"{worst['layer']} {worst['direction']}",
                    "vs eager": mean([r["native_ratio"] for r in chosen if not math.isnan(r["native_ratio"])]),
                    "over limit": mean([row["over_limit"] for row in chosen]),
                    f"under {SUSPICIOUS}": sum(row["ratio"] < SUSPICIOUS for row in chosen),
                })  # fmt: skip
    return found


def summary(rows: Rows) -> str:
    """Means, the rows that a summary always shows, and all losses."""
    if not rows:
        return "nothing was measured"
    parts = [
        "Geometric means; ratio: torch's fastest over ours, under 1 is a loss.",
        tabulate(means(rows), headers="keys", tablefmt="github", floatfmt=".2f"),
    ]
    for layers in (MUST_SHOW, None):
        lines = []
        for row in rows:
            if row["layer"] in layers if layers else row["ratio"] < SUSPICIOUS:
                lines.append([
                    row["layer"], row["dtype"], row["direction"], f"{row['ratio']:.2f}x", f"{row['native_ratio']:.2f}x",
                    f"{row['over_limit']:.1f}", row["best_rival"], row["best_ours"],
                ])  # fmt: skip
        title = "Always shown" if layers else f"Under {SUSPICIOUS}, after timing again: {len(lines)} of {len(rows)}"
        headers = ("layer", "dtype", "direction", "ratio", "vs eager", "over limit", "rival", "ours")
        if lines or not layers:
            parts.append(f"\n{title}")
        if lines:
            parts.append(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))
    failed = [f"{row['layer']} {row['direction']}: {v}: {why}" for row in rows for v, why in row["failed"].items()]
    wrong = [
        f"WRONG: {row['layer']} {row['dtype']} {row['direction']}: {text}" for row in rows for text in row["wrong"]
    ]
    if failed:
        parts += ["\nDid not run:", *failed]
    return "\n".join([*parts, *wrong])
