"""The ratios of a results file of ``benchmarks.nets`` as horizontal bars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MEASURES = (
    ("ratio", "torch's fastest over adaptconv's fastest", "tab:blue"),
    ("compile_ratio", "torch.compile over optimize", "tab:orange"),
)


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        content: what the file has: "machine" and "rows".
        path: PNG to write.

    Raises:
        ValueError: no row has a ratio.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in content["rows"] if row["ratio"] is not None]
    if not rows:
        raise ValueError("there is nothing to draw: no row of the file has a ratio")
    whats = list(dict.fromkeys(row["what"] for row in rows))
    most = max(sum(row["what"] == what for row in rows) for what in whats)
    figure, axes = plt.subplots(
        1, len(whats), figsize=(7.0 * len(whats), 1.8 + 0.55 * most), layout="constrained", squeeze=False
    )
    for ax, what in zip(axes[0], whats, strict=True):
        shown = sorted((row for row in rows if row["what"] == what), key=lambda row: float(row["ratio"]))
        places = range(len(shown))
        for number, (key, label, colour) in enumerate(_MEASURES):
            values = [row[key] or 0.0 for row in shown]
            height = [place + 0.19 - 0.38 * number for place in places]
            bars = ax.barh(height, values, height=0.36, color=colour, label=label)
            ax.bar_label(bars, [f"{value:.2f}x" if value else "-" for value in values], padding=3, fontsize=9)
        ax.axvline(1.0, color="grey", linewidth=0.8, zorder=0)
        ax.set_yticks(list(places), [f"{row['network']}\n{row['grouped']:.0%} grouped" for row in shown], fontsize=9)
        if max(float(row["ratio"]) for row in shown) > 8:
            ax.set_xscale("log")
        ax.margins(x=0.15)
        ax.set_title(what, fontsize=11)
        ax.set_xlabel("ratio of times; over 1, adaptconv is faster")
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    machine = content["machine"]
    figure.suptitle(
        f"Whole networks on {machine['device']}; torch {machine['toolchain'].get('torch', '')}, "
        f"adaptconv {machine['adaptconv']}\ngrouped: share of eager torch's time in grouped convolutions",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
