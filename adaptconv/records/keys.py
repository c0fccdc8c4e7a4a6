"""Keys read back: what ``Problem.key()`` says, as features, and how far apart two problems are.

A key comes from a file, so reading one costs no more than its length: a grid of a billion taps is two
numbers here, never a list of offsets.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import sub

from adaptconv.problem import Device, Direction, Problem
from adaptconv.taps import TapPattern

# Distances. One doubling of a size that scales the work costs about 1.
OTHER_DEVICE = 4.0
OTHER_THREADS = 1.0
STALE = 2.0
_OTHER_NUMERICS = 0.5  # fp32 precision and determinism: a different kernel may be allowed
_OTHER_BIAS = 0.25

_SIZE = r"\d{1,18}"
_SIZES = rf"{_SIZE}(?:x{_SIZE}){{0,2}}"
_PAD = rf"-?{_SIZE}(?::-?{_SIZE})?"
_KEY = re.compile(
    rf"(?P<direction>forward|grad_input|grad_weight) n(?P<batch>{_SIZE}) c(?P<c_in>{_SIZE})-(?P<c_out>{_SIZE})"
    rf" g(?P<groups>{_SIZE}) i(?P<spatial>{_SIZES}) t(?P<taps>[\dxd/]+)(?:\*(?P<footprint>[\d.,ex+-]+))?"
    rf"(?:~(?P<density>0\.\d{{1,40}}))?"
    rf" s(?P<stride>{_SIZES})"
    rf" p(?P<padding>{_PAD}(?:x{_PAD}){{0,2}}) (?P<dtype>\w+) (?P<layout>\w+) (?P<bias>bias|nobias)"
    r" (?P<fp32_precision>\S+) (?P<order>deterministic|anyorder) @(?P<device>\S+)",
    re.ASCII,
)
_GRID = re.compile(rf"({_SIZES})(?:d({_SIZES}))?", re.ASCII)

Family = tuple[str, str, str, str, str, int, str]


@dataclass(frozen=True)  # not slotted: what is derived is cached on the instance
class Features:
    """What a key says about its problem.

    Attributes:
        direction: "forward", "grad_input" or "grad_weight".
        batch: N.
        c_in: input channels.
        c_out: output channels.
        groups: channel groups.
        spatial: input extents.
        taps: number of taps.
        taps_class: "spread" (with a footprint), "holes" (of each channel: with a density), "single", "dense" (one grid,
            dilation 1), "dilated" (one grid) or "irregular".
        density: share of its taps that a channel is expected to use.
        window: dense extent of the taps along each axis, footprints included.
        dilation: step between taps along each axis; 1 where there is no single grid.
        stride: output step along each axis.
        padding: zeros (before, after) along each axis.
        dtype: "float32", ...
        layout: "contiguous", "channels_last" or "mixed".
        bias: whether a bias is added.
        fp32_precision: "ieee", or what the torch flags allow instead.
        deterministic: whether torch asks for deterministic algorithms.
        device: slug of the device, threads included.
    """

    direction: str
    batch: int
    c_in: int
    c_out: int
    groups: int
    spatial: tuple[int, ...]
    taps: int
    taps_class: str
    density: float
    window: tuple[int, ...]
    dilation: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dtype: str
    layout: str
    bias: bool
    fp32_precision: str
    deterministic: bool
    device: str

    @property
    def device_kind(self) -> str:
        """First word of the slug: "cpu", "cuda", ..."""
        return self.device.partition("-")[0]

    @cached_property
    def device_and_threads(self) -> tuple[str, int]:
        """The slug without its thread count, and the count (0 where the device has none)."""
        match = re.fullmatch(r"(cpu-.*)-(\d{1,9})t", self.device, re.ASCII)
        return (match[1], int(match[2])) if match else (self.device, 0)

    @property
    def groups_class(self) -> str:
        """One of "dense" (one group), "depthwise" (a group for each input channel) and "grouped"."""
        if self.groups == 1:
            return "dense"
        return "depthwise" if self.groups == self.c_in else "grouped"

    @cached_property
    def family(self) -> Family:
        """What two problems must share for one to say anything about the other."""
        return (
            self.direction, self.device_kind, self.dtype, self.layout, self.groups_class, len(self.spatial),
            self.taps_class,
        )  # fmt: skip

    @cached_property
    def place(self) -> tuple[float, ...]:
        """Weighted base-2 logarithms of every size: distances are sums of differences here."""
        axis = 1 / len(self.spatial)  # so that a problem of three axes is not three times as far away
        return (
            0.5 * _log(self.batch),  # for most kernels batch only repeats the work
            _log(self.c_in),
            _log(self.c_out),
            0.5 * _log(self.groups),
            _log(self.taps),
            -math.log2(self.density),
            *(axis * _log(extent) for extent in self.spatial),
            *(0.5 * axis * _log(extent) for extent in self.window),
            *(axis * _log(step) for step in self.dilation),
            *(2 * axis * _log(step) for step in self.stride),  # a stride changes which algorithms exist at all
            *(0.25 * axis * _log(1 + abs(before) + abs(after)) for before, after in self.padding),
        )


def parse_key(key: str) -> Features:
    """Read a problem's key back.

    Raises:
        ValueError: the text is not the key of a problem.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(f"not the key of a problem: {key[:80]!r}")
    spatial, stride = _ints(match["spatial"]), _ints(match["stride"])
    padding = tuple((int(a), int(b or a)) for a, _, b in (part.partition(":") for part in match["padding"].split("x")))
    taps, window, dilation, regular = _read_taps(match["taps"])
    lengths = _filter_lengths(match["footprint"], len(window))
    window = tuple(extent + length - 1 for extent, length in zip(window, lengths, strict=True))
    if not len(spatial) == len(stride) == len(padding) == len(window):
        raise ValueError(f"the fields of a key disagree on the number of axes: {key[:80]!r}")
    density = float(match["density"] or 1)
    if not density:
        raise ValueError(f"not a share of the taps: {key[:80]!r}")
    if match["footprint"]:
        taps_class = "spread"
    elif match["density"]:
        taps_class = "holes"
    elif taps == 1:
        taps_class = "single"
    elif regular:
        taps_class = "dense" if all(step == 1 for step in dilation) else "dilated"
    else:
        taps_class = "irregular"
    return Features(
        match["direction"], int(match["batch"]), int(match["c_in"]), int(match["c_out"]), int(match["groups"]),
        spatial, taps, taps_class, density, window, dilation, stride, padding, match["dtype"],
        match["layout"], match["bias"] == "bias", match["fp32_precision"], match["order"] == "deterministic",
        match["device"],
    )  # fmt: skip


