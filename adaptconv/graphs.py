"""CUDA graphs for timing: calls captured once and replayed, and torch left as it was where a capture fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], object]

_sides: dict[int, torch.cuda.Stream] = {}  # by device; blocks of memory belong to a stream, so there is one for all
_unended: list[torch.cuda.CUDAGraph] = []  # captures that did not end: the allocator may still point into them


def capture(call: Call, device: torch.device) -> Call | None:
    """What replays a call from a CUDA graph; None where it cannot be captured.

    Args:
        call: has run before on these operands, so that what is made once (compiled kernels, tables of taps, cuDNN's
            choice of algorithm) is made. What it reads must live as long as the replays.
        device: a CUDA device.

    Raises:
        Exception: whatever the call raises that is no RuntimeError.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.device(device):
        index = torch.cuda.current_device()
        side = _sides.setdefault(index, _sides.get(index) or torch.cuda.Stream())
        side.wait_stream(torch.cuda.current_stream())
        # Not torch.cuda.graph: where a capture fails it leaves its stream current, and the allocator in the capture.
        with torch.cuda.stream(side):
            try:
                call()  # the libraries' work space for a stream of its own
                torch.cuda.synchronize()
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            except RuntimeError:  # out of memory, say
                return None
            broken: Exception | None = None
            try:
                call()
            except Exception as failure:  # noqa: BLE001 - the capture is ended first, whatever it was
                broken = failure
            try:
                graph.capture_end()
            except RuntimeError as failure:  # it synchronised, or asked for what a capture does not allow
                broken = broken or failure
                _mend(graph, pool)
            else:
                if broken is not None:
                    graph.reset()
        torch.cuda.current_stream().wait_stream(side)
    if broken is None:
        return graph.replay
    if not isinstance(broken, RuntimeError):
        raise broken
    return None


def _mend(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """After a capture that could not be ended: torch then still believes in it, in its allocators and generators.

    The device's allocator is told; the rest is forgotten at the end of the next capture that succeeds.
    """
    _unended.append(graph)
    with contextlib.suppress(Exception):  # where the capture ended after all there is nothing to end
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        something, next_one = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
        next_one.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        something.add_(1)
        next_one.capture_end()


def give_back(device: torch.device) -> None:
    """Before captures: return what the allocator keeps of earlier graphs, if that is much. No capture can do it."""
    if 2 * torch.cuda.memory_reserved(device) > torch.cuda.get_device_properties(device).total_memory:
        torch.cuda.empty_cache()
