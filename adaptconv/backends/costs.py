"""Predicted times on a CPU: arithmetic and traffic over a device's rates, with torch's routing rules.

Predictions rank candidates when nothing was measured; they are never shown as measurements. Source of the
routing rules: oneDNN's depthwise kernels (the fast direct ones want channels_last and no dilation, or at most
6 zeros of padding; anything else runs a reference loop), and what torch itself keeps from oneDNN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from adaptconv import records
from adaptconv.backends import halves, onednn
from adaptconv.backends.base import Config
from adaptconv.problem import Device, Direction, Problem
from adaptconv.rates import DEFAULTS, Rates

_JIT_PADDING = 6  # zeros on one side that the fast contiguous depthwise kernel tolerates
_ASSUMED: ContextVar[Rates | None] = ContextVar("adaptconv_assumed_rates", default=None)
_assumed = _ASSUMED.get
_known: dict[Device, tuple[int, Rates]] = {}  # by device, with the epoch of the database they were read in
_last: tuple[Device | None, int, Rates] = (None, -1, DEFAULTS)


def rates(device: Device) -> Rates:
    """The constants of a device: its calibration if the database holds a current one, else the defaults.

    Read when first asked for, and again when a store of this process was written or replaced, as dispatch does
    with its plans: the same database and problem give the same prediction. What cannot be used is warned of once
    by the database, and the defaults hold.
    """
    global _last
    assumed = _assumed()
    if assumed is not None:
        return assumed
    epoch = records.epoch()
    last = _last  # one read: other threads replace it whole
    if last[0] is device and last[1] == epoch:
        return last[2]
    known = _known.get(device)
    if known is None or known[0] != epoch:
        found = records.default_store().calibration(device) if is_modelled(device) else None
        known = _known[device] = (epoch, DEFAULTS if found is None else found.calibration.rates)
    _last = (device, *known)
    return known[1]


@contextmanager
def assuming(constants: Rates) -> Iterator[None]:
    """Predict with these constants instead of the device's, in the calls of ``cost`` made inside."""
    token = _ASSUMED.set(constants)
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def _threads(device: Device) -> int:
    return max(device.threads, 1)


def traffic_us(device: Device, count_bytes: float) -> float:
    """Microseconds to move this many bytes in order."""
    return count_bytes / rates(device).copy_gbytes * 1e-3


def relayout_us(device: Device, count_bytes: float) -> float:
    """Microseconds to move this many bytes from one memory format into another."""
    return count_bytes / rates(device).relayout_gbytes * 1e-3


def in_float32_us(cost: Callable[[Problem, Config], float], problem: Problem, config: Config) -> float:
    """Microseconds of a half-precision problem computed in float32, the conversions included."""
    return cost(*halves.widened(problem, config)) + traffic_us(problem.device, halves.converted_bytes(problem))


def columns_us(problem: Problem, flops: float, count_bytes: float) -> float:
    """Microseconds of gathered columns, so many bytes written and read, and of their matrix product.

    Thin products (few channels a group) run at a fraction of the full rate.
    """
    rate = rates(problem.device)
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    gflops = rate.matvec_gflops
    if outs > 1:
        gflops = rate.product_gflops * min(1.0, ins / 16) ** 0.5 * min(1.0, outs / 16)
    if halves.is_half(problem) and not halves.has_kernels(problem.dtype):
        gflops = min(gflops, rate.slow_gflops)
    product = flops / (gflops * _threads(problem.device)) * 1e-3
    return product + rate.gather_call_us + count_bytes / rate.columns_gbytes * 1e-3


