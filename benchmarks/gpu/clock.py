"""Device time of a call with cold caches: replays of a captured graph, what empties the caches taken off.

A call of tens of microseconds drowns in the cost of launching it from Python, so calls are captured in a CUDA graph.
Between two of them the graph reads a buffer several times the size of the second-level cache: in a network a layer
finds its input there only in part, in a loop over one buffer always. The same graph without the calls is timed beside
them, and its time taken off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from adaptconv.measure import Call, capture, interleave

_FLUSH_BYTES = 256 << 20
_GRAPH_US = 2000.0  # of calls in a graph, so that its launch does not count
_MOST = 32


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Microseconds of one call on the device.

    Attributes:
        cold_us: caches emptied before each call.
        warm_us: calls one after the other.
    """

    cold_us: float
    warm_us: float


def device_us(calls: Mapping[str, Call], device: torch.device, budget_s: float) -> dict[str, DeviceTime]:
    """Time calls on a device, interleaved. On a CPU there are no graphs: both figures are those of the clock.

    Args:
        calls: by name; each has run before. One that cannot be captured is left out.
        device: where they run.
        budget_s: seconds for all of them.
    """
    if device.type != "cuda":
        timings = interleave(calls, budget_s=budget_s, device=device)
        return {name: DeviceTime(timing.p20_us, timing.p20_us) for name, timing in timings.items()}
    rough = interleave(calls, budget_s=0.0, device=device, min_rounds=2, max_rounds=2)
    buffer = torch.ones(_FLUSH_BYTES // 4, device=device)
    replays: dict[str, Call] = {}
    counts: dict[str, int] = {}
    for name, call in calls.items():
        counts[name] = count = int(min(max(_GRAPH_US / max(rough[name].min_us, 1.0), 2), _MOST))
        cold, warm = capture(_several(call, count, buffer), device), capture(_several(call, count, None), device)
        if cold is not None and warm is not None:
            replays |= {f"cold {name}": cold, f"warm {name}": warm}
    for count in {counts[name] for name in calls if f"cold {name}" in replays}:
        emptied = capture(_several(None, count, buffer), device)
        assert emptied is not None, "reading a buffer can be captured"
        replays[f"emptied {count}"] = emptied
    timings = interleave(replays, budget_s=budget_s, device=device)
    found = {}
    for name in calls:
        if f"cold {name}" in replays:
            count = counts[name]
            alone = timings[f"cold {name}"].p20_us - timings[f"emptied {count}"].p20_us
            found[name] = DeviceTime(max(alone, 0.1) / count, timings[f"warm {name}"].p20_us / count)
    return found


def _several(call: Call | None, count: int, buffer: torch.Tensor | None) -> Call:
    """A call so many times, the caches emptied before each if there is a buffer to read."""

    def run() -> None:
        for _ in range(count):
            if buffer is not None:
                buffer.amax()
            if call is not None:
                call()

    return run
