"""What a way of computing a problem on a GPU takes at the very least: enough to leave the hopeless ones unrun.

A call that runs cannot be stopped, and where nothing is predicted for a device every backend's default is tried: one
dense window 73 wide, or a million slices taken in Python, would cost the time of all others.
"""

from __future__ import annotations

from dataclasses import replace

from adaptconv.backends import Choice
from adaptconv.backends.gather import slices
from adaptconv.backends.triton.hardware import card
from adaptconv.problem import Problem
from adaptconv.taps import TapPattern

_SLICE_US = 2.0  # of Python, for one view of a tensor


def least_us(problem: Problem, choice: Choice) -> float:
    """Microseconds that a choice cannot beat on the problem's GPU; 0 where nothing is known.

    Args:
        problem: on a GPU.
        choice: any backend's.
    """
    if choice.backend == "gather":
        return slices(problem, choice.config) * _SLICE_US
    if choice.backend == "dense" and problem.taps.footprint is None:
        filled = replace(problem, taps=TapPattern.grid(problem.taps.window))
        facts = card(problem.device)
        exact = problem.dtype == "float64" or (problem.dtype == "float32" and problem.fp32_precision == "ieee")
        vector = exact or problem.is_depthwise
        return filled.flops / (facts.vector_tflop_s if vector else facts.tensor_tflop_s) / 1e6
    return 0.0
