"""Interpolated kernels in a small classifier: ``python -m benchmarks.classifier --out PICTURE.png --json FACTS.json``.

Which of ten photographs is a patch of 32x32 pixels from? The photographs ship with scikit-image; training patches come
from the left of each, test patches from the right. The same network is trained with plain 3x3 kernels, with
interpolated 7x7 ones of as many weights that start as the plain ones do (naive), and with interpolated ones whose
initial weights are rescaled, for white or for smooth input: same patches, same order, same optimizer, several seeds. A
small network (conv 3 -> 35, relu, pool, conv 35 -> 10, relu, pool, two linear layers) is trained by Adam and by SGD, a
deeper one, with six more convolutions 10 -> 10 after the second pool, where what each layer amplifies multiplies up,
by Adam. Read a footprint's effect on SGD with care: it scales a weight's gradient too, as a larger learning rate
would.
Needs scikit-image and matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

from adaptconv import AdaptiveConv2d
from adaptconv.kernels.interpolated import Interpolated
from benchmarks.facts import machine_facts

PATCH = 32
TRAIN_PART = 0.65  # of a photograph's width
# Function of skimage.data (the photographs that come with the package) -> by how much it is scaled down.
PHOTOGRAPHS = {
    "astronaut": 2, "chelsea": 2, "coffee": 2, "immunohistochemistry": 2, "hubble_deep_field": 2, "retina": 4,
    "rocket": 2, "stereo_motorcycle": 2, "grass": 2, "gravel": 2,
}  # fmt: skip
NETWORKS = {"small": 0, "deep": 6}  # convolutions beyond the first two
TRAININGS = {
    "2 convolutions, Adam 0.001": ("small", "adam", 1e-3),
    "8 convolutions, Adam 0.001": ("deep", "adam", 1e-3),
    "2 convolutions, SGD 0.01, momentum 0.9": ("small", "sgd", 1e-2),
}
KINDS: dict[str, Any] = {
    "plain 3x3": 3,
    "interpolated, naive": Interpolated(3, rescale=False),
    "interpolated, rescaled (white)": Interpolated(3, rescale="white"),
    "interpolated, rescaled (smooth)": Interpolated(3, rescale="smooth"),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9),
}


@dataclass(frozen=True)
class Patches:
    """Normalised patches ``[N, 3, 32, 32]`` float32 and the number of their photograph ``[N]``."""

    train: Tensor
    train_class: Tensor
    test: Tensor
    test_class: Tensor


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        training, kind, seed: of what.
        std: layer -> standard deviation of its output on test patches before training.
        loss: mean training loss of each epoch.
        accuracy: share of test patches recognised after each epoch.
        seconds: what it took.
    """

    training: str
    kind: str
    seed: int
    std: list[float]
    loss: list[float]
    accuracy: list[float]
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the tables, draw the picture."""
    arguments = _arguments(argv)
    patches = photographs(arguments.patches)
    runs = []
    for training in TRAININGS:
        for seed in range(arguments.seeds):
            for kind in KINDS:
                runs.append(trained(training, kind, seed, patches, arguments.epochs))
                last = runs[-1]
                print(
                    f"{training}, {kind}, seed {seed}: loss {last.loss[-1]:.3f}, accuracy {last.accuracy[-1]:.3f}, "
                    f"{last.seconds:.1f} s",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
    for training in TRAININGS:
        print(f"\n{training}\n{_table([run for run in runs if run.training == training])}")
    if arguments.out:
        draw(runs, arguments.out)
    if arguments.json:
        content = {
            "machine": machine_facts(torch.device("cpu")), "patches": arguments.patches,
            "runs": [asdict(run) for run in runs],
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.classifier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="draw the picture here (PNG or SVG)")
    parser.add_argument("--json", type=Path, help="write every number here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--patches", type=int, default=80, help="training patches a photograph; half as many for the test"
    )
    return parser.parse_args(argv)


# ---- data ---------------------------------------------------------------------------------------


def photographs(count: int) -> Patches:
    """``count`` training patches a photograph, half as many to test with, always the same ones."""
    from skimage import data

    generator = torch.Generator().manual_seed(0)
    train, test = [], []
    for name, scale in PHOTOGRAPHS.items():
        pixels = getattr(data, name)()
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # a stereo pair comes with its depths
        image = torch.as_tensor(pixels.copy()).float() / 255
        image = image.expand(3, -1, -1) if image.dim() == 2 else image.permute(2, 0, 1)
        image = F.avg_pool2d(image, scale)
        split = int(image.shape[2] * TRAIN_PART)
        train.append(_cut(image[:, :, :split], count, generator))
        test.append(_cut(image[:, :, split:], count // 2, generator))
    mean, std = torch.cat(train).mean((0, 2, 3), keepdim=True), torch.cat(train).std((0, 2, 3), keepdim=True)
    classes = torch.arange(len(PHOTOGRAPHS))
    return Patches(
        (torch.cat(train) - mean) / std, classes.repeat_interleave(count),
        (torch.cat(test) - mean) / std, classes.repeat_interleave(count // 2),
    )  # fmt: skip


def _cut(image: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Patches from random places that are not all one colour: ``[count, 3, 32, 32]``."""
    patches: list[Tensor] = []
    while len(patches) < count:
        top, left = (int(torch.randint(extent - PATCH + 1, (), generator=generator)) for extent in image.shape[1:])
        patch = image[:, top : top + PATCH, left : left + PATCH]
        if float(patch.std((1, 2)).mean()) > 0.02:
            patches.append(patch)
    return torch.stack(patches)


