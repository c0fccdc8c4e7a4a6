"""What one program takes on, from the knobs: sizes of tiles, which must be known when a kernel is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from adaptconv.backends.base import Config

WARP = 32
_NEIGHBOURS = 64  # channels of a pixel that one program takes: 128 bytes of half precision


@dataclass(frozen=True, slots=True)
class Packed:
    """A program on packed rows.

    Attributes:
        strips: strips of eight places it computes, or reads in turn for the weight gradient.
        warps: its warps.
        reach: the longest group of neighbouring taps; 1 where a strip is a place of eight images.
        groups: groups of taps that it sums from one read of dy.
    """

    strips: int
    warps: int
    reach: int
    groups: int


@dataclass(frozen=True, slots=True)
class Direct:
    """A program straight on the operands.

    Attributes:
        places: places it computes, or reads in turn for the weight gradient.
        channels: channels of each.
        warps: its warps.
        taps: taps that it sums from one read of dy.
    """

    places: int
    channels: int
    warps: int
    taps: int


def packed_shape(config: Config) -> Packed:
    """Tile of the packed forms; the weight gradient's sums leave room for one strip a thread."""
    warps, groups = int(config["warps"]), int(config.get("groups", 1))
    reach = {"packed8": 8, "packed16": 16}.get(str(config["form"]), 1)
    return Packed(WARP * warps * int(config.get("share", 1)), warps, reach, groups if reach > 1 else 4 * groups)


def shares(family: str) -> tuple[int, ...]:
    """How much a thread may compute: four strips spill in some of the kernels compiled for other families."""
    return (1, 2, 4) if family in ("sm90", "sm100") else (1, 2)


def is_packed(config: Config) -> bool:
    """Whether the configuration's form packs the operand."""
    return config["form"] != "direct"


def direct_shape(config: Config, *, last: bool, channels: int, unit: int, places: int) -> Direct:
    """Tile of the direct form: ``unit`` channels are one load. Planes smaller than a tile share it."""
    warps = int(config["warps"])
    share = int(config.get("share", 1 if last else 4))  # sums of the weight gradient: eight a vector of channels
    loads = WARP * warps * share
    if last:
        wide = max(min(_NEIGHBOURS, _power(channels)), unit)
        return Direct(max(loads * unit // wide, 2), wide, warps, 2 * int(config.get("groups", 1)))
    along = min(loads, max(_power(places), 16))
    return Direct(along, min(loads // along, _power(channels)), warps, 2 * int(config.get("groups", 1)))


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
