"""One layer in one direction: every variant checked, then timed, all of them interleaved."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptconv import measure
from adaptconv.problem import Direction
from benchmarks.facts import now
from benchmarks.layers.tensors import Truth, tensors_of
from benchmarks.layers.variants import OURS, TORCH, Variant, variants_of
from benchmarks.limits import limit_ms
from benchmarks.suites import Layer

SUSPICIOUS = 0.97  # a ratio under this is timed again before it is believed
_FAR = 6.0  # times the fastest of its side: a variant's first calls say enough
_CALLS, _CALLS_MS = 4, 600.0  # first calls, and milliseconds after which there are no more of them
_FAR_MS = 5.0  # below this a call is cheap enough to be timed properly
_DUEL = 0.5  # of the seconds, for the fastest of each side once more
_IN_REACH = 1.5  # of the fastest of its side: timed again where the ratio is under 1
_WRONG = 4.0  # times torch's own error
_FLOORS = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}


@dataclass(slots=True)
class Row:
    """One layer in one direction; times are 20th percentiles in milliseconds.

    Attributes:
        layer, dtype, direction, kind: which; kind is "depthwise", "control" or "other".
        times_ms: variant -> time. "dcls" computes something else and enters no ratio.
        duel_ms: the two fastest, timed once more against each other alone.
        rounds: variant -> samples behind its time; 0 where its first calls said that it is far too slow.
        first_call_s: compiled variant -> seconds of its first call, compilation included.
        errors: variant -> relative L2 error against float64.
        failed: variant -> why it did not run.
        plans: layout -> the plan of "dispatch" and where it came from.
        limit_ms: what the machine needs at least, see ``benchmarks.limits``.
        best_rival, best_ours: the fastest variant of each side.
        ratio: torch's fastest over our fastest, in the duel.
        native_ratio: torch's fastest eager call over our fastest eager one.
        over_limit: our fastest over the limit, likewise.
        error, native_error: the largest of ours, and of torch's eager calls.
        wrong: our variants that failed or whose error is too large.
        settings: rivals, seconds and what else a rerun must share to take the row over.
        seconds, load_average, measured_on: of the row.
    """

    layer: str
    dtype: str
    direction: str
    kind: str
    times_ms: dict[str, float] = field(default_factory=dict)
    duel_ms: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    first_call_s: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    plans: dict[str, str] = field(default_factory=dict)
    limit_ms: float = 0.0
    best_rival: str = ""
    best_ours: str = ""
    ratio: float = 0.0
    native_ratio: float = 0.0
    over_limit: float = 0.0
    error: float = 0.0
    native_error: float = 0.0
    wrong: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    load_average: float = 0.0
    measured_on: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """Layer, dtype and direction: what a row is of."""
        return self.layer, self.dtype, self.direction

    def as_json(self) -> dict[str, Any]:
        """The row as a results file holds it."""
        return asdict(self)

    def fastest(self, kinds: Iterable[str]) -> str:
        """The fastest variant of these kinds; empty if none was timed."""
        wanted = set(kinds)
        return min((v for v in self.times_ms if _kind(v) in wanted), key=lambda v: self.times_ms[v], default="")

    def settle(self) -> None:
        """Work out ratios, errors and what is wrong from times and errors."""
        times, ours = self.times_ms, self.fastest(OURS)
        self.best_rival, self.best_ours = self.fastest(TORCH), ours
        if not self.best_rival or not ours:
            raise RuntimeError(f"{self.layer} {self.direction}: nothing to compare: {self.failed}")
        self.ratio = times[self.best_rival] / times[ours]
        eager, dispatched = self.fastest(("eager",)), self.fastest(("dispatch",))
        self.native_ratio = times[eager] / times[dispatched] if eager and dispatched else float("nan")
        self.over_limit = times[ours] / self.limit_ms
        self.error = max(self.errors[v] for v in self.errors if _kind(v) in OURS)
        self.native_error = max((self.errors[v] for v in self.errors if _kind(v) == "eager"), default=0.0)
        bound = max(_WRONG * self.native_error, _FLOORS.get(self.dtype, 1e-6))
        self.wrong = [f"{v} did not run: {self.failed[v]}" for v in self.failed if _kind(v) in OURS]
        self.wrong += [
            f"{v}: error {error:.1e}, {bound:.1e} allowed"
            for v, error in self.errors.items() if _kind(v) in OURS and not error <= bound
        ]  # fmt: skip


def _kind(name: str) -> str:
    return next((k for k in ("optimized freezing", *OURS, *TORCH) if name.startswith(f"{k} ")), "dcls")


def measured(
    layer: Layer, direction: Direction, device: torch.device, limits: Mapping[str, float], *,
    level: str = "all", seconds: float = 1.5, settings: Mapping[str, Any] | None = None,
) -> Row:  # fmt: skip
    """Check and time every variant of a layer in one direction.

    Args:
        layer: which.
        direction: which.
        device: where to run.
        limits: ``benchmarks.limits.rates`` in the layer's dtype.
        level: which rivals, see ``variants_of``.
        seconds: of timing, all variants together; half of that again for the fastest of each side, and four times where
            the ratio is under 0.97.
        settings: put into the row as they are.

    Raises:
        RuntimeError: no variant of one of the sides ran.
    """
    began = time.monotonic()
    problem = layer.problem(direction, "contiguous", device)
    row = Row(layer.name, layer.dtype, str(direction), layer.kind, settings=dict(settings or {}))
    row.limit_ms = limit_ms(problem, limits, layer.holes)
    with torch.no_grad():
        truth = Truth(problem, tensors_of(layer, "contiguous", device))
        variants = {v.name: v for v in variants_of(layer, direction, device, level) if _ran(v, row, truth, device)}
        _time(row, _worth_timing(row, variants), device, seconds)
        row.settle()
        _duel(row, variants, device, _DUEL * seconds)
        if row.ratio < SUSPICIOUS:
            near = {v for v in variants if row.rounds[v] and row.times_ms[v] <= _IN_REACH * row.times_ms[_best(row, v)]}
            _time(row, {v: variants[v] for v in variants if v in near}, device, 2 * seconds)
            row.settle()
            _duel(row, variants, device, 2 * seconds)
    row.seconds, row.load_average = round(time.monotonic() - began, 1), round(os.getloadavg()[0], 2)
    row.measured_on = now()
    variants.clear()
    torch._dynamo.reset()
    gc.collect()
    return row


def _duel(row: Row, variants: Mapping[str, Variant], device: torch.device, seconds: float) -> None:
    """Time the fastest of each side once more, alone, and take the ratio from that.

    The least of several noisy times is less than any of them deserves, and torch's side has more variants to take it
    from: with one call behind all of them that alone would read as a loss of some per cent.
    """
    pair = {name: variants[name] for name in (row.best_rival, row.best_ours)}
    timings = measure.interleave({v: variant.call for v, variant in pair.items()}, budget_s=seconds, device=device)
    row.duel_ms = {name: timing.p20_us / 1e3 for name, timing in timings.items()}
    row.ratio = row.duel_ms[row.best_rival] / row.duel_ms[row.best_ours]
    row.over_limit = row.duel_ms[row.best_ours] / row.limit_ms


def _ran(variant: Variant, row: Row, truth: Truth, device: torch.device) -> bool:
    """Call a variant for the first times: its error, and a first idea of its time."""
    name = variant.name
    if variant.plan:
        row.plans[variant.layout] = variant.plan
    try:
        start = time.perf_counter()
        result = variant.first()
        if variant.compiles:
            row.first_call_s[name] = round(time.perf_counter() - start, 2)
        if variant.kind != "dcls":
            row.errors[name] = truth.error(result)
        row.times_ms[name], row.rounds[name] = _first_ms(variant, device), 0
    except Exception as failure:  # noqa: BLE001 - one variant's failure leaves the others their results
        text = (str(failure).strip().splitlines() or [""])[0]
        row.failed[name] = f"{type(failure).__name__}: {text[:200]}"
        row.errors.pop(name, None)
        return False
    return True


def _first_ms(variant: Variant, device: torch.device) -> float:
    """The least of a few calls: a single one may be slow for reasons that are none of its own."""
    least, spent = float("inf"), 0.0
    for _ in range(_CALLS):
        start = time.perf_counter()
        result: Tensor = variant.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del result
        taken = (time.perf_counter() - start) * 1e3
        least, spent = min(least, taken), spent + taken
        if spent > _CALLS_MS:
            break
    return least


def _best(row: Row, name: str) -> str:
    """The fastest variant of a variant's side."""
    return row.fastest(OURS if _kind(name) in OURS else TORCH) or name


def _worth_timing(row: Row, variants: Mapping[str, Variant]) -> dict[str, Variant]:
    """The variants that are not far slower than the fastest of their side."""
    times = row.times_ms
    return {v: variant for v, variant in variants.items() if times[v] <= max(_FAR_MS, _FAR * times[_best(row, v)])}


def _time(row: Row, variants: Mapping[str, Variant], device: torch.device, seconds: float) -> None:
    timings = measure.interleave({v: variant.call for v, variant in variants.items()}, budget_s=seconds, device=device)
    row.times_ms |= {name: timing.p20_us / 1e3 for name, timing in timings.items()}
    row.rounds |= {name: timing.rounds for name, timing in timings.items()}
