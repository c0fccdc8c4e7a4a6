"""What the depthwise kernels are compiled for where there is no GPU: the widest and the usual tile of each."""

from __future__ import annotations

from typing import Any

from adaptconv.backends.base import Config
from adaptconv.backends.triton.builds import Build
from adaptconv.backends.triton.depthwise import kernels, packed_kernels
from adaptconv.backends.triton.depthwise.plan import STRIP
from adaptconv.backends.triton.depthwise.shapes import direct_shape, packed_shape, shares

_POINTERS = {
    "x": "", "xp": "", "y": "", "dy": "", "dyp": "", "w": "*fp32", "part": "*fp32", "taps": "*i32", "table": "*i32",
    "places": "*i64", "bias": "",
}  # fmt: skip

_MANY = 1 << 20


def builds(family: str) -> list[Build]:
    """One compilation a kernel, dtype, layout and extreme of the space."""
    found = []
    for dtype in ("bf16", "fp32"):
        for last in (False, True):
            unit = 16 // (2 if dtype == "bf16" else 4) if last else 1
            found.append(_build(
                f"pack {dtype} {'channels_last' if last else 'contiguous'}", packed_kernels.pack, dtype, 4,
                LAST=last, DEEP=False, PHASED=False, LONG=False, V=unit, A=64 if last else 32, B=64 if last else 128,
            ))  # fmt: skip
            found += _direct(dtype, last, unit, shares(family)[-1])
        found += _packed(dtype, shares(family)[-1])
    return found


def _packed(dtype: str, most: int) -> list[Build]:
    found = []
    for warps, share, unit in ((4, 1, True), (4, 2, True), (4, 2, False), (8, most, True), (8, most, False)):
        shape = packed_shape(Config(form="packed16", warps=warps, share=share))
        for adjoint in (False, True):
            found.append(_build(
                f"packed {'adjoint' if adjoint else 'forward'} {dtype} {warps}x{share} {'unit' if unit else 'strided'}",
                packed_kernels.convolve_packed, dtype, warps, ADJOINT=adjoint, HAS_BIAS=not adjoint, UNIT=unit,
                KIND=dtype, B=shape.strips,
            ))  # fmt: skip
    for reach, groups in ((8, 2), (8, 4), (16, 1), (16, 2), (16, 4)):
        shape = packed_shape(Config(form=f"packed{reach}", warps=4, groups=groups))
        found.append(_build(
            f"packed weight {dtype} {reach}x{groups}", packed_kernels.correlate_packed, dtype, 4, KIND=dtype,
            B=shape.strips, V=reach // STRIP + 1, R=shape.groups,
        ))  # fmt: skip
    for groups in (1, 2, 4):
        shape = packed_shape(Config(form="images", warps=4, groups=groups))
        found.append(_build(
            f"images weight {dtype} {shape.groups}", packed_kernels.correlate_packed, dtype, 4, KIND=dtype,
            B=shape.strips, V=1, R=shape.groups,
        ))  # fmt: skip
    found.append(_build(f"pack images {dtype}", packed_kernels.pack_images, dtype, 4, LONG=False, B=256))
    return found


def _direct(dtype: str, last: bool, unit: int, most: int) -> list[Build]:
    found, layout = [], "channels_last" if last else "contiguous"
    pairs = last and dtype != "fp32"
    per = 2 if pairs else 1
    for axes, share in ((1, most), (2, 1), (2, most), (3, most)):
        if axes == 1 and last:
            continue
        shape = direct_shape(
            Config(form="direct", warps=4, share=share), last=last, channels=96, unit=unit, places=_MANY
        )
        own: dict[str, Any] = {"KIND": dtype} if pairs else {"LAST": last, "PLAIN": True, "ADJOINT": False}
        found.append(_build(
            f"direct {axes}-D {dtype} {layout} {share}", kernels.convolve_pairs if pairs else kernels.convolve_direct,
            dtype, 4, **own, AXES=axes, V=unit // per, HAS_BIAS=True, LONG=False, BP=shape.places,
            BC=shape.channels // per,
        ))  # fmt: skip
    for axes, groups in ((2, 2), (3, 4)):
        shape = direct_shape(
            Config(form="direct", warps=4, groups=groups), last=last, channels=96, unit=unit, places=_MANY
        )
        found.append(_build(
            f"direct weight {axes}-D {dtype} {layout} {groups}", kernels.correlate_direct, dtype, 4, KIND=dtype,
            AXES=axes, LAST=last, V=unit // per, PLAIN=True, PAIRS=pairs, LONG=False, BT=shape.taps, BP=shape.places,
            BC=shape.channels // per,
        ))  # fmt: skip
    return found


def _build(label: str, kernel: Any, dtype: str, warps: int, **constants: Any) -> Build:
    names = [name for name in kernel.arg_names if name not in constants]
    types = {name: _POINTERS.get(name, "i32") or f"*{dtype}" for name in names}
    if "T" in names:  # elsewhere, how many
        types["taps"] = "*i32"
    elif kernel is packed_kernels.convolve_packed:
        types["taps"] = "i32"
    pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
    if constants.get("PAIRS", constants.get("KIND", "fp32") != "fp32"):  # words of two
        types.update({name: "*i32" for name in ("x", "xp", "dy", "dyp") if name in types})
    return Build(f"depthwise {label}", kernel, types, constants, pointers, warps, 1)
