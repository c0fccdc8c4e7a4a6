"""Timing: several candidates measured side by side, so that a drifting machine is fair to all of them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

import torch

from adaptconv.graphs import Call, capture, give_back

Sampler = Callable[[Call, int], float]

_SAMPLE_US = 200.0  # shorter samples drown in clock granularity and in the cost of reading the clock
_MAX_INNER = 1 << 16
_HELD = 32  # calls in one captured graph at most
_GRAPH_US = 2000.0  # of eager calls in one captured graph
_AHEAD_CYCLES = 200_000  # of the device, about 0.1 ms: while it waits, the host gets ahead of it
_COPY_BYTES = {"cpu": 128 << 20}  # past any last-level cache we know of; the default below suits accelerators
_COPY_BYTES_DEFAULT = 1 << 30
_GEMM = {"cpu": 1024}  # rows of a square product that neither its launch nor its edges decide
_GEMM_DEFAULT = 8192


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one call takes, over all samples of a run.

    Attributes:
        p20_us: 20th percentile in microseconds: what a call costs when nothing disturbs it.
        median_us: the median in microseconds.
        p80_us: 80th percentile in microseconds; its distance from ``p20_us`` is the noise.
        min_us: the fastest sample in microseconds.
        rounds: how many samples were taken.
    """

    p20_us: float
    median_us: float
    p80_us: float
    min_us: float
    rounds: int

    @staticmethod
    def of(samples_us: Sequence[float]) -> Timing:
        """Summarise samples in microseconds.

        Raises:
            ValueError: there are no samples.
        """
        if not samples_us:
            raise ValueError("a timing needs at least one sample")
        ranked = sorted(samples_us)
        return Timing(
            _quantile(ranked, 0.2), _quantile(ranked, 0.5), _quantile(ranked, 0.8), ranked[0], len(ranked)
        )  # fmt: skip


def interleave(
    candidates: Mapping[str, Call],
    *,
    budget_s: float,
    device: torch.device,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warmup: int = 1,
    graphs: bool = False,
) -> dict[str, Timing]:
    """Time candidates in rounds, every one once a round: A B C, C B A, A B C, ...

    Whatever drifts (clock frequency, temperature, neighbours on the machine) then meets all of them
    alike, and turning the order around every other round cancels what a candidate leaves in the
    caches for the next. A call shorter than about 200 us is repeated inside its sample, so that the
    grain of the clock does not matter; the number of repeats is settled once for each candidate.

    Args:
        candidates: what to time, by name; results are discarded.
        budget_s: seconds of wall time after which no further round starts, warm-up included.
        device: where the candidates run: CUDA devices are timed by events, others by the clock.
        min_rounds: rounds to finish even when the budget is spent.
        max_rounds: rounds after which to stop even when budget is left.
        warmup: calls of each candidate before anything is timed.
        graphs: on CUDA, replay calls from captured graphs: the device's time, without what launching from Python
            costs. A candidate that cannot be captured is called as it is.

    Returns:
        A timing by candidate name, in the order of ``candidates``.

    Raises:
        ValueError: a negative budget or warm-up, no round to run, or more rounds demanded than allowed.
        Exception: whatever a candidate raises.
    """
    if budget_s < 0 or warmup < 0 or not 1 <= min_rounds <= max_rounds:
        raise ValueError(
            "interleave needs budget_s >= 0, warmup >= 0 and 1 <= min_rounds <= max_rounds, got "
            f"budget_s={budget_s}, warmup={warmup}, min_rounds={min_rounds}, max_rounds={max_rounds}"
        )
    if not candidates:
        return {}
    sample = _sampler(device)
    deadline_ns = perf_counter_ns() + int(budget_s * 1e9)
    with _no_collection():
        for call in candidates.values():
            for _ in range(warmup):
                call()
        replayed = graphs and device.type == "cuda"
        if replayed:
            give_back(device)
        runs = {name: _run_of(call, sample, device, replayed) for name, call in candidates.items()}
        samples: dict[str, list[float]] = {name: [] for name in candidates}
        order = list(candidates)
        for done in range(max_rounds):
            if done >= min_rounds and perf_counter_ns() >= deadline_ns:
                break
            for name in order if done % 2 == 0 else reversed(order):
                run = runs[name]
                samples[name].append(run.sample(run.call, run.times) / run.calls)
    return {name: Timing.of(taken) for name, taken in samples.items()}