def problem_of(key: str, device: Device) -> Problem:
    """Read a problem's key back as the problem, on a device of yours.

    Args:
        key: canonical text of a problem of a size like one at hand: its taps are listed.
        device: a key names its own by a slug only.

    Raises:
        ValueError: the text is not the key of a problem that there can be.
    """
    features, match = parse_key(key), _KEY.fullmatch(key)
    assert match is not None
    footprint = f"*{match['footprint']}" if match["footprint"] else ""
    density = f"~{match['density']}" if match["density"] else ""
    taps = TapPattern.parse(f"{match['taps']}{footprint}{density}")
    channels = features.c_in, features.c_out
    if not features.groups or any(not count or count % features.groups for count in channels) or 0 in features.stride:
        raise ValueError(f"no problem has these channels, groups or strides: {key[:80]!r}")
    problem = Problem(
        Direction(features.direction), features.batch, *channels, features.groups, features.spatial, taps,
        features.stride, features.padding, features.dtype, features.layout,
        device, features.bias, features.fp32_precision,
        features.deterministic,
    )  # fmt: skip
    if min(problem.batch, *problem.spatial, *problem.out_spatial) < 1:
        raise ValueError(f"nothing is computed by the problem of this key: {key[:80]!r}")
    return problem


def distance(a: Features, b: Features) -> float:
    """How far two problems of one family are apart: 0 for the same problem, symmetric.

    Sizes count by the difference of their logarithms; another device of the same kind, another
    thread count, other numerics and a bias each add a fixed amount.
    """
    apart: float = sum(map(abs, map(sub, a.place, b.place)))
    if a.device != b.device:
        apart += OTHER_THREADS if a.device_and_threads[0] == b.device_and_threads[0] else OTHER_DEVICE
    if a.fp32_precision != b.fp32_precision or a.deterministic != b.deterministic:
        apart += _OTHER_NUMERICS
    return apart + _OTHER_BIAS if a.bias != b.bias else apart