# ---- training -----------------------------------------------------------------------------------


def classifier(network: str, kind: str) -> nn.Sequential:
    """The network, its convolutions of one kind."""

    def conv(c_in: int, c_out: int) -> nn.Module:
        return AdaptiveConv2d(c_in, c_out, KINDS[kind], padding="same")

    more = [layer for _ in range(NETWORKS[network]) for layer in (conv(10, 10), nn.ReLU())]
    return nn.Sequential(
        conv(3, 35), nn.ReLU(), nn.MaxPool2d(2), conv(35, 10), nn.ReLU(), nn.MaxPool2d(2), *more, nn.Flatten(),
        nn.Linear(10 * (PATCH // 4) ** 2, 64), nn.ReLU(), nn.Linear(64, len(PHOTOGRAPHS)),
    )  # fmt: skip


def trained(training: str, kind: str, seed: int, patches: Patches, epochs: int) -> Run:
    """Train one network; the seed settles weights and order."""
    network, optimizer, lr = TRAININGS[training]
    torch.manual_seed(seed)
    model = classifier(network, kind)
    order = torch.Generator().manual_seed(seed)
    std = layer_stds(model, patches.test)
    steps = OPTIMIZERS[optimizer](model.parameters(), lr)
    losses, accuracies = [], []
    start = perf_counter()
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(patches.train), generator=order).split(40):
            loss = F.cross_entropy(model(patches.train[batch]), patches.train_class[batch])
            steps.zero_grad()
            loss.backward()
            steps.step()
            total += float(loss.detach()) * len(batch)
        losses.append(total / len(patches.train))
        with torch.no_grad():
            hits = model(patches.test).argmax(1) == patches.test_class
        accuracies.append(float(hits.float().mean()))
    return Run(training, kind, seed, std, losses, accuracies, perf_counter() - start)


def layer_stds(model: nn.Sequential, x: Tensor) -> list[float]:
    """Standard deviation of the output of each convolution and linear layer."""
    stds = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, (AdaptiveConv2d, nn.Linear)):
                stds.append(float(x.std()))
    return stds


# ---- words and pictures -------------------------------------------------------------------------


def _table(runs: Sequence[Run]) -> str:
    rows = []
    for kind in KINDS:
        mine = [run for run in runs if run.kind == kind]
        spread = [[run.loss[0], run.loss[-1], run.accuracy[-1]] for run in mine]
        cells = [f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in zip(*spread, strict=True)]
        stds = [f"{statistics.mean(v):.3g}" for v in zip(*(run.std for run in mine), strict=True)]
        rows.append([kind, *cells, " ".join(stds)])
    header = ("kernels", "loss, 1st epoch", "loss, last", "test accuracy", "std before training, by layer")
    return str(tabulate(rows, headers=header))


_COLOURS = dict(zip(KINDS, ("#555555", "#d1495b", "#edae49", "#00798c"), strict=True))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Loss, accuracy and initial activations of every training: means over seeds, bands from lowest to highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, rows = pyplot.subplots(len(TRAININGS), 3, figsize=(14, 3.9 * len(TRAININGS)), layout="constrained")
    for axes, (training, (network, _, _)) in zip(rows, TRAININGS.items(), strict=True):
        mine = [run for run in runs if run.training == training]
        _lines(axes[0], mine, "loss", "epoch", "training loss (cross-entropy)")
        _lines(axes[1], mine, "accuracy", "epoch", "test accuracy")
        _lines(axes[2], mine, "std", "", "std of output before training")
        for panel in (axes[0], axes[2]):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
            panel.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes[1].set_ylim(0, 1)
        axes[1].axhline(1 / len(PHOTOGRAPHS), color="#888888", linewidth=1, linestyle=":")
        axes[1].text(len(mine[0].loss), 1 / len(PHOTOGRAPHS) - 0.06, "chance", color="#777777", ha="right")
        names = [f"conv {i + 1}" for i in range(NETWORKS[network] + 2)] + ["linear 1", "linear 2"]
        axes[2].set_xticks(range(1, len(names) + 1), names, rotation=0 if len(names) < 6 else 45)
        axes[0].set_title(training, loc="left", weight="bold")
    figure.legend(*rows[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(KINDS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(axes: Any, runs: Sequence[Run], what: str, across: str, up: str) -> None:
    for kind, colour in _COLOURS.items():
        curves = list(zip(*(getattr(run, what) for run in runs if run.kind == kind), strict=True))
        steps = range(1, len(curves) + 1)
        axes.fill_between(steps, list(map(min, curves)), list(map(max, curves)), color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, list(map(statistics.mean, curves)), color=colour, marker="o", markersize=3, label=kind)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    raise SystemExit(main())
