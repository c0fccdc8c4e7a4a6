"""A training step of ConvNeXt-T-dcls in bfloat16: images a second against the same network with plain 7x7 layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from adaptconv.tuner.problems import model_problems
from benchmarks.facts import now
from benchmarks.gpu.steps import begin
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
        share: of the plain network's pictures a second; the better of its two.
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


class _Contiguous(nn.Module):
    """A layer whose input is laid out image by image first: the network itself goes on in channels_last."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``y`` of ``x``."""
        y: Tensor = self.layer(x.contiguous())
        return y


_WAYS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "plain 7x7, channels_last": (_plain, "native"),
    "plain 7x7, contiguous maps": (lambda channels: _Contiguous(_plain(channels)), "native"),
    "dcls 17x17, adaptconv, channels_last": (_spacing, ""),
    "dcls 17x17, adaptconv, contiguous maps": (lambda channels: _Contiguous(_spacing(channels)), ""),
    "dcls 17x17, constructed, torch, channels_last": (_spacing, "native"),
    "dcls 17x17, constructed, torch, contiguous maps": (lambda channels: _Contiguous(_spacing(channels)), "native"),
}  # by name: the spatial layer, and the backend it is pinned to


@contextmanager
def _dispatched(backend: str) -> Iterator[None]:
    """As the database says, or all by one backend."""
    if backend:
        with adaptconv.pinned(backend):
            yield
    else:
        yield


def _step(
    spatial: Callable[[int], nn.Module], backend: str, device: torch.device
) -> tuple[nn.Module, Tensor, Callable[[], object]]:  # fmt: skip
    torch.manual_seed(0)
    model = ConvNeXt(spatial, _WIDTHS, _DEPTHS).to(device).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = _SIZE[device.type]
    x = torch.randn(_BATCH[device.type], 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
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
    device: torch.device, deadline: float, steps: list[dict[str, Any]], *, write: Callable[[], None],
    skip: Mapping[tuple[str, ...], str], failed: Callable[..., None],
) -> None:  # fmt: skip
    """Tune the network's own layers, then time all variants in turn.

    Args:
        device: where.
        deadline: by ``time.monotonic``; what is not begun by then is left out.
        steps: of an earlier run; variants that ran are not repeated alone: all are timed together or none.
        write: called with the result.
        skip: variants that ended a process, and how.
        failed: called with a variant that raised.
    """
    if len(steps) == len(_WAYS) and not any(step["failed"] for step in steps):
        return
    steps.clear()
    calls: dict[str, Callable[[], object]] = {}
    reasons = {name: how for (name, *_), how in skip.items()}
    for place, (name, (spatial, backend)) in enumerate(_WAYS.items()):
        if name in reasons or monotonic() > deadline:
            continue
        begin("train", name)
        try:
            model, x, call = _step(spatial, backend, device)
            if not backend:
                share = _TUNING * max(0.0, deadline - monotonic()) / (len(_WAYS) - place)
                _tuned(model, x, share)
            call()
            calls[name] = call
        except Exception as failure:  # noqa: BLE001 - a variant that does not run is reported as that
            reasons[name] = told(failure)
            failed("train", name)
    begin("train", "all")
    left = max(2.0, deadline - monotonic())
    timings = interleave(calls, budget_s=left, device=device, min_rounds=3, max_rounds=30, warmup=1)
    batch, size = _BATCH[device.type], _SIZE[device.type]
    rate = {name: batch / timing.p20_us * 1e6 for name, timing in timings.items()}
    plain = max((r for name, r in rate.items() if name.startswith("plain")), default=float("nan"))
    for name in _WAYS:
        if name in timings:
            ms = timings[name].p20_us / 1e3
            steps.append(asdict(Step(name, batch, size, ms, rate[name], rate[name] / plain, measured_on=now())))
        else:
            reason = reasons.get(name, "no time was left")
            steps.append(asdict(Step(name, batch, size, failed=reason, measured_on=now())))
    write()


def _tuned(model: nn.Module, x: Tensor, seconds: float) -> None:
    """Tune the spatial layers: what remains is torch's in an eager step whatever a record says."""
    with torch.autocast(x.device.type, torch.bfloat16):
        found, _ = model_problems(model, (x,), {}, train=True)
    spatial = [problem for problem in found if problem.is_depthwise]
    adaptconv.tune(None, problems=spatial, budget_s=max(1.0, seconds), progress=False)


def table(steps: Sequence[dict[str, Any]]) -> str:
    """One line a variant."""
    lines = [
        (s["variant"], f"{s['step_ms']:.1f}", f"{s['images_s']:.0f}", f"{s['share']:.2f}", s["failed"]) for s in steps
    ]
    head = ("training step, ConvNeXt-T, bfloat16", "ms", "images/s", "of plain", "")
    return str(tabulate(lines, head, tablefmt="github", disable_numparse=True)) if steps else ""