def _log(size: int) -> float:
    return math.log2(max(1, size))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _read_taps(text: str) -> tuple[int, tuple[int, ...], tuple[int, ...], bool]:
    """Number of taps, window, dilation, and whether they are one regular grid."""
    if set(text) <= {"0", "1", "/"}:
        return _read_mask(text)
    match = _GRID.fullmatch(text)
    if match is None:
        raise ValueError(f"not a tap pattern: {text[:40]!r}")
    size = _ints(match[1])
    dilation = _ints(match[2]) if match[2] else (1,) * len(size)
    if len(dilation) != len(size) or not all(size) or not all(dilation):
        raise ValueError(f"not a grid of taps: {text[:40]!r}")
    window = tuple((s - 1) * d + 1 for s, d in zip(size, dilation, strict=True))
    return math.prod(size), window, tuple(d if s > 1 else 1 for s, d in zip(size, dilation, strict=True)), True


def _filter_lengths(footprint: str | None, axes: int) -> tuple[int, ...]:
    """How many values a footprint has along each axis; 1 without one."""
    if footprint is None:
        return (1,) * axes
    filters = [values.split(",") for values in footprint.split("x")]
    if len(filters) != axes:
        raise ValueError(f"not a footprint of {axes} axes: {footprint[:40]!r}")
    for value in itertools.chain(*filters):
        float(value)  # a ValueError of its own where it is no number
    return tuple(map(len, filters))


def _read_mask(text: str) -> tuple[int, tuple[int, ...], tuple[int, ...], bool]:
    separators = ("//", "/") if "//" in text else ("/",) if "/" in text else ()
    if separators:
        text = text.removesuffix(separators[0])  # a lone row or plane says its rank by a trailing separator
    planes = [plane.split("/") for plane in text.split("//")]
    extents = len(planes), len(planes[0]), len(planes[0][0])
    if any(len(plane) != extents[1] or any(len(row) != extents[2] for row in plane) for plane in planes):
        raise ValueError(f"not a rectangular mask of taps: {text[:40]!r}")
    window = extents[2 - len(separators) :]
    if not all(window):
        raise ValueError(f"not a mask of taps: {text[:40]!r}")
    steps = _steps(text, separators)
    return text.count("1"), window, (1,) * len(window) if steps is None else steps, steps is not None


def _steps(text: str, separators: Sequence[str]) -> tuple[int, ...] | None:
    """The step along each axis if the taps of a mask form one regular grid; None if they do not.

    They do when, axis after axis, the parts that hold taps are all alike and equally spaced.
    """
    parts = text.split(separators[0]) if separators else list(text)
    live = [i for i, part in enumerate(parts) if "1" in part]
    spacing = {b - a for a, b in itertools.pairwise(live)} or {1}
    if len({parts[i] for i in live}) != 1 or len(spacing) > 1:
        return None
    inner = _steps(parts[live[0]], separators[1:]) if separators else ()
    return None if inner is None else (*spacing, *inner)
