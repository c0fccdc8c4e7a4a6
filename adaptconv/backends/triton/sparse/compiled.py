"""What the kernels are compiled for where there is no GPU: every tile of a family, in the forms that need most."""

from __future__ import annotations

from typing import Any

from adaptconv.backends.triton.builds import Build
from adaptconv.backends.triton.sparse import kernels, planar_kernels, weight_kernels
from adaptconv.backends.triton.sparse.tiles import (
    NARROW,
    PLANAR_PRODUCT_TILES,
    PLANAR_WEIGHT_TILES,
    PRODUCT_TILES,
    WEIGHT_TILES,
    Tile,
)

_POINTERS = {"x": "", "w": "", "bias": "", "dy": "", "jobs": "i32", "taps": "i32", "boxes": "i32", "slots": "i32"}
_WIDE = ("part_y", "parts_pitch")  # counts that may pass 2^31


def builds(family: str) -> list[Build]:
    """Every compilation that matters on a family: "sm80", "sm90" or "gfx942"."""
    found = []
    for kind, tiles in PRODUCT_TILES[family].items():
        for tile in tiles:
            found += [_product(tile, kind, axes) for axes in (1, 3)]
        found += [_product(tiles[0], kind, 2, partial=True), _product(tiles[0], kind, 2, even=False)]
    for kind, tiles in WEIGHT_TILES[family].items():
        for tile in tiles:
            found += [_weight(tile, kind, family, axes=2, same=True), _weight(tile, kind, family, axes=3, same=False)]
        found.append(_weight(tiles[0], kind, family, axes=2, same=True, wide=True))
    for tile in PLANAR_PRODUCT_TILES[family]:
        found += [_planar_product(tile, vec) for vec in _vectors(tile)]
    found.append(_planar_product(PLANAR_PRODUCT_TILES[family][0], 8, parts=True))
    for tile in PLANAR_WEIGHT_TILES[family]:
        found += [_planar_weight(tile, vec) for vec in _vectors(tile)]
    return [*found, _sum_parts(), _sum_weights()]


def _product(tile: Tile, kind: str, axes: int, partial: bool = False, even: bool = True) -> Build:
    element, vec = _element(kind)
    constants = {
        "AXES": axes, "JOBS": 128, "VEC": vec, "EVEN": even, "BIAS": not partial,
        "PARTIAL": partial, "PRECISION": _precision(kind), "BM": tile.m, "BN": tile.n, "BK": tile.k,
    }  # fmt: skip
    form = f"{'' if even else ' ragged'}{' parts' if partial else ''}"
    return _build(
        f"sparse product {kind} {tile} {axes}-d{form}", kernels.tap_product, constants, tile,
        {"y": "*fp32" if partial else element}, element,
    )  # fmt: skip


def _weight(tile: Tile, kind: str, family: str, axes: int, same: bool, wide: bool = False) -> Build:
    element, vec = _element(kind)
    constants = {
        "AXES": axes, "SHARE": tile.taps, "SAME": same, "WIDE": wide, "TURNED": family != "sm90" or tile.m < 64,
        "VEC": vec, "PRECISION": _precision(kind), "BM": tile.m, "BN": tile.n, "BK": tile.k,
    }  # fmt: skip
    form = f"{' same' if same else ''}{' wide' if wide else ''}"
    return _build(
        f"sparse weight {kind} {tile} {axes}-d{form}", weight_kernels.weight_product, constants, tile,
        {"parts": "*fp32"}, element,
    )  # fmt: skip


def _vectors(tile: Tile) -> tuple[int, ...]:
    return (8, 4, 2) if tile.m * tile.n <= NARROW else (8, 4)


def _planar_product(tile: Tile, vec: int, parts: bool = False) -> Build:
    constants = {
        "JOBS": 128, "VEC": vec, "EVEN": False, "BIAS": not parts, "PARTIAL": parts, "PRECISION": "ieee",
        "BM": tile.m, "BN": tile.n, "BK": tile.k,
    }  # fmt: skip
    return _build(
        f"sparse planar product {tile} by {vec}{' parts' if parts else ''}", planar_kernels.planar_product, constants,
        tile, {"y": "*fp32" if parts else "*bf16"}, "*bf16",
    )  # fmt: skip


def _planar_weight(tile: Tile, vec: int) -> Build:
    constants = {"VEC": vec, "WIDTH": 8, "PRECISION": "ieee", "BM": tile.m, "BN": tile.n, "BK": tile.k}
    return _build(
        f"sparse planar weight {tile} by {vec}", planar_kernels.planar_weight, constants, tile, {"parts": "*fp32"},
        "*bf16",
    )  # fmt: skip


def _sum_parts() -> Build:
    constants = {"BIAS": True, "BLOCK": 1024}
    types = {"parts": "*fp32", "y": "*bf16", "total": "i64"}
    return _build("sparse sum of parts", kernels.sum_parts, constants, Tile(0, 0, 0, 4, 3), types, "*bf16")


def _sum_weights() -> Build:
    constants = {"BR": 64, "BT": 16}
    types = {"parts": "*fp32", "dw": "*bf16"}
    return _build("sparse sum of weights", weight_kernels.sum_weights, constants, Tile(0, 0, 0, 4, 3), types, "*bf16")


def _build(
    label: str, kernel: Any, constants: dict[str, Any], tile: Tile, special: dict[str, str], element: str
) -> Build:
    types = {}
    for name in kernel.arg_names:
        if name in special:
            types[name] = special[name]
        elif name in _POINTERS:
            types[name] = f"*{_POINTERS[name]}" if _POINTERS[name] else element
        elif name not in constants:
            types[name] = "i64" if name in _WIDE else "i32"
    pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
    return Build(label, kernel, types, constants, pointers, tile.warps, tile.stages)


def _element(kind: str) -> tuple[str, int]:
    return ("*bf16", 8) if kind == "half" else ("*fp32", 4)


def _precision(kind: str) -> str:
    return "tf32" if kind == "tf32" else "ieee"
