"""What the graph pass gains where models spell their kernels out: ``python -m benchmarks.spellings``.

Layers in plain torch, as people write them: kernels with holes constructed from a small parameter, interpolated
kernels, ``F.unfold`` and a matrix product, zeros padded beforehand, sums of convolutions. Each is compiled by
``torch.compile`` and by ``adaptconv.optimize``, from the same weights and inputs, and both are timed side by side, in
evaluation and in a training step (forward and backward to input and parameters). The ratio is torch.compile's time over
ours: over 1 is a gain. ``--tune`` tunes first, for a budget a layer; without it predictions and the shipped records
decide. Outputs and gradients are compared with float64 before anything is timed: an error over four times that of
torch.compile, and over a rounding, is WRONG and the exit status 1.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import adaptconv
from adaptconv import measure
from adaptconv.compile.optimize import forget_compiled
from benchmarks.facts import keep_freed_memory, machine_facts, now, write_results

_CPU = torch.device("cpu")
_FLOOR = 1e-5  # relative error under which nobody asks which of two float32 results is nearer


class Spelled(nn.Module):
    """A function of an input and a few parameters."""

    def __init__(self, call: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        """Make the parameters, small enough that sums stay of order one."""
        super().__init__()
        self.call = call
        self.names = [f"w{i}" for i in range(len(shapes))]
        for name, shape in zip(self.names, shapes, strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / math.prod(shape[1:]) ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Whatever the function says."""
        tensors = [getattr(self, name) for name in self.names]
        y: Tensor = self.call(x, *tensors)
        return y


