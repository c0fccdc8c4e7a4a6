"""Device time of a call with cold caches: a captured graph of calls, each on a copy of the operands of its own.

A call of tens of microseconds drowns in the cost of launching it from Python, so calls are captured in a CUDA graph.
In a network a layer finds its input in the second-level cache only in part, in a loop over one buffer always. So each
call of the graph has operands of its own, and before the graph is replayed, outside of what is timed, a buffer several
times the size of the cache is read. Nothing is taken off what was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from adaptconv.graphs import Call, capture, give_back
from adaptconv.measure import Timing, interleave

_FLUSH_BYTES = 256 << 20
_GRAPH_US = 1500.0  # of calls in a graph
_MOST = 32
_COPIES_BYTES = 2 << 30  # of one candidate's operands
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 60


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Microseconds of one call on the device.

    Attributes:
        cold_us: caches emptied before.
        warm_us: calls one after the other on the same operands.
    """

    cold_us: float
    warm_us: float


def device_us(
    calls: Mapping[str, Call], device: torch.device, budget_s: float, far: float = 20.0
) -> dict[str, DeviceTime]:
    """Time calls on a device, interleaved. On a CPU there are no graphs: both figures are those of the clock.

    Args:
        calls: by name; each has run before: a ``functools.partial`` of its operands, or what knows them itself and then
            is warm in both figures. One that cannot be captured is told by eager calls.
        device: where they run.
        budget_s: seconds for all of them.
        far: times the fastest, beyond which a call is told by two samples.
    """
    if device.type != "cuda":
        timings = interleave(calls, budget_s=budget_s, device=device)
        return {name: DeviceTime(timing.p20_us, timing.p20_us) for name, timing in timings.items()}
    rough = interleave(calls, budget_s=0.0, device=device, min_rounds=2, max_rounds=2)
    least = min(timing.min_us for timing in rough.values())
    buffer = torch.ones(_FLUSH_BYTES // 4, device=device)
    give_back(device)
    found: dict[str, DeviceTime] = {}
    graphs: dict[str, tuple[Call, int]] = {}
    held: dict[str, list[Call]] = {}  # the operands that the graphs read
    for name, call in calls.items():
        if rough[name].min_us > far * least and rough[name].min_us > _GRAPH_US:
            found[name] = DeviceTime(rough[name].min_us, rough[name].min_us)
            continue
        count = int(min(max(_GRAPH_US / max(rough[name].min_us, 1.0), 2), _MOST))
        held[name] = _copies(call, count)
        cold, warm = capture(_in_turn(held[name]), device), capture(_in_turn([call] * count), device)
        if cold is None or warm is None:
            found[name] = DeviceTime(rough[name].min_us, rough[name].min_us)
        else:
            graphs |= {f"cold {name}": (cold, count), f"warm {name}": (warm, count)}
    samples = _sampled(graphs, buffer, budget_s)
    for name in calls:
        if f"cold {name}" in samples:
            found[name] = DeviceTime(samples[f"cold {name}"].p20_us, samples[f"warm {name}"].p20_us)
    return found


def _sampled(graphs: Mapping[str, tuple[Call, int]], buffer: Tensor, budget_s: float) -> dict[str, Timing]:
    """Replay the graphs in rounds, every other round in reverse; before a cold one the caches are emptied.

    Emptying them keeps the device busy for as long as the host needs to launch the graph.
    """
    taken: dict[str, list[float]] = {name: [] for name in graphs}
    end = monotonic() + budget_s
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and monotonic() > end:
            break
        for name in list(graphs) if done % 2 == 0 else reversed(list(graphs)):
            replay, count = graphs[name]
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if name.startswith("warm"):
                replay()
            buffer.amax() if name.startswith("cold") else torch.cuda._sleep(100_000)
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            taken[name].append(float(start.elapsed_time(stop)) * 1e3 / count)
    return {name: Timing.of(times) for name, times in taken.items()}


def _copies(call: Call, count: int) -> list[Call]:
    """A call on so many copies of its operands, fewer where they are large; itself where its operands are not known."""
    if not isinstance(call, functools.partial):
        return [call] * count
    arguments: tuple[Any, ...] = call.args
    held = sum(t.numel() * t.element_size() for t in arguments if isinstance(t, Tensor))
    kept = max(2, min(count, _COPIES_BYTES // max(held, 1)))
    made: list[Call] = [
        functools.partial(call.func, *(t.detach().clone() if isinstance(t, Tensor) else t for t in arguments))
        for _ in range(kept)
    ]
    return [made[i % kept] for i in range(count)]


def _in_turn(calls: list[Call]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run
