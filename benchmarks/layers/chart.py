"""The ratios of a results file of ``benchmarks.run`` as horizontal bars: a colour a direction, a panel a kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.layers.summary import mean

_COLOURS = {
    "forward": ("forward", "tab:blue"), "grad_input": ("input gradient", "tab:orange"),
    "grad_weight": ("weight gradient", "tab:green"),
}  # fmt: skip
_TITLES = {"depthwise": "depthwise", "control": "one grid of taps, few groups", "other": "other taps"}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        content: what the file has: "machine" and "rows".
        path: PNG to write.

    Raises:
        ValueError: the file has no rows.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = content["rows"]
    if not rows:
        raise ValueError("there is nothing to draw: the file has no rows")
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        name = row["layer"] if row["dtype"] == "float32" else f"{row['layer']} ({row['dtype']})"
        panels.setdefault(row["kind"], {}).setdefault(name, {})[row["direction"]] = row["ratio"]
    kinds = [kind for kind in _TITLES if kind in panels]
    columns = [[kind for kind in kinds if kind == "depthwise"], [kind for kind in kinds if kind != "depthwise"]]
    columns = [column for column in columns if column]
    most = max(sum(len(panels[kind]) + 2 for kind in column) for column in columns)
    figure = plt.figure(figsize=(7.5 * len(columns), 1.8 + 0.42 * most), layout="constrained")
    for part, column in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        axes = part.subplots(len(column), 1, squeeze=False, height_ratios=[len(panels[kind]) + 2 for kind in column])
        for ax, kind in zip(axes[:, 0], column, strict=True):
            layers = sorted(panels[kind].items(), key=lambda item: mean(list(item[1].values())))
            for number, (direction, (label, colour)) in enumerate(_COLOURS.items()):
                places = [i for i, (_, ratios) in enumerate(layers) if direction in ratios]
                values = [layers[i][1][direction] for i in places]
                heights = [i + 0.26 * (1 - number) for i in places]
                # Bars start at 1, so that a loss grows to the left.
                bars = ax.barh(heights, [v - 1 for v in values], height=0.25, left=1.0, color=colour, label=label)
                labels = [f"{value:.2f}x" if value < 10 else f"{value:.0f}x" for value in values]
                for bar, value, text in zip(bars, values, labels, strict=True):
                    ax.annotate(
                        text, (max(value, 1.0), bar.get_y() + bar.get_height() / 2), (3, 0),
                        textcoords="offset points", va="center", fontsize=6,
                    )  # fmt: skip
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.axvline(1.0, color="grey", linewidth=0.8)
            ax.set_yticks(range(len(layers)), [name for name, _ in layers], fontsize=8)
            ax.set_ylim(-0.7, len(layers) - 0.3)
            values = [value for _, ratios in layers for value in ratios.values()]
            ax.set_xlim(min(0.8, 0.9 * min(values)), max(2.0, 1.35 * max(values)))
            ax.set_title(f"{_TITLES[kind]}: geometric mean {mean(values):.2f}x", fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
    handles = [mpl.patches.Patch(color=colour, label=label) for label, colour in _COLOURS.values()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9)
    machine = content["machine"]
    figure.suptitle(
        f"Layers: torch's fastest time over adaptconv's fastest; right of 1x adaptconv is faster\n{machine['device']}; "
        f"torch {machine['toolchain'].get('torch', '')}, adaptconv {machine['adaptconv']}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
