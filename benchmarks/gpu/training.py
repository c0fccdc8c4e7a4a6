"""A training step of ConvNeXt-T-dcls in bfloat16: images a second against the same network with plain 7x7 layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import adaptconv
from adaptconv.errors import told
from adaptconv.kernels import LearnableSpacing
from adaptconv.measure import interleave
from benchmarks.facts import now
from benchmarks.zoo.papers import ConvNeXt

_WIDTHS, _DEPTHS = (96, 192, 384, 768), (3, 3, 9, 3)
_COUNT, _WINDOW = 34, 17
_BATCH, _SIZE = {"cuda": 128, "cpu": 2}, {"cuda": 224, "cpu": 64}
_TUNING = 0.6  # of the time left, for the network's own layers


@dataclass(frozen=True, slots=True)
class Step:
    """One variant.

    Attributes:
        variant: which.
        batch, size: of the pictures.
        step_ms: 20th percentile of a forward and backward pass under autocast and an SGD step.
        images_s: pictures a second.
        share: of the plain network's pictures a second; the better of its two layouts.
        failed: why it did not run.
        measured_on: when.
    """

    variant: str
    batch: int
    size: int
    step_ms: float = float("nan")
    images_s: float = float("nan")
    share: float = float("nan")
    failed: str = ""
    measured_on: str = ""


def _spacing(channels: int) -> nn.Module:
    layer = adaptconv.AdaptiveConv2d(
        channels, channels, LearnableSpacing(_COUNT, _WINDOW, version="v1"), padding=_WINDOW // 2, groups=channels
    )
    nn.init.uniform_(
        layer.get_parameter("P"), -(_WINDOW // 2), _WINDOW // 2
    )  # trained positions are spread over the window
    nn.init.normal_(layer.weight, std=_COUNT**-0.5)
    return layer


def _plain(channels: int) -> nn.Module:
    return nn.Conv2d(channels, channels, 7, padding=3, groups=channels)


@contextmanager
def _dispatched(backend: str) -> Iterator[None]:
    """As the database says, or all by one backend."""
    if backend:
        with adaptconv.pinned(backend):
            yield
    else:
        yield


def _step(
    spatial: Callable[[int], nn.Module], layout: torch.memory_format, backend: str, device: torch.device
) -> tuple[nn.Module, Tensor, Callable[[], object]]:  # fmt: skip
    torch.manual_seed(0)
    model = ConvNeXt(spatial, _WIDTHS, _DEPTHS).to(device).train()
    model.to(memory_format=layout)  # type: ignore[call-overload]
    size = _SIZE[device.type]
    x = torch.randn(_BATCH[device.type], 3, size, size, device=device).contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        with _dispatched(backend):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()

    return model, x, run


def run(
    device: torch.device, deadline: float, old: Sequence[dict[str, Any]], write: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Tune the network's own layers, then time all variants in turn.

    Args:
        device: where.
        deadline: by ``time.monotonic``.
        old: steps of an earlier run; with any, nothing is done.
        write: called with the result.
    """
    if old or monotonic() > deadline:
        return list(old)
    forms = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    ways = {
        f"{name}, {layout}": (spatial, form, backend)
        for name, spatial, backend in (
            ("plain 7x7", _plain, "native"), ("dcls 17x17, constructed, torch", _spacing, "native"),
            ("dcls 17x17, adaptconv", _spacing, ""),
        )
        for layout, form in forms.items()
    }  # fmt: skip
    calls: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for name, (spatial, form, backend) in ways.items():
        model, x, call = _step(spatial, form, backend, device)
        try:
            if not backend:
                with torch.autocast(device.type, torch.bfloat16):
                    adaptconv.tune(model, x, train=True, budget_s=max(1.0, _TUNING / 2 * (deadline - monotonic())))
            call()
        except Exception as failure:  # noqa: BLE001 - a variant that does not run is reported as that
            failed[name] = told(failure)
            continue
        calls[name] = call
    timings = interleave(
        calls, budget_s=max(2.0, deadline - monotonic()), device=device, min_rounds=3, max_rounds=30, warmup=1
    )
    batch, size = _BATCH[device.type], _SIZE[device.type]
    rate = {name: batch / timing.p20_us * 1e6 for name, timing in timings.items()}
    plain = max((r for name, r in rate.items() if name.startswith("plain")), default=float("nan"))
    steps = [
        asdict(
            Step(name, batch, size, timings[name].p20_us / 1e3, rate[name], rate[name] / plain, measured_on=now())
            if name in timings
            else Step(name, batch, size, failed=failed.get(name, ""), measured_on=now())
        )
        for name in ways
    ]
    write(steps)
    return steps


def table(steps: Sequence[dict[str, Any]]) -> str:
    """One line a variant."""
    lines = [
        (s["variant"], f"{s['step_ms']:.1f}", f"{s['images_s']:.0f}", f"{s['share']:.2f}", s["failed"]) for s in steps
    ]
    head = ("training step, ConvNeXt-T, bfloat16", "ms", "images/s", "of plain", "")
    return str(tabulate(lines, head, tablefmt="github", disable_numparse=True)) if steps else ""
