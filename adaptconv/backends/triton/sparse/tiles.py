"""Tiles: what one program computes at a time. Which there are for a GPU and a dtype, and which suit a problem."""

from __future__ import annotations

import re
from dataclasses import dataclass

from adaptconv.backends.triton.hardware import card
from adaptconv.problem import Direction, Problem


@dataclass(frozen=True, slots=True)
class Tile:
    """``m`` rows by ``n`` columns, ``k`` products at a time, by so many warps with loads so many stages ahead.

    Rows are pixels and columns channels, but output channels and pixels if planar: channels outermost, as they lie.
    In GRAD_WEIGHT rows are output channels and columns input channels, for so many taps that share one load of dy.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    taps: int = 1
    planar: bool = False

    def __str__(self) -> str:
        text = f"m{self.m}n{self.n}k{self.k}w{self.warps}s{self.stages}"
        return text + (f"t{self.taps}" if self.taps > 1 else "") + ("p" if self.planar else "")

    @staticmethod
    def parse(text: str) -> Tile:
        """Read the text back."""
        m, n, k, warps, stages, taps = [*map(int, re.findall(r"\d+", text)), 1][:6]
        return Tile(m, n, k, warps, stages, taps, text.endswith("p"))


def _tiles(text: str) -> tuple[Tile, ...]:
    return tuple(map(Tile.parse, text.split()))


# By family, then by how products are taken. Every one was compiled for its GPU in every form of its kernel: no
# register is spilled, shared memory fits.
PRODUCT_TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm90": {
        "half": _tiles(
            "m128n256k64w8s3 m256n128k64w8s3 m128n128k64w8s3 m128n64k64w4s4 m64n64k64w4s4 m128n32k64w4s4"
            " m64n32k64w4s4 m128n128k32w8s4 m128n64k32w4s4 m128n32k32w4s4 m64n64k32w4s4 m64n32k32w4s4"
            " m128n64k16w4s4 m128n32k16w4s4 m64n32k16w4s4"
        ),
        "tf32": _tiles("m128n128k32w8s3 m128n64k32w4s3 m64n64k32w4s4 m128n32k32w4s4 m64n32k32w4s4 m64n32k16w4s4"),
        "ieee": _tiles("m128n128k16w8s2 m128n64k16w8s2 m64n64k16w4s2 m64n32k16w4s2"),
    },
    "sm80": {
        "half": _tiles(
            "m128n256k32w8s3 m256n128k32w8s3 m128n128k64w8s3 m128n128k32w8s4 m128n64k32w4s4 m64n64k64w4s4"
            " m64n64k32w4s4 m128n32k32w4s4 m64n32k32w4s4 m64n32k16w4s4"
        ),
        "tf32": _tiles("m128n128k32w8s3 m64n64k32w4s3 m64n32k32w4s3 m64n32k16w4s3"),
        "ieee": _tiles("m128n64k16w8s2 m64n64k16w4s2 m64n32k16w4s2"),
    },
    "gfx942": {
        "half": _tiles(
            "m256n128k64w8s2 m128n256k64w8s2 m128n128k64w8s2 m128n128k32w4s2 m128n64k64w4s2 m64n64k64w4s2"
            " m64n32k64w4s2 m64n32k32w4s2 m64n32k16w4s2"
        ),
        "ieee": _tiles("m128n128k32w8s2 m64n64k32w4s2 m64n32k32w4s2 m64n32k16w4s2"),
    },
}
WEIGHT_TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    "sm90": {
        "half": _tiles(
            "m256n128k64w8s3 m128n128k64w8s3 m64n128k64w8s3 m64n128k64w8s3t2 m128n64k64w8s3 m128n64k64w8s3t2"
            " m128n64k64w8s3t3 m64n64k64w8s3 m64n64k64w8s3t2 m64n64k64w8s3t3 m64n64k64w4s4 m64n32k64w4s3"
            " m64n32k64w4s3t3 m32n32k64w4s3 m32n32k64w4s3t3"
        ),
        "tf32": _tiles("m128n128k32w8s3 m64n64k32w8s3 m64n64k32w8s3t3 m64n64k32w4s3 m32n32k32w4s3"),
        "ieee": _tiles("m128n64k16w8s2 m64n64k16w8s2 m32n32k32w4s2"),
    },
    "sm80": {
        "half": _tiles("m128n128k64w8s3 m128n128k32w8s3 m64n64k64w8s3t2 m64n64k64w4s3 m32n32k64w4s3"),
        "tf32": _tiles("m64n64k32w4s3 m32n32k32w4s3"),
        "ieee": _tiles("m128n64k16w8s2 m64n64k16w8s2 m32n32k16w4s2"),
    },
    "gfx942": {
        "half": _tiles("m128n128k64w8s2 m64n64k64w4s2 m64n64k32w4s2 m64n64k32w4s2t3 m32n32k64w4s2"),
        "ieee": _tiles("m64n64k32w8s2 m64n64k32w4s2 m32n32k32w4s2"),
    },
}
PLANAR_PRODUCT_TILES: dict[str, tuple[Tile, ...]] = {
    "sm90": _tiles(
        "m128n256k64w8s3p m128n128k64w8s3p m64n256k64w8s3p m64n128k64w4s4p m64n64k64w4s4p m64n128k32w4s4p"
        " m64n64k32w4s4p"
    ),
    "sm80": _tiles("m128n128k32w8s3p m64n128k32w4s3p m64n64k32w4s3p"),
    "gfx942": _tiles("m128n128k64w8s2p m64n128k32w4s2p m64n64k32w4s2p"),
}
PLANAR_WEIGHT_TILES: dict[str, tuple[Tile, ...]] = {
    "sm90": _tiles("m256n128k64w8s3p m128n128k64w8s3p m64n128k64w8s3p m128n64k64w8s3p m64n64k64w8s3p"),
    "sm80": _tiles("m128n128k32w8s3p m64n64k64w4s3p"),
    "gfx942": _tiles("m128n128k64w8s2p m64n64k64w4s2p"),
}
NARROW = 128 * 128  # results of a program up to which vectors of two places leave registers enough


def kind_of(problem: Problem) -> str:
    """How products are taken: "half", "tf32" or "ieee"."""
    if problem.dtype != "float32":
        return "half"
    return "tf32" if "conv-tf32" in problem.fp32_precision else "ieee"


def precision(problem: Problem) -> str:
    """What the kernels are told: float32 products as torch's flags allow its own convolution to take them."""
    return "tf32" if kind_of(problem) == "tf32" else "ieee"