def _holes_written(x: Tensor, w: Tensor) -> Tensor:
    kernel = w.new_zeros(*w.shape[:2], 17, 17)
    kernel[..., ::4, ::4] = w
    return F.conv2d(x, kernel, padding=8, groups=x.shape[1] // w.shape[1])


def _holes_by_kron(x: Tensor, w: Tensor) -> Tensor:
    kernel = torch.kron(w, w.new_tensor([[1.0, 0.0], [0.0, 0.0]]))[..., :-1, :-1]
    return F.conv2d(x, kernel, padding=2)


def _wings_and_island(x: Tensor, left: Tensor, island: Tensor, right: Tensor) -> Tensor:
    def spaced(wing: Tensor) -> Tensor:
        return torch.stack([wing, torch.zeros_like(wing)], -1).flatten(2)

    kernel = torch.cat([spaced(left), island, spaced(right).roll(1, 2)], 2)
    return F.conv1d(x, kernel, padding=10, groups=x.shape[1])


def _interpolated(x: Tensor, w: Tensor) -> Tensor:
    line = torch.tensor([0.5, 1.0, 0.5]).to(w)
    upsample = (line[:, None] * line)[None, None]
    kernel = F.conv_transpose2d(w.flatten(0, 1)[:, None], upsample, stride=2)
    kernel = F.conv_transpose2d(kernel, upsample, stride=2).unflatten(0, w.shape[:2])[:, :, 0]
    return F.conv2d(x, kernel, padding=kernel.shape[2] // 2, groups=x.shape[1] // w.shape[1])


def _unfolded(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    columns = F.unfold(x, 3, dilation=2, padding=2)
    return (w.flatten(1) @ columns).view(x.shape[0], -1, *x.shape[2:]) + b.view(-1, 1, 1)


def _causal(x: Tensor, w: Tensor) -> Tensor:
    return F.conv1d(F.pad(x, (16, 0)), w, dilation=8, groups=x.shape[1] // w.shape[1])


def _zero_padded(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(F.pad(F.relu(x), (1, 1, 1, 1)), w)


def _dual(x: Tensor, near: Tensor, far: Tensor) -> Tensor:
    groups = x.shape[1]
    return F.conv1d(x, near, padding=2, groups=groups) + F.conv1d(x, far, padding=10, dilation=2, groups=groups)


def _branches(x: Tensor, *kernels: Tensor) -> Tensor:
    first, *others = (F.conv2d(x, w, padding=d, dilation=d, groups=x.shape[1]) for d, w in enumerate(kernels, 1))
    return sum(others, first)


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer, the shape of its input, and how it is spelled."""

    name: str
    spelled: str
    make: Callable[[], Spelled]
    shape: tuple[int, ...]


LAYERS = (
    Layer("holes-dw", "5x5 written into a depthwise 17x17", lambda: Spelled(_holes_written, (96, 1, 5, 5)),
          (2, 96, 56, 56)),
    Layer("holes-dense", "5x5 written into a 17x17 over 32 channels", lambda: Spelled(_holes_written, (32, 32, 5, 5)),
          (1, 32, 56, 56)),
    Layer("holes-kron", "3x3 by kron into a 5x5 over 64 channels", lambda: Spelled(_holes_by_kron, (64, 64, 3, 3)),
          (1, 64, 56, 56)),
    Layer("wings-and-island", "three parameters joined, depthwise, 1-D",
          lambda: Spelled(_wings_and_island, (64, 1, 4), (64, 1, 5), (64, 1, 4)), (8, 64, 768)),
    Layer("interpolated-dw", "3x3 upsampled twice, depthwise", lambda: Spelled(_interpolated, (96, 1, 3, 3)),
          (2, 96, 56, 56)),
    Layer("interpolated-dense", "3x3 upsampled twice over 32 channels",
          lambda: Spelled(_interpolated, (32, 32, 3, 3)), (1, 32, 56, 56)),
    Layer("unfold", "unfold and a product, 3x3 d2 over 64 channels", lambda: Spelled(_unfolded, (64, 64, 9), (64,)),
          (2, 64, 56, 56)),
    Layer("causal-dw", "zeros padded before, depthwise k3 d8, 1-D", lambda: Spelled(_causal, (256, 1, 3)),
          (4, 256, 2000)),
    Layer("causal-dense", "zeros padded before, k3 d8 over 64 channels, 1-D", lambda: Spelled(_causal, (64, 64, 3)),
          (4, 64, 2000)),
    Layer("zero-padded", "ReLU, zeros all around, then 3x3", lambda: Spelled(_zero_padded, (64, 64, 3, 3)),
          (2, 64, 56, 56)),
    Layer("dual", "a dense and a dilated convolution added, depthwise 1-D",
          lambda: Spelled(_dual, (64, 1, 5), (64, 1, 11)), (8, 64, 768)),
    Layer("branches", "three dilations added, depthwise 3x3",
          lambda: Spelled(_branches, (64, 1, 3, 3), (64, 1, 3, 3), (64, 1, 3, 3)), (2, 64, 56, 56)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One layer, forward or in a training step; times in milliseconds, errors relative to float64."""

    layer: str
    spelled: str
    what: str
    found: str
    plans: str
    compile_ms: float
    optimize_ms: float
    compile_error: float
    optimize_error: float
    measured_on: str

    @property
    def ratio(self) -> float:
        """torch.compile's time over ours."""
        return self.compile_ms / self.optimize_ms

    @property
    def wrong(self) -> bool:
        """Whether our error is over four times theirs and over a rounding."""
        return self.optimize_error > max(_FLOOR, 4 * self.compile_error)


def measured(layer: Layer, *, train: bool, tune_s: float, seconds: float) -> Row:
    """Check and time one layer."""
    torch.manual_seed(0)
    net, x = layer.make(), torch.randn(layer.shape)
    if train:
        x.requires_grad_()
    if tune_s:
        adaptconv.tune(net, x, train=train, budget_s=tune_s)
    forget_compiled()
    ours, theirs = adaptconv.optimize(net), torch.compile(net)
    truth = _results(copy.deepcopy(net).double(), x.detach().double().requires_grad_(train), train)
    their_error, our_error = (_error(_results(call, x, train), truth) for call in (theirs, ours))
    rows = adaptconv.report(ours).rows
    timings = measure.interleave(
        {"compile": lambda: _results(theirs, x, train), "optimize": lambda: _results(ours, x, train)},
        budget_s=seconds, device=_CPU, min_rounds=5, max_rounds=2000,
    )  # fmt: skip
    found = sorted({row.remark or row.kind for row in rows})
    plans = ", ".join(f"{row.direction}: {row.backend}" for row in rows)
    done = "" if any(row.rewritten for row in rows) else " (as written)"
    return Row(
        layer.name, layer.spelled, "training step" if train else "forward", "; ".join(found) + done, plans,
        timings["compile"].p20_us / 1e3, timings["optimize"].p20_us / 1e3, their_error, our_error, now(),
    )  # fmt: skip


def _results(call: Callable[[Tensor], Tensor], x: Tensor, train: bool) -> list[Tensor]:
    """The output, and in training the gradients of the input and every parameter."""
    if not train:
        with torch.no_grad():
            return [call(x)]
    y = call(x)
    module = getattr(call, "_orig_mod", call)
    assert isinstance(module, nn.Module)
    gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    return [y.detach(), *gradients]


def _error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative L2 error of a result."""
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(results, truth, strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the layers asked for; print the table, write the file."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.spellings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=[layer.name for layer in LAYERS], metavar="NAME", help="these")
    parser.add_argument("--list", action="store_true", help="name the layers and stop")
    parser.add_argument("--forward-only", action="store_true", help="leave out the training steps")
    parser.add_argument("--tune", type=float, default=0.0, metavar="SECONDS", help="tune each layer for so long first")
    parser.add_argument("--seconds", type=float, default=3.0, help="timing a row (3)")
    parser.add_argument("--out", type=Path, help="write JSON here, after every row")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(tabulate([(layer.name, layer.spelled, layer.shape) for layer in LAYERS], tablefmt="plain"))
        return 0
    facts = machine_facts(_CPU) | {"keep_memory": keep_freed_memory()}
    rows: list[Row] = []
    for layer in (layer for layer in LAYERS if not arguments.only or layer.name in arguments.only):
        for train in (False,) if arguments.forward_only else (False, True):
            rows.append(measured(layer, train=train, tune_s=arguments.tune, seconds=arguments.seconds))
            print(f"{layer.name}, {rows[-1].what}: {rows[-1].ratio:.2f}x", file=sys.stderr, flush=True)
            if arguments.out:
                write_results(arguments.out, _CPU, facts=facts, rows=[asdict(row) for row in rows])
    print(tabulate([_cells(row) for row in rows], headers=_HEADER, tablefmt="github", disable_numparse=True))
    return 1 if any(row.wrong for row in rows) else 0


_HEADER = ("layer", "spelled", "what", "torch.compile ms", "optimize ms", "ratio", "plans", "found", "error", "theirs")


def _cells(row: Row) -> list[str]:
    return [
        row.layer, row.spelled, row.what, f"{row.compile_ms:.3g}", f"{row.optimize_ms:.3g}", f"{row.ratio:.2f}x",
        row.plans, row.found, f"{row.optimize_error:.1e}" + " WRONG" * row.wrong, f"{row.compile_error:.1e}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
