"""Triton's interpreter made exact for bfloat16: as it ships, it multiplies bit patterns and truncates."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


def _widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrowed(values: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, rounded to nearest even; NaN stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


@cache
def make_exact() -> None:
    """Give the interpreter's builder bfloat16 that is widened to compute and rounded to store. Once a process.

    It holds bfloat16 as raw 16-bit integers. Casts, products and arithmetic are mended; loads and stores move bits
    and are right as they are.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    handle: Any = interpreter.TensorHandle
    cast, dot, binary, rounded = (
        builder.cast_impl, builder.create_dot, builder.binary_op, builder.create_fp_to_fp
    )  # fmt: skip
    half = tl.bfloat16

    def is_half(tensor: Any) -> bool:
        return bool(tensor.dtype.scalar == half)

    def wide(tensor: Any) -> Any:
        return handle(_widened(tensor.data), tl.float32) if is_half(tensor) else tensor

    def cast_exactly(self: Any, source: Any, target: Any) -> Any:
        to = target.scalar
        if is_half(source) and to != half:
            return wide(source) if to == tl.float32 else cast(self, wide(source), target)
        if to == half and not is_half(source):
            return handle(_narrowed(source.data.astype(np.float32)), half)
        return cast(self, source, target)

    def round_exactly(self: Any, source: Any, target: Any, mode: Any) -> Any:
        to_zero = mode == interpreter._ir.ROUNDING_MODE.RTZ
        if not to_zero and (is_half(source) or target.scalar == half):
            return cast_exactly(self, source, target)
        return rounded(self, source, target, mode)

    def dot_exactly(self: Any, left: Any, right: Any, *rest: Any) -> Any:
        return dot(self, wide(left), wide(right), *rest)

    def compute_exactly(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if not is_half(left):
            return binary(self, left, right, operation)
        result = operation(_widened(left.data), _widened(right.data))
        return handle(result, tl.int1) if result.dtype == bool else handle(_narrowed(result), half)

    builder.cast_impl, builder.create_dot = cast_exactly, dot_exactly
    builder.binary_op, builder.create_fp_to_fp = compute_exactly, round_exactly
    builder.get_bf16 = lambda self, value: handle(_narrowed(np.array([value], np.float32)), half)