def depth_of(channels: int, vec: int) -> int:
    """Channels a group as they are stored: whole vectors of 16 bytes."""
    return -(-channels // vec) * vec


def vector_of(problem: Problem) -> int:
    """Elements of 16 bytes."""
    return 16 // problem.torch_dtype.itemsize


def turned(problem: Problem, tile: Tile) -> bool:
    """Whether GRAD_WEIGHT loads dy with places along the second axis.

    Hopper's products of 64 rows or more read shared memory either way, and counters of one shape serve both operands;
    others would wait for a load through registers.
    """
    return _family(card(problem.device).family) != "sm90" or tile.m < 64


def tiles_for(problem: Problem, pixels: int, planar: int) -> tuple[Tile, ...]:
    """Tiles worth trying: not much larger than the problem, nor so narrow that operands are read many times.

    Args:
        problem: any direction.
        pixels: results a channel.
        planar: places of a vector if channels may stay outermost, else 0.
    """
    of_weight = problem.direction is Direction.GRAD_WEIGHT
    here = card(problem.device)
    family = _family(here.family)
    menu = (WEIGHT_TILES if of_weight else PRODUCT_TILES)[family]
    tiles = menu.get(kind_of(problem), menu["ieee"])
    if planar:
        flat = (PLANAR_WEIGHT_TILES if of_weight else PLANAR_PRODUCT_TILES)[family]
        tiles += tuple(t for t in flat if planar > 2 or t.m * t.n <= NARROW)
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    columns, depth = (outs, ins) if problem.direction is Direction.FORWARD else (ins, outs)
    if of_weight:
        fitting = tuple(t for t in tiles if t.taps <= max(len(problem.taps), 1))
    else:
        fitting = tuple(
            t for t in tiles if t.k <= max(_power(depth), 32 if t.planar else 16) and (t.k > 16 or depth % 32)
        )
    size = problem.torch_dtype.itemsize
    fitting = tuple(t for t in fitting or tiles if shared_bytes(t, size, family) <= here.shared_bytes)
    wide = []
    for t in fitting or tiles:
        same = [other for other in fitting or tiles if other.planar == t.planar]
        rows, across = (outs, ins) if of_weight else (columns, pixels) if t.planar else (pixels, columns)
        if _suits(t.m, rows, min(o.m for o in same)) and _suits(t.n, across, min(o.n for o in same)):
            wide.append(t)
    return tuple(wide) or tiles[-1:]


def shared_bytes(tile: Tile, size: int, family: str) -> int:
    """Shared memory of a program's loads: Hopper's products read it in place, others keep one stage in registers."""
    stages = tile.stages if _family(family) == "sm90" else tile.stages - 1
    return (tile.m + tile.n * tile.taps) * tile.k * size * stages


def _suits(tile: int, extent: int, least: int) -> bool:
    """Whether a tile is at most the next power of two, and no less than 64 or half of the extent."""
    return tile <= max(_power(extent), least) and (tile >= 64 or tile * 2 >= extent)


def _power(extent: int) -> int:
    return 1 << max(extent - 1, 0).bit_length()


def _family(family: str) -> str:
    return "sm90" if family == "sm100" else family
