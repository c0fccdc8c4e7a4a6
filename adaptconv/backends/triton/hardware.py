"""What the kernels' shapes and predictions know of GPUs: a few facts by name, from data sheets and measurements."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from adaptconv.problem import Device


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU's limits.

    Attributes:
        family: "sm80", "sm90", "sm100" or "gfx942": what a heuristic may depend on.
        processors: multiprocessors (NVIDIA) or compute units (AMD).
        shared_bytes: shared memory a program may ask for.
        l2_bytes: second-level cache.
        bandwidth_gb_s: copy bandwidth, reads and writes both counted, 10^9 bytes.
        tensor_tflop_s: dense bfloat16 products with float32 sums, 10^12 operations.
        vector_tflop_s: float32 multiply-adds, two operations each.
        clock_ghz: of the multiprocessors under load.
        measured: whether the three rates were measured, not read off a data sheet.
    """

    family: str
    processors: int
    shared_bytes: int
    l2_bytes: int
    bandwidth_gb_s: float
    tensor_tflop_s: float
    vector_tflop_s: float
    clock_ghz: float
    measured: bool = False


_KIB, _MIB = 1 << 10, 1 << 20
H200 = Card("sm90", 132, 227 * _KIB, 60 * _MIB, 4300.0, 790.0, 60.0, 1.7, measured=True)
CARDS: dict[str, Card] = {  # by a word of the driver's name; the first that fits counts
    "H200": H200,
    "GH200": Card("sm90", 132, 227 * _KIB, 60 * _MIB, 4000.0, 790.0, 60.0, 1.7),
    "H100": Card("sm90", 132, 227 * _KIB, 50 * _MIB, 3000.0, 790.0, 60.0, 1.7),
    "A100": Card("sm80", 108, 163 * _KIB, 40 * _MIB, 1400.0, 280.0, 19.0, 1.4),
    "B200": Card("sm100", 148, 227 * _KIB, 126 * _MIB, 7000.0, 1700.0, 70.0, 1.8),
    "MI300X": Card("gfx942", 304, 64 * _KIB, 256 * _MIB, 4000.0, 600.0, 80.0, 2.1),
}


_OTHER = Card("sm80", 80, 99 * _KIB, 32 * _MIB, 600.0, 120.0, 40.0, 1.7)  # workstations' cards have less shared memory


@cache
def card(device: Device) -> Card:
    """The GPU's facts; cautious ones for a GPU that is not listed, and the H200's for a CPU that interprets."""
    if device.kind == "cpu":
        return H200
    return next((facts for word, facts in CARDS.items() if word in device.name), _OTHER)
