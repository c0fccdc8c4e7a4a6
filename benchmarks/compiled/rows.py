"""What the rows of ``benchmarks.compiled`` say: whether each promise holds, and the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]
VARIANTS = ("compile", "optimize", "forced")
EXACT = 1e-9  # in float64
_FLOOR = 1e-6  # relative error under which nobody asks which of two float32 results is nearer
_LONGER, _MORE_S = 1.10, 2.0  # of compile time
_WITHIN = 1.01


# ---- what must hold ------------------------------------------------------------------------------


def faults(row: Row) -> list[str]:
    """Every promise that a checked model does not keep, in words."""
    return [*(f"{name} failed: {reason}" for name, reason in row["failed"].items()), *_value_faults(row),
            *_graph_faults(row), *(f"compiling {text}" for text in slow(row))]  # fmt: skip


def overhead_faults(row: Row) -> list[str]:
    """Where a model whose plans are all native is not what plain torch.compile made of it."""
    lines = [f"{name} failed: {reason}" for name, reason in row["failed"].items()]
    for what in ("forward", "training"):
        part = row.get("overhead", {}).get(what)
        if part is None:
            continue
        lines += [f"{what}, {way}: other code: {part[way]}" for way in ("pinned", "records") if part[way]]
        ratio, itself = (part["times_us"][way] / part["times_us"]["plain"] for way in ("records", "again"))
        if ratio > _WITHIN * max(1.0, itself):
            lines.append(f"{what}: {ratio:.3f} times torch.compile's time, which is {itself:.3f} times its own")
    return lines


def _sizes(row: Row, variant: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for what in ("forward", "training"):
        for size in row.get(variant, {}).get(what, {}).get("sizes", ()):
            yield f"{what} at {'x'.join(map(str, size['shape']))}", size


def _value_faults(row: Row) -> list[str]:
    theirs = dict(_sizes(row, "compile"))
    lines = []
    for variant in ("optimize", "forced"):
        for where, size in _sizes(row, variant):
            allowed = [_FLOOR, size["eager_error"], size["conditioning"], theirs.get(where, {}).get("error", 0.0)]
            if not size["error"] <= 2 * max(allowed):
                lines.append(f"{variant}, {where}: error {size['error']:.1e}, bound {2 * max(allowed):.1e}")
    exact = row.get("forced", {}).get("double")
    if exact is not None and not max(exact["errors"]) <= EXACT:
        lines.append(f"forced, in float64: error {max(exact['errors']):.1e}, bound {EXACT:.0e}")
    return lines


def graphs_of(row: Row, variant: str, what: str) -> list[int]:
    """Dynamo's graphs after each input size."""
    return [size["graphs"] for size in row.get(variant, {}).get(what, {}).get("sizes", ())]


def _graph_faults(row: Row) -> list[str]:
    lines = []
    for variant in ("optimize", "forced"):
        for what in ("forward", "training"):
            if what not in row.get(variant, {}) or "compile" not in row:
                continue
            theirs, ours = graphs_of(row, "compile", what), graphs_of(row, variant, what)
            breaks = [row[v][what]["breaks"] for v in ("compile", variant)]
            if theirs[: len(ours)] != ours or not ours:
                lines.append(f"{variant}, {what}: graphs after each size {ours}, torch.compile's {theirs}")
            if breaks[0] != breaks[1]:
                lines.append(f"{variant}, {what}: {breaks[1]} graph breaks, torch.compile has {breaks[0]}")
    return lines


def times_of(row: Row) -> Row:
    """Seconds of the first calls: variant -> "forward" and "training" -> seconds."""
    return {
        variant: {what: row[variant][what]["wall_s"] for what in ("forward", "training")}
        for variant in ("compile", "optimize")
        if variant in row
    }


def fastest(row: Row, variant: str, what: str) -> float | None:
    """The least seconds of a variant's compilations."""
    return min((times[variant][what] for times in row["times"] if variant in times), default=None)


def slow(row: Row) -> list[str]:
    """What takes longer to compile than was promised, in words."""
    lines = []
    for what in ("forward", "training"):
        theirs, ours = fastest(row, "compile", what), fastest(row, "optimize", what)
        if theirs is not None and ours is not None and ours > _LONGER * theirs + _MORE_S:
            lines.append(f"{what}: {ours:.1f} s against torch.compile's {theirs:.1f} s")
    return lines


# ---- tables --------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Every row, checks and overheads each in a table of their own."""
    checks = [_check_cells(row) for row in rows if row["what"] == "check"]
    costs = [cells for row in rows if row["what"] == "overhead" for cells in _overhead_cells(row)]
    tables = []
    if checks:
        tables.append(tabulate(checks, headers=_CHECKS, tablefmt="github", disable_numparse=True))
    if costs:
        tables.append(tabulate(costs, headers=_COSTS, tablefmt="github", disable_numparse=True))
    return "\n\n".join(tables) or "nothing was measured"


_CHECKS = (
    "model", "rewritten", "graphs forward", "training", "output", "gradients", "error", "torch's", "off by a rounding",
    "forced", "error", "float64", "compile forward", "training", "pass s",
)  # fmt: skip
_COSTS = ("model", "what", "torch.compile us", "optimize", "torch.compile again", "code")


def _check_cells(row: Row) -> list[str]:
    ours = [size for _, size in _sizes(row, "optimize")]
    theirs = [size for _, size in _sizes(row, "compile")]
    forced = [size for _, size in _sizes(row, "forced")]
    double = row.get("forced", {}).get("double", {})
    spent = [row["optimize"][what]["rewrite_s"] for what in ("forward", "training")] if "optimize" in row else []
    return [
        row["model"], _rewritten(row, "optimize"), _graphs(row, "forward"), _graphs(row, "training"),
        _worst(ours, "output"), _worst(ours, "gradients"), _worst(ours, "error"), _worst(theirs, "error"),
        _worst(ours, "conditioning"), _rewritten(row, "forced"), _worst(forced, "error"),
        f"{max(double['errors']):.0e}" if double else "-", _seconds(row, "forward"), _seconds(row, "training"),
        "/".join(f"{s:.1f}" for s in spent) or "-",
    ]  # fmt: skip


def _graphs(row: Row, what: str) -> str:
    counts = [",".join(map(str, graphs_of(row, variant, what))) for variant in ("compile", "optimize")]
    return counts[0] if len(set(counts)) == 1 else " / ".join(counts)


def _worst(sizes: Sequence[dict[str, Any]], name: str) -> str:
    return f"{max(size[name] for size in sizes):.1e}" if sizes else "-"


def _rewritten(row: Row, variant: str) -> str:
    part = row.get(variant, {}).get("training")
    return f"{part['rewritten']} of {part['sites']}" if part else "-"


def _seconds(row: Row, what: str) -> str:
    theirs, ours = fastest(row, "compile", what), fastest(row, "optimize", what)
    return "-" if theirs is None or ours is None else f"{theirs:.1f} -> {ours:.1f} s"


def _overhead_cells(row: Row) -> list[list[str]]:
    cells = []
    for what in ("forward", "training"):
        part = row.get("overhead", {}).get(what)
        if part is not None:
            times = part["times_us"]
            code = "equal" if not (part["pinned"] or part["records"]) else "DIFFERS"
            cells.append(
                [row["model"], what, f"{times['plain']:,.0f}", f"{times['records'] / times['plain']:.4f}x",
                 f"{times['again'] / times['plain']:.4f}x", code]
            )  # fmt: skip
    return cells
