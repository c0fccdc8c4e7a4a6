"""One picture of the taps of every kernel family: ``python -m benchmarks.gallery``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from adaptconv.kernels.base import Family
from adaptconv.kernels.grid import FixedTaps, Grid
from adaptconv.kernels.interpolated import Interpolated
from adaptconv.kernels.masked import Masked
from adaptconv.kernels.partial import PartiallyDilated
from adaptconv.kernels.spacing import LearnableSpacing
from adaptconv.kernels.symmetric import Symmetric
from adaptconv.modules import AdaptiveConv2d
from adaptconv.plots import plot

_PLUS = "0001000/0001000/0001000/1111111/0001000/0001000/0001000"


def shown() -> list[tuple[str, Family, bool]]:
    """[title, family, whether a layer's weights are drawn and not only where taps sit], bound to two axes."""
    families: list[tuple[str, Family, bool]] = [
        ("Grid(5)", Grid(5), False),
        ("Grid(3, dilation=4)", Grid(3, 4), False),
        ("PartiallyDilated(3, 2, 3)", PartiallyDilated(3, 2, 3), False),
        ("Interpolated(3, rounds=1)", Interpolated(3), True),
        ("Interpolated(3, rounds=2)", Interpolated(3, 2), True),
        ("LearnableSpacing(9, 13, 'v1')", LearnableSpacing(9, 13, "v1"), True),
        ("LearnableSpacing(9, 13, 'gauss')", LearnableSpacing(9, 13, "gauss"), True),
        ("Masked(7, density=0.3)", Masked(7, density=0.3), True),
        ("Symmetric(7, 'dihedral')", Symmetric(7, "dihedral"), True),
        ("FixedTaps: any pattern", FixedTaps.of(_PLUS), False),
    ]
    return [(title, family.bound(2), weights) for title, family, weights in families]


def drawn(family: Family) -> AdaptiveConv2d:
    """A layer of one channel; learnable positions, which start near the centre, all over the window."""
    layer = AdaptiveConv2d(1, 1, family)
    if isinstance(family, LearnableSpacing):
        reach = min(family.rule.window) // 2
        torch.nn.init.uniform_(layer.get_parameter("P"), -reach, reach)
    return layer


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the families and write the picture."""
    parser = argparse.ArgumentParser("python -m benchmarks.gallery", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures" / "families.png")
    parser.add_argument("--seed", type=int, default=3, help="of the layers whose weights are drawn")
    arguments = parser.parse_args(argv)
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    torch.manual_seed(arguments.seed)
    families = shown()
    columns = 5
    rows = -(-len(families) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.0 * columns, 3.3 * rows), layout="constrained", squeeze=False)
    for ax in grid.flat[len(families) :]:
        ax.set_axis_off()
    for ax, (title, family, weights) in zip(grid.flat, families, strict=False):
        plot(drawn(family) if weights else family, ax)
        ax.set_title(title, fontsize=10)
    figure.suptitle(
        "Taps in their window: blue where one sits, darker where it weighs more, grey where none does, + the centre",
        fontsize=11,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)
    plt.close(figure)
    print(f"{len(families)} families: {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
