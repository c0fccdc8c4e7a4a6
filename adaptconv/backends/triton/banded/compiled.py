"""What the banded kernels are compiled for where there is no GPU."""

from __future__ import annotations

from typing import Any

from adaptconv.backends.triton.banded import kernels, pass_kernels
from adaptconv.backends.triton.banded.tiling import CORRELATED, STEP_BYTES, UNIT_BYTES
from adaptconv.backends.triton.banded.upright_kernels import multiply_upright
from adaptconv.backends.triton.builds import Build

_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_TENSORS = {"x", "w", "y", "dy", "dw", "bias", "table", "out"}
_INTEGERS = {"places"}
_SUMS = {"partial"}


def builds(family: str) -> list[Build]:
    """Usual and extreme configurations of every kernel on a family of GPUs."""
    hopper = family == "sm90"
    stages, warps = 2 if family == "gfx942" else 3, 4 if hopper else 8
    made = [
        _forward("usual", 128, 8, 16, warps, stages),
        _forward("images of 64", 64, 8, 16, warps, stages),
        _forward("small map", 64, 16 if hopper else 8, 16, 8, stages, part=2, y_unit=4, full=True),
        _forward("odd width", 64, 8, 16, 8, stages, y_unit=1),
        _forward("line", 128, 1, 64, warps, stages, bias=True),
        _forward("dilated", 128, 4, 16, warps, stages, phased=True),
        _forward("volume", 128 if hopper else 64, 8, 16, 8, stages, deep=True),
        _forward("float32", 128, 4, 16, warps, stages, dtype="fp32"),
        _upright("usual", 128, 64, warps, stages),
        _upright("one parity", 128, 64, warps, stages, odd=False),
        _upright("any height", 128, 64, 8, stages, whole=False),
        _gradient("usual", 8, 16, 2, 64, 8, stages),
        _gradient("whole rows", 2, 64, 2, 64, 8, stages),
        _gradient("small map", 4, 16, 8, 16, 4, stages, turns=2),
        _gradient("line", 1, 64, 1, 128, 4, stages),
        _gradient("dilated", 4, 16, 4, 32, 4, stages, phased=True),
        _gradient("volume", 4, 16, 4, 32, 4, stages, deep=True),
        _gradient("float32", 4, 16, 4, 16, 4, stages, dtype="fp32"),
        _build("rows", pass_kernels.lay_rows, {"BY": 64, "BX": 64}, 4, stages),
        _build("exchanged rows", pass_kernels.lay_rows, {"BY": 64, "BX": 64, "stride_y": 1}, 4, stages),
        _build("bands", pass_kernels.lay_bands, {"GRAIN": 4, "BLOCK": 1024}, 4, stages),
        _build("collect", pass_kernels.collect, {"BH": 4, "BLOCK": 64}, 4, stages),
    ]
    if family != "gfx942":  # whose shared memory holds no more
        made += [_forward("deepest", 128, 8, 16, warps, 4), _gradient("widest", 4, 16, 4, 64, 8, stages)]
    if hopper:
        made += [_forward("widest", 128, 16, 16, 8, stages), _forward("tallest", 256, 8, 16, 8, stages)]
        made += [_upright("widest", 256, 64, 8, stages)]
        made += [_forward("widest small map", 128, 8, 16, 8, stages, part=2, y_unit=4, full=True)]
    return made


def _forward(
    label: str, pairs: int, high: int, wide: int, warps: int, stages: int, *, dtype: str = "bf16", part: int = 0,
    y_unit: int = 0, full: bool = False, deep: bool = False, phased: bool = False,
    bias: bool = False,
) -> Build:  # fmt: skip
    unit = UNIT_BYTES // _BYTES[dtype]
    constants: dict[str, Any] = {
        "UNIT": unit, "PART": part or unit, "BM": pairs, "BN": high * wide, "BW": wide,
        "BK": STEP_BYTES // _BYTES[dtype], "Y_UNIT": y_unit or unit, "FULL": full, "DEEP": deep, "PHASED": phased,
        "HAS_BIAS": bias, "PRECISION": "tf32" if dtype == "fp32" else "ieee",
    }  # fmt: skip
    if not bias:
        constants["bias"] = None
    return _build(f"forward {label}", kernels.multiply, constants, warps, stages, dtype)


def _upright(
    label: str, positions: int, high: int, warps: int, stages: int, *, odd: bool = True, whole: bool = True
) -> Build:
    constants: dict[str, Any] = {
        "UNIT": UNIT_BYTES // 2, "BI": high, "BN": positions, "BK": STEP_BYTES // 2, "ODD": odd, "WHOLE": whole,
        "HAS_BIAS": False, "PRECISION": "ieee", "bias": None,
    }  # fmt: skip
    return _build(f"upright {label}", multiply_upright, constants, warps, stages)


def _gradient(
    label: str, high: int, wide: int, rows: int, columns: int, warps: int, stages: int, *, dtype: str = "bf16",
    turns: int = 1, deep: bool = False, phased: bool = False,
) -> Build:  # fmt: skip
    constants: dict[str, Any] = {
        "UNIT": UNIT_BYTES // _BYTES[dtype], "BH": high, "BW": wide, "ROWS": rows, "COLUMNS": columns, "TURNS": turns,
        "BK": CORRELATED * 2 // _BYTES[dtype], "DEEP": deep, "PHASED": phased,
        "PRECISION": "tf32" if dtype == "fp32" else "ieee",
    }  # fmt: skip
    return _build(f"gradient {label}", kernels.correlate, constants, warps, stages, dtype)


def _build(label: str, kernel: Any, constants: dict[str, Any], warps: int, stages: int, dtype: str = "bf16") -> Build:
    types = {}
    for name in kernel.arg_names:
        if name not in constants:
            known = {**dict.fromkeys(_TENSORS, f"*{dtype}"), **dict.fromkeys(_INTEGERS, "*i32"),
                     **dict.fromkeys(_SUMS, "*fp32")}  # fmt: skip
            types[name] = known.get(name, "i32")
    divisible = tuple(name for name, kind in types.items() if kind.startswith("*"))
    return Build(f"banded {label} {dtype}", kernel, types, constants, divisible, warps, stages)
