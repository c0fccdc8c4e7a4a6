"""Problem: one convolution to compute, in one direction, on one device. Every field is in its key."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, lru_cache

import torch

from adaptconv.taps import TapPattern

Padding = tuple[tuple[int, int], ...]


class Direction(str, Enum):
    """Which of the three bilinear maps of a convolution is computed."""

    FORWARD = "forward"
    GRAD_INPUT = "grad_input"
    GRAD_WEIGHT = "grad_weight"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class Device:
    """What a measurement is valid for.

    Attributes:
        kind: "cpu", "cuda", ...
        name: processor or card, as its driver names it (with the vector and matrix extensions on a CPU).
        threads: torch's intra-op threads on a CPU, 0 elsewhere.
    """

    kind: str
    name: str
    threads: int

    @staticmethod
    def of(device: torch.device) -> Device:
        """The device a tensor lives on, as it is set up now."""
        if device.type == "cpu":
            return _cpu(torch.get_num_threads())
        return _accelerator(device.type, device.index)

    @property
    def slug(self) -> str:
        """A file name for this device, e.g. ``cpu-amd-epyc-avx512-2t``."""
        words = "".join(c if c.isalnum() else "-" for c in f"{self.kind}-{self.name}".lower())
        slug = "-".join(word for word in words.split("-") if word)
        return f"{slug}-{self.threads}t" if self.threads else slug

    def __str__(self) -> str:
        return f"{self.name} ({self.threads} threads)" if self.threads else self.name


@cache
def _cpu(threads: int) -> Device:
    facts: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                label, _, value = line.partition(":")
                facts.setdefault(label.strip(), value.strip())
    except OSError:
        pass  # not Linux
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:  # virtual machines tell the brand alone, and generations differ
        name += f" f{facts['cpu family']}m{facts.get('model', '')}"
    name += f" {torch.backends.cpu.get_cpu_capability()}"
    if "amx_tile" in facts.get("flags", "").split():  # may be hidden from a virtual machine
        name += " AMX"
    return Device("cpu", name, threads)


@cache
def _accelerator(kind: str, index: int | None) -> Device:
    if kind == "cuda":
        return Device(kind, torch.cuda.get_device_name(index), 0)
    return Device(kind, kind, 0)


@dataclass(frozen=True, slots=True)
class Problem:
    """One convolution in one direction.

    Shapes: input ``[N, C_in, *spatial]``, compact weight ``[C_out, C_in / groups, T]``, output
    ``[N, C_out, *out_spatial]``; T is the number of taps.

    Attributes:
        direction: FORWARD (y from x, w), GRAD_INPUT (dx from dy, w) or GRAD_WEIGHT (dw from x, dy).
        batch: N.
        c_in: input channels.
        c_out: output channels.
        groups: channel groups.
        spatial: input extents.
        taps: where the taps sit. Their density is kept for depthwise problems with a weight to read, else set to 1.
        stride: output step an axis.
        padding: zeros (before, after) an axis.
        dtype: "float32", "bfloat16", ...
        layout: "contiguous", "channels_last", or "mixed" (a contiguous input whose channels_last
            weight makes torch answer in channels_last).
        device: what it runs on.
        bias: whether a bias is added (FORWARD only).
        fp32_precision: "ieee", or what the torch flags allow instead.
        deterministic: whether torch asks for deterministic algorithms.
    """

    direction: Direction
    batch: int
    c_in: int
    c_out: int
    groups: int
    spatial: tuple[int, ...]
    taps: TapPattern
    stride: tuple[int, ...]
    padding: Padding
    dtype: str
    layout: str
    device: Device
    bias: bool = False
    fp32_precision: str = "ieee"
    deterministic: bool = False

    def __post_init__(self) -> None:
        # Zeros of its own in each channel's window matter to nobody else: without them more records are shared.
        if self.taps.density != 1 and (self.groups != self.c_in or self.direction is Direction.GRAD_WEIGHT):
            object.__setattr__(self, "taps", self.taps.with_density(1.0))

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.spatial)

    @property
    def out_spatial(self) -> tuple[int, ...]:
        """Output extents."""
        return tuple(
            (extent + before + after - window) // step + 1
            for extent, (before, after), window, step in zip(
                self.spatial, self.padding, self.taps.window, self.stride, strict=True
            )
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's object."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format torch's own convolution would answer in."""
        if self.layout == "contiguous" or self.axes == 1:
            return torch.contiguous_format
        return torch.channels_last if self.axes == 2 else torch.channels_last_3d

    @property
    def input_shape(self) -> tuple[int, ...]:
        """``[N, C_in, *spatial]``."""
        return (self.batch, self.c_in, *self.spatial)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """``[N, C_out, *out_spatial]``."""
        return (self.batch, self.c_out, *self.out_spatial)

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        """Compact weight, ``[C_out, C_in / groups, T]``."""
        return (self.c_out, self.c_in // self.groups, len(self.taps))

    @property
    def is_depthwise(self) -> bool:
        """One input channel a group, and as many groups as input channels."""
        return self.groups == self.c_in and self.groups > 1

    @property
    def flops(self) -> int:
        """Floating-point operations over the taps, dead ones included; the same in every direction."""
        outputs = self.batch * self.c_out * math.prod(self.out_spatial)
        return 2 * outputs * (self.c_in // self.groups) * len(self.taps)

    @property
    def bytes(self) -> int:
        """Bytes of input, weight and output, each counted once."""
        counts = math.prod(self.input_shape) + math.prod(self.weight_shape) + math.prod(self.output_shape)
        return counts * self.torch_dtype.itemsize

    def facing(self, direction: Direction) -> Problem:
        """The same convolution in another direction."""
        return replace(self, direction=direction, bias=self.bias and direction is Direction.FORWARD)

    def adjoint(self) -> Problem | None:
        """At stride 1, the FORWARD problem on dy with flipped taps whose output is dx; else None."""
        return _adjoint(self)

    def key(self) -> str:
        """Canonical text naming every field, the device included: the database key."""
        padding = "x".join(str(a) if a == b else f"{a}:{b}" for a, b in self.padding)
        return " ".join(
            (
                str(self.direction), f"n{self.batch}", f"c{self.c_in}-{self.c_out}", f"g{self.groups}",
                "i" + "x".join(map(str, self.spatial)), f"t{self.taps}", "s" + "x".join(map(str, self.stride)),
                f"p{padding}", self.dtype, self.layout, "bias" if self.bias else "nobias", self.fp32_precision,
                "deterministic" if self.deterministic else "anyorder", f"@{self.device.slug}",
            )
        )  # fmt: skip

    def __str__(self) -> str:
        """Short, for people: no device."""
        padding = ",".join(str(a) if a == b else f"{a}:{b}" for a, b in self.padding)
        taps = str(self.taps)
        if len(taps) > 24:
            kind = "taps" if self.taps.footprint is None else "spread taps"
            taps = f"{len(self.taps)} {kind} in {'x'.join(map(str, self.taps.window))}"
            taps += "" if self.taps.density == 1 else f" ~{self.taps.density:g}"
        groups = "depthwise" if self.is_depthwise and self.c_out == self.c_in else f"groups {self.groups}"
        return (
            f"{self.direction} {self.batch}x{self.c_in}x{'x'.join(map(str, self.spatial))} -> {self.c_out}, "
            f"taps {taps}, stride {','.join(map(str, self.stride))}, pad {padding}, {groups}, "
            f"{self.dtype} {self.layout}"
        )


def same_padding(window: Sequence[int]) -> Padding:
    """Torch's 'same' padding: the odd zero, if any, goes after."""
    return tuple(((extent - 1) // 2, extent - 1 - (extent - 1) // 2) for extent in window)


@lru_cache(maxsize=4096)  # sorting hundreds of taps takes milliseconds, and every call of a backend may ask
def _adjoint(problem: Problem) -> Problem | None:
    if any(step != 1 for step in problem.stride):
        return None
    padding = tuple(
        (window - 1 - before, window - 1 - after)
        for window, (before, after) in zip(problem.taps.window, problem.padding, strict=True)
    )
    return replace(
        problem, direction=Direction.FORWARD, c_in=problem.c_out, c_out=problem.c_in, spatial=problem.out_spatial,
        taps=problem.taps.flipped(), padding=padding, bias=False,
    )  # fmt: skip
