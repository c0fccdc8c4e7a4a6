"""Predicted times on a CPU: arithmetic and traffic over rates, with torch's routing rules.

Predictions rank candidates when nothing was measured; they are never shown as measurements. The CPU rates
are those of two AVX-512 cores and only their ratios matter. Source of the routing rules: oneDNN's
depthwise kernels (the fast direct ones want channels_last and no dilation, or at most 6 zeros of padding;
anything else runs a reference loop).
"""

from __future__ import annotations

from dataclasses import dataclass

from adaptconv.backends.base import Config
from adaptconv.problem import Device, Direction, Problem


@dataclass(frozen=True, slots=True)
class Rates:
    """What a processor does in a second.

    Attributes:
        gemm_gflops: large matrix product, GFLOP/s a thread.
        direct_gflops: a vectorised depthwise kernel, likewise.
        slow_gflops: the reference loop, likewise.
        copy_gbytes: copy bandwidth, GB/s read plus written.
        call_us: fixed cost of one torch call.
    """

    gemm_gflops: float
    direct_gflops: float
    slow_gflops: float
    copy_gbytes: float
    call_us: float


_CPU = Rates(gemm_gflops=90.0, direct_gflops=60.0, slow_gflops=3.5, copy_gbytes=40.0, call_us=8.0)
_JIT_PADDING = 6  # zeros on one side that the fast contiguous depthwise kernel tolerates


def _threads(device: Device) -> int:
    return max(device.threads, 1)


def traffic_us(device: Device, count_bytes: float) -> float:
    """Microseconds to move this many bytes."""
    return count_bytes / _CPU.copy_gbytes * 1e-3


def gemm_us(problem: Problem, flops: float) -> float:
    """Microseconds of a matrix product; thin ones (few channels a group) run at a fraction of the rate."""
    rate = _CPU.gemm_gflops * _threads(problem.device) * _width(problem)
    return flops / rate * 1e-3 + _CPU.call_us


def _width(problem: Problem) -> float:
    """How well a group's channels fill a matrix unit, 0 to 1."""
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    return min(1.0, ins / 16) ** 0.5 * min(1.0, outs / 16) if outs > 1 else 0.02


def grid_us(problem: Problem, config: Config) -> float:
    """Microseconds of one grid through torch's convolution under its knobs."""
    rate = _CPU
    threads = _threads(problem.device)
    asis = config["layout"] == "asis"
    channels_last = (problem.layout != "contiguous") == asis
    explicit = config["pad"] == "explicit"
    time = rate.call_us + traffic_us(problem.device, problem.bytes)
    if not asis:
        time += traffic_us(problem.device, 3 * problem.bytes)
    if explicit:
        time += traffic_us(problem.device, problem.bytes)
    if problem.groups == 1:
        return time + problem.flops / (rate.gemm_gflops * threads) * 1e-3
    gflops = rate.slow_gflops
    if _is_direct(problem, channels_last, explicit, str(config.get("route", "native"))):
        gflops = rate.direct_gflops
    return time + problem.flops / (gflops * threads) * 1e-3


def _is_direct(problem: Problem, channels_last: bool, explicit: bool, route: str) -> bool:
    """Whether torch's depthwise kernel for this call is a vectorised one."""
    grid = problem.taps.single_grid()
    if grid is None or not problem.is_depthwise:
        return False
    undilated = all(d == 1 for d in grid.dilation)
    narrow = explicit or all(max(pair) <= _JIT_PADDING for pair in problem.padding)
    if problem.direction is Direction.FORWARD or route == "adjoint":
        return (channels_last and undilated) or (narrow and problem.axes < 3)
    if route == "grouped":  # few taps, or several outputs a channel, and torch's loop over pixels is not vectorised
        return problem.c_out == problem.c_in and len(problem.taps) > 1 and not (channels_last and problem.axes == 3)
    if problem.direction is Direction.GRAD_INPUT:
        return undilated and problem.axes < 3
    return undilated and grid.size[-1] <= 3 and problem.axes == 2


def is_modelled(device: Device) -> bool:
    """Whether these predictions may choose for a device; on others they rank nothing."""
    return device.kind == "cpu"
