"""Learnable spacings against the dcls package: ``python -m benchmarks.spacing --part construct``.

Construction alone with the memory it keeps for backward, whole layers at the stages of a ConvNeXt-T with
a 23x23 window of 26 elements, and positions shared by all outputs against constructing the kernel and against
im2col. Candidates of one row are interleaved in one run; ratios are theirs over ours, of the fastest samples.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from adaptconv import AdaptiveConv2d
from adaptconv.compat import dcls
from adaptconv.kernels import LearnableSpacing
from adaptconv.measure import interleave
from benchmarks.facts import machine_facts

Row = dict[str, Any]
_CPU = torch.device("cpu")
_STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
_WINDOW, _COUNT = 23, 26
_SHARED = ((64, 64, 28, 17, 34), (128, 128, 14, 23, 26), (256, 256, 14, 17, 34))  # C_in, C_out, map, window, count


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the parts asked for, print their tables."""
    parser = argparse.ArgumentParser("python -m benchmarks.spacing", description=__doc__)
    parser.add_argument("--part", choices=("construct", "layers", "shared", "all"), default="all")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a row (default 10)")
    parser.add_argument("--batch", type=int, default=1, help="images a batch (default 1)")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak:
        print(_own_peak(arguments.peak[0], int(arguments.peak[1]), arguments.batch))
        return 0
    parts: dict[str, Callable[[], list[Row]]] = {
        "construct": lambda: constructions(arguments.budget),
        "layers": lambda: layers(arguments.budget, arguments.batch),
        "shared": lambda: shared(arguments.budget, arguments.batch),
    }
    results: dict[str, list[Row]] = {}
    for name, measure in parts.items():
        if arguments.part in (name, "all"):
            results[name] = measure()
            shown = [{key: value for key, value in row.items() if key != "samples"} for row in results[name]]
            print(f"\n{name}\n{tabulate(shown, headers='keys', floatfmt='.3g')}", flush=True)
    if arguments.out:
        record = {"machine": machine_facts(_CPU), "settings": {"batch": arguments.batch}, **results}
        arguments.out.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    return 0


