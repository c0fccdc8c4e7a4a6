"""Just enough of ``torch.cuda`` on a CPU to walk through what captures and times, by a clock that only work moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adaptconv import graphs, measure
from benchmarks.gpu import clock

CUDA = torch.device("cuda")


class Card:
    """What a stubbed device was asked to do.

    Attributes:
        capturing: the graph that is being captured.
        fails: whether what is captured breaks the capture.
        replays: of all graphs.
        waits: how often the device was made to wait.
        ended: pools whose allocation was ended by hand.
        recording: pools in which a capture has not been ended.
        captures: that were ended well.
        stream: the current one.
        now_us: the time.
    """

    def __init__(self) -> None:
        self.capturing: Any = None
        self.fails = False
        self.replays = 0
        self.waits = 0
        self.ended: list[Any] = []
        self.recording: list[Any] = []
        self.captures = 0
        self.pools = 0
        self.stream: Any = "default"
        self.now_us = 0.0

    def pool(self) -> tuple[int, int]:
        """What stands for ``torch.cuda.graph_pool_handle``."""
        self.pools += 1
        return 0, self.pools

    def graph(self) -> Any:
        """What stands for ``torch.cuda.CUDAGraph``."""
        card = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], object]] = []
                self.broken = False

            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert card.capturing is None and card.stream != "default"
                assert capture_error_mode == "thread_local"
                assert pool not in card.recording, "torch: already recording to this pool"
                card.recording.append(pool)
                card.capturing, self.pool = self, pool

            def capture_end(self) -> None:
                card.capturing = None
                if self.broken:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                card.recording.remove(self.pool)
                card.captures += 1

            def reset(self) -> None:
                self.calls.clear()

            def replay(self) -> None:
                card.replays += 1
                for call in self.calls:
                    call()

        return Graph

    def kernel(self, device_us: float, host_us: float) -> Callable[[], object]:
        """A call that takes so long on the device, and so long in Python to launch."""

        def work() -> None:
            self.now_us += device_us

        def call() -> None:
            self.now_us += host_us
            if self.capturing is None:
                work()
            elif self.fails:
                self.capturing.broken = True
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            else:
                self.capturing.calls.append(work)

        return call


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = made.now_us

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1e3

    @contextmanager
    def stream(which: Any) -> Iterator[None]:
        before, made.stream = made.stream, which
        try:
            yield
        finally:
            made.stream = before

    stubs: dict[str, Any] = {
        "CUDAGraph": made.graph(), "Stream": Stream, "Event": Event, "stream": stream,
        "device": lambda _: nullcontext(),
        "current_stream": Stream, "current_device": lambda: 0, "synchronize": lambda *_: None,
        "graph_pool_handle": made.pool, "memory_reserved": lambda _: 0, "empty_cache": lambda: None,
        "get_device_properties": lambda _: SimpleNamespace(total_memory=1 << 30),
        "is_current_stream_capturing": lambda: made.capturing is not None,
    }  # fmt: skip
    for name, stub in stubs.items():
        assert hasattr(torch.cuda, name), f"torch {torch.__version__} has no torch.cuda.{name}"
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: setattr(made, "waits", made.waits + 1), raising=False)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda device, pool: made.ended.append(pool), raising=False
    )
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *sizes, device=None: zeros(*sizes))
    monkeypatch.setattr(graphs, "_sides", {})
    monkeypatch.setattr(graphs, "_unended", [])
    monkeypatch.setattr(measure, "perf_counter_ns", lambda: int(made.now_us * 1e3))
    monkeypatch.setattr(clock, "monotonic", lambda: made.now_us / 1e6)
    return made