def grid_us(problem: Problem, config: Config, call_us: float | None = None) -> float:
    """Microseconds of one grid through torch's convolution under its knobs; ``call_us`` is its fixed cost."""
    if halves.is_wide(config):
        return in_float32_us(lambda wide, knobs: grid_us(wide, knobs, call_us), problem, config)
    rate = rates(problem.device)
    threads = _threads(problem.device)
    asis = config["layout"] == "asis"
    channels_last = (problem.layout != "contiguous") == asis
    explicit = config["pad"] == "explicit"
    size = problem.bytes
    time = (rate.call_us if call_us is None else call_us) + size / rate.copy_gbytes * 1e-3
    if not asis:
        time += 3 * size / rate.relayout_gbytes * 1e-3
    if explicit:
        time += size / rate.copy_gbytes * 1e-3
    route = str(config.get("route", "native"))
    if not problem.is_depthwise:
        gflops = rate.gemm_gflops * _product_share(problem, channels_last, explicit, route)
    elif not _is_direct(problem, channels_last, explicit, route):
        gflops = rate.slow_gflops
    else:
        gflops = rate.direct_gflops
        if explicit and problem.direction is Direction.FORWARD:
            gflops *= _PADDED
        planar = problem.axes == 2 and not channels_last and not explicit
        if planar and (problem.direction is Direction.FORWARD or route == "adjoint"):
            gflops /= _inside(problem)  # padding is left out
        if problem.direction is Direction.GRAD_INPUT and route == "native":
            gflops *= _BACKWARD
        if route == "grouped" and _is_dilated(problem):  # it becomes a stride
            gflops *= _STRIDED
        if problem.axes == 1:  # torch moves one axis into the kernel's blocks of channels and back
            time += 3 * size / rate.relayout_gbytes * 1e-3
    loops = halves.share_of_loops(problem, route)
    if loops is not None:
        gflops = min(gflops, rate.slow_gflops * loops)
    return time + problem.flops / (gflops * threads) * 1e-3


_BACKWARD = 0.6  # of the rate of a forward: the vectorised gradient of the input
_PADDED = 0.94  # likewise: zeros that were copied around the input are multiplied as well
_STRIDED = 0.5  # likewise: a forward with a stride
_UNFOLDED = 0.45  # of the rate of a product: small volumes without oneDNN, and contiguous dilated ones for the weight
_FULL = 16  # channels a group that fill a product


def _product_share(problem: Problem, channels_last: bool, explicit: bool, route: str) -> float:
    """What share of a matrix product's rate a convolution over several channels a group reaches."""
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    thinnest = min(ins, outs) if problem.direction is Direction.GRAD_INPUT else min(ins * len(problem.taps), outs)
    share = min(1.0, thinnest / _FULL)
    if route != "onednn" and onednn.keeps_volume(problem, padded=explicit):
        return share * _UNFOLDED
    if not _is_dilated(problem):
        return share
    if problem.direction is Direction.GRAD_WEIGHT:
        return share * _UNFOLDED if not channels_last and _is_volume(problem) else share
    if not explicit and (channels_last or problem.axes == 3):
        share /= _inside(problem)  # rows and columns of padding are left out
    return share


def _is_volume(problem: Problem) -> bool:
    """Whether taps lie apart along all three axes."""
    grid = problem.taps.single_grid()
    return grid is not None and len(grid.size) == 3 and min(grid.size) > 1


def _is_dilated(problem: Problem) -> bool:
    grid = problem.taps.single_grid()
    return grid is not None and any(d > 1 for d in grid.dilation)


@lru_cache(maxsize=4096)
def _inside(problem: Problem) -> float:
    """Share of the products whose input lies inside, by rows in full and by columns in part."""
    shares = []
    grid = problem.taps.single_grid()
    assert grid is not None
    for axis in range(problem.axes):
        before, extent, count = problem.padding[axis][0], problem.spatial[axis], problem.out_spatial[axis]
        pace, met = problem.stride[axis], 0
        for tap in range(grid.size[axis]):
            start = grid.origin[axis] + tap * grid.dilation[axis] - before
            first, end = max(-(start // pace), 0), min(-((start - extent) // pace), count)
            met += max(end - first, 0)  # outputs that this tap meets inside
        shares.append(met / max(count * grid.size[axis], 1))
    return float(shares[0] * shares[-1] ** 0.5) or 1.0


def _is_direct(problem: Problem, channels_last: bool, explicit: bool, route: str) -> bool:
    """Whether torch's depthwise kernel for this call is a vectorised one."""
    grid = problem.taps.single_grid()
    if grid is None or not problem.is_depthwise:
        return False
    undilated = all(d == 1 for d in grid.dilation)
    narrow = explicit or all(max(pair) <= _JIT_PADDING for pair in problem.padding)
    if problem.direction is Direction.FORWARD or route == "adjoint":
        return (channels_last and undilated) or (narrow and problem.axes == 2)
    if route == "grouped":  # few taps, or several outputs a channel, and torch's loop over pixels is not vectorised
        return problem.c_out == problem.c_in and len(problem.taps) > 1 and problem.axes < 3
    if problem.direction is Direction.GRAD_INPUT:
        return undilated and problem.axes < 3
    return undilated and grid.size[-1] <= 3 and problem.axes == 2


def is_modelled(device: Device) -> bool:
    """Whether these predictions may choose for a device; on others they rank nothing."""
    return device.kind == "cpu"