def machine_limits(device: torch.device, budget_s: float = 1.0) -> dict[str, float]:
    """Measure what bounds any kernel here: memory traffic and arithmetic.

    Args:
        device: the device to load.
        budget_s: seconds to spend, about half on each measurement.

    Returns:
        ``copy_gb_s``: 10^9 bytes a second through memory in a large copy, bytes read and bytes
        written both counted; ``gemm_gflop_s``: 10^9 floating-point operations a second in a float32
        product of two square matrices, under the precision flags torch has now. Both come from
        the fastest sample: they are limits, not averages.
    """
    count = _COPY_BYTES.get(device.type, _COPY_BYTES_DEFAULT) // 4
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    # One after the other: a copy between two products would time the product with cold caches.
    copy = interleave(
        {"copy": lambda: target.copy_(source)}, budget_s=budget_s / 2, device=device, graphs=True
    )["copy"]  # fmt: skip
    return {
        "copy_gb_s": 2 * 4 * count / (copy.min_us * 1e3),
        "gemm_gflop_s": product_gflop_s(device, torch.float32, budget_s / 2),
    }


def product_gflop_s(device: torch.device, dtype: torch.dtype, budget_s: float = 0.5) -> float:
    """10^9 floating-point operations a second in a product of two square matrices of a dtype, at the fastest.

    1024 rows on a CPU; 8192 elsewhere, where a smaller product takes less time than its launch.
    """
    rows = _GEMM.get(device.type, _GEMM_DEFAULT)
    a = torch.rand(rows, rows, device=device).to(dtype)
    b = torch.rand(rows, rows, device=device).to(dtype)
    product = torch.empty_like(a)
    with torch.no_grad():
        call = {"gemm": lambda: torch.mm(a, b, out=product)}
        timing = interleave(call, budget_s=budget_s, device=device, graphs=True)["gemm"]
    return 2 * rows**3 / (timing.min_us * 1e3)


@dataclass(frozen=True, slots=True)
class _Run:
    """How a candidate is sampled.

    Attributes:
        call: what is called.
        times: how often for a sample.
        calls: of the candidate in a sample.
        sample: what measures it.
    """

    call: Call
    times: int
    calls: int
    sample: Sampler


def _run_of(call: Call, sample: Sampler, device: torch.device, replayed: bool) -> _Run:
    """A candidate as it is, or as replays of a graph where it can be captured.

    How often is settled by the time of what is sampled: of a short call the host's time says nothing about the graph's.
    """
    if not replayed:
        times = _repeats(call, sample)
        return _Run(call, times, times, sample)
    held = min(_HELD, max(1, math.ceil(_GRAPH_US / max(sample(call, 1), 1.0))))

    def several() -> None:
        for _ in range(held):
            call()

    replay = capture(several, device)
    if replay is None:
        return _run_of(call, sample, device, False)

    def sampled(replay: Call, times: int) -> float:
        return _event_sample(replay, times, device, ahead=True)

    times = _repeats(replay, sampled)
    return _Run(replay, times, times * held, sampled)


def _sampler(device: torch.device) -> Sampler:
    """What measures ``inner`` calls in a row, in microseconds for all of them."""
    if device.type == "cuda":
        return lambda call, inner: _event_sample(call, inner, device)
    return _clock_sample


def _clock_sample(call: Call, inner: int) -> float:
    start = perf_counter_ns()
    for _ in range(inner):
        call()
    return (perf_counter_ns() - start) / 1e3


def _event_sample(call: Call, inner: int, device: torch.device, *, ahead: bool = False) -> float:
    """By events of the device; ``ahead`` has the device wait first, so that it need not wait for the first launch."""
    with torch.cuda.device(device):  # events are recorded on the current stream of the current device
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        if ahead:
            torch.cuda._sleep(_AHEAD_CYCLES)
        start.record()
        for _ in range(inner):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3


def _repeats(call: Call, sample: Sampler) -> int:
    """How many calls fill a sample, growing until one does: a single short call cannot tell."""
    inner = 1
    while inner < _MAX_INNER:
        taken = sample(call, inner)
        if taken >= _SAMPLE_US:
            break
        wanted = math.ceil(inner * _SAMPLE_US / taken) if taken > 0 else 10 * inner
        # At least twice, or a sample just short of the mark would be taken again and again; at most
        # ten times, because the first of many short calls can be far slower than the rest.
        inner = min(max(wanted, 2 * inner), 10 * inner, _MAX_INNER)
    return inner


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's cycle collector from running inside one candidate's sample."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _quantile(ranked: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    place = fraction * (len(ranked) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (ranked[above] - ranked[below]) * (place - below)
