"""What no kernel on this machine can beat: bytes over the copy bandwidth, arithmetic over the rate of a product."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from adaptconv.measure import machine_limits, product_gflop_s
from adaptconv.problem import Direction, Problem


def rates(device: torch.device, dtype: str = "float32", budget_s: float = 1.0) -> dict[str, float]:
    """Measure the two rates that bound a convolution of this dtype here.

    Args:
        device: the device to load.
        dtype: "float32", "bfloat16", ...: of the matrix product. Copies move bytes, whatever they mean.
        budget_s: seconds to spend.

    Returns:
        ``copy_gb_s``, 10^9 bytes a second, read and written both counted; ``gemm_gflop_s``, 10^9 floating-point
        operations a second in a product of two square matrices of this dtype. Both of the fastest sample.
    """
    found = machine_limits(device, budget_s)
    if dtype != "float32":
        found["gemm_gflop_s"] = product_gflop_s(device, getattr(torch, dtype), budget_s / 2)
    return found


def limit_ms(problem: Problem, limits: Mapping[str, float], holes: int = 0) -> float:
    """Milliseconds that a problem must take: the larger of its traffic's time and its arithmetic's.

    Args:
        problem: which; its dtype says how many bytes a value has.
        limits: what ``rates`` measured in the problem's dtype.
        holes: weights of each channel's window that are not zero, 0 where all may be: the others need no arithmetic,
            except in the gradient of the weight, which has them all to fill.
    """
    return max(problem.bytes / limits["copy_gb_s"], needed_flops(problem, holes) / limits["gemm_gflop_s"]) / 1e6


def needed_flops(problem: Problem, holes: int = 0) -> float:
    """Floating-point operations of the multiply-adds that read inside the input, 2 each.

    A tap that lands on padding adds nothing. Taps with a footprint count one multiply-add each, all in bounds.
    """
    share = 1.0
    if holes and problem.direction is not Direction.GRAD_WEIGHT:
        share = min(1.0, holes / len(problem.taps))
    if problem.taps.footprint is not None:
        return problem.flops * share
    inside = [
        [_reads(place, extent, before, stride, out) for place in range(window)]
        for window, extent, (before, _), stride, out in zip(
            problem.taps.window, problem.spatial, problem.padding, problem.stride, problem.out_spatial, strict=True
        )
    ]
    reads = sum(math.prod(inside[axis][p] for axis, p in enumerate(offset)) for offset in problem.taps.offsets)
    return 2.0 * problem.batch * problem.c_out * (problem.c_in // problem.groups) * reads * share


def _reads(place: int, extent: int, before: int, stride: int, out: int) -> int:
    """Output positions along one axis at which a tap at ``place`` reads the input and no padding."""
    least = max(0, -((place - before) // stride))  # the first o with o * stride + place >= before
    most = min(out - 1, (extent - 1 + before - place) // stride)
    return max(0, most - least + 1)