def _pair(channels: int, version: str = "gauss") -> tuple[Any, Any]:
    """The peer's depthwise layer and ours, of the same values."""
    logging.disable(logging.WARNING)  # the peer names its missing extensions for every layer
    from DCLS.construct import modules as peer

    arguments: dict[str, Any] = {
        "dilated_kernel_size": _WINDOW, "padding": _WINDOW // 2, "groups": channels, "version": version,
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = peer.Dcls2d(channels, channels, _COUNT, **arguments)
    ours = dcls.Dcls2d(channels, channels, _COUNT, **arguments)
    ours.load_state_dict(theirs.state_dict())
    logging.disable(logging.NOTSET)
    return theirs, ours


# ---- construction -------------------------------------------------------------------------------


def constructions(budget_s: float) -> list[Row]:
    """Forward and backward of the construction, and what it keeps in between; 384 channels."""
    rows = []
    for version in ("v0", "v1", "max", "gauss"):
        pair = dict(zip(("dcls", "adaptconv"), _pair(384, version), strict=True))
        grad = torch.randn(384, 1, _WINDOW, _WINDOW)
        kept = {name: _kept_bytes(layer) for name, layer in pair.items()}
        steps = {name: partial(_construction_step, layer, grad) for name, layer in pair.items()}
        row: Row = {"version": version, **_compared(interleave(steps, budget_s=budget_s, device=_CPU))}
        row |= {f"{name} saved MB": made / 1e6 for name, (made, _) in kept.items()}
        row |= {f"{name} with parameters": (made + own) / 1e6 for name, (made, own) in kept.items()}
        rows.append(row)
    return rows


def _constructed(layer: Any) -> Tensor:
    sigma = layer.SIG if layer.version in ("max", "gauss") else None
    kernel: Tensor = layer.DCK(layer.weight, layer.P, sigma)
    return kernel


def _construction_step(layer: Any, grad: Tensor) -> object:
    learned = [p for name, p in layer.named_parameters() if name != "bias"]
    return torch.autograd.grad(_constructed(layer), learned, grad)


def _kept_bytes(layer: Any) -> tuple[int, int]:
    """Bytes of unique storages that a construction saves for backward: those it makes, and parameters."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    made: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        made[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kernel = _constructed(layer)
    del kernel
    parameters = sum(size for at, size in made.items() if at in own)
    return sum(made.values()) - parameters, parameters


# ---- whole layers -------------------------------------------------------------------------------


def layers(budget_s: float, batch: int) -> list[Row]:
    """Forward in eval mode and a training step at every stage; positions move in training only."""
    rows = []
    for channels, extent in _STAGES:
        pair = dict(zip(("dcls", "adaptconv"), _pair(channels), strict=True))
        x = torch.randn(batch, channels, extent, extent)
        name = f"{batch}x{channels}x{extent}^2"
        with torch.no_grad():
            right, mine = (layer(x) for layer in pair.values())
            error = float((mine - right).abs().max() / right.abs().max())
            calls = {who: partial(layer, x) for who, layer in pair.items()}
            times = interleave(calls, budget_s=budget_s / 2, device=_CPU)
        rows.append({"layer": name, "what": "forward", **_compared(times), "error": error})
        leaf = x.clone().requires_grad_()
        steps = {who: partial(_step, layer, leaf) for who, layer in pair.items()}
        times = interleave(steps, budget_s=budget_s / 2, device=_CPU)
        rows.append({"layer": name, "what": "step", **_compared(times), "error": error})
    return rows


def _step(layer: Any, x: Tensor) -> object:
    return torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])


def _compared(times: Any) -> Row:
    row: Row = {f"{name} ms": timing.min_us / 1e3 for name, timing in times.items()}
    first, *_, last = times.values()
    return {**row, "ratio": first.min_us / last.min_us, "samples": {n: asdict(t) for n, t in times.items()}}


# ---- shared positions ---------------------------------------------------------------------------


def shared(budget_s: float, batch: int) -> list[Row]:
    """Positions shared by all outputs: in steps, by a constructed kernel, and by im2col of the whole window."""
    rows = []
    for index, case in enumerate(_SHARED):
        ways = {way: _shared_step(way, case, batch) for way in ("im2col", "constructed", "steps")}
        times = interleave(ways, budget_s=budget_s, device=_CPU, min_rounds=3)
        row: Row = {"C_in, C_out, map, window, count": case}
        row |= {f"{way} ms": timing.min_us / 1e3 for way, timing in times.items()}
        row |= {f"{way} peak MB": _peak_mb(way, index, batch) for way in ways}
        rows.append({**row, "samples": {way: asdict(timing) for way, timing in times.items()}})
    return rows


def _shared_step(way: str, case: tuple[int, int, int, int, int], batch: int) -> Callable[[], object]:
    """A training step of one way to compute the layer, the gradients of P and SIG included."""
    ins, outs, extent, window, count = case
    torch.manual_seed(0)
    layer = AdaptiveConv2d(ins, outs, LearnableSpacing(count, window, shared=True), padding="same")
    x = torch.randn(batch, ins, extent, extent, requires_grad=True)
    parameters, bias = list(layer.parameters()), layer.get_parameter("bias")

    def constructed() -> Tensor:
        return F.conv2d(x, layer.kernel.dense(), layer.bias, padding="same")

    def im2col() -> Tensor:
        columns = F.unfold(x, window, padding=window // 2)
        y: Tensor = layer.kernel.weight.flatten(1) @ columns
        return y.reshape(batch, outs, extent, extent) + bias.view(-1, 1, 1)

    forward: dict[str, Callable[[], Tensor]] = {
        "steps": lambda: layer(x), "constructed": constructed, "im2col": im2col,
    }  # fmt: skip
    return lambda: torch.autograd.grad(forward[way]().sum(), [x, *parameters])


def _peak_mb(way: str, case: int, batch: int) -> float:
    """The most memory a step adds to a process of its own."""
    command = [sys.executable, "-m", "benchmarks.spacing", "--peak", way, str(case), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return float(done.stdout.split()[-1])


def _own_peak(way: str, case: int, batch: int) -> float:
    """Megabytes of resident memory a step adds at its largest to what was held before; nan where there is no /proc."""
    step = _shared_step(way, _SHARED[case], batch)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # from here on: the largest so far is now
        before = _largest_kb()
        step()
        return (_largest_kb() - before) / 1024
    except OSError:
        return float("nan")


def _largest_kb() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    raise SystemExit(main())
