"""Rates: the constants of the cost model, which are facts about a device and not about a convolution.

They stand on the lowest floor because three rooms need them: ``backends.costs`` predicts with them, ``records``
keeps measured ones in the database, and ``calibration`` measures them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

_TRUSTED_FACTOR = 100.0  # a constant this far off its default is no measurement of any processor
_UNITS = {"gflops": "GFLOP/s a thread", "gbytes": "GB/s", "us": "us"}


@dataclass(frozen=True, slots=True)
class Rates:
    """What a processor does in a second, and what a call costs; the defaults are those of two AVX-512 cores.

    A constant is what makes a prediction right, so it holds whatever its formula leaves out. ``_gflops`` are
    10^9 operations a second of one thread, a multiply-add being two; ``_gbytes`` are 10^9 bytes a second of all
    threads together, read and written ones both counted; ``_us`` are microseconds.

    Attributes:
        gemm_gflops: torch's convolution of a single group of channels.
        product_gflops: gather's matrix product where a group has several output channels, 16 or more at best.
        matvec_gflops: gather's product where a group has one output channel.
        direct_gflops: torch's vectorised depthwise convolution.
        slow_gflops: torch's reference loop, which takes the depthwise convolutions no fast kernel wants.
        copy_gbytes: operands, zeros around them and sums, in order.
        relayout_gbytes: from one memory format into another.
        columns_gbytes: gather's columns, written and read.
        call_us: fixed cost of one torch convolution.
        dense_call_us: fixed cost of dense, the window written included.
        gather_call_us: fixed cost of gather.
        dual_call_us: fixed cost of each of dual's grids.
        factored_call_us: fixed cost of each of factored's convolutions.
        cpp_call_us: fixed cost of cpp.
        cpp_gflops: cpp's forward kernel with vectors filled.
        cpp_weight_gflops: its gradient of the weight, likewise.
        cpp_line_gflops: either on one axis, likewise.

    Raises:
        ValueError: a constant that is no number, or not within a factor of 100 of its default.
    """

    gemm_gflops: float = 90.0
    product_gflops: float = 90.0
    matvec_gflops: float = 1.8
    direct_gflops: float = 60.0
    slow_gflops: float = 3.5
    copy_gbytes: float = 40.0
    relayout_gbytes: float = 40.0
    columns_gbytes: float = 40.0
    call_us: float = 8.0
    dense_call_us: float = 8.0
    gather_call_us: float = 8.0
    dual_call_us: float = 8.0
    factored_call_us: float = 8.0
    cpp_call_us: float = 25.0
    cpp_gflops: float = 25.0
    cpp_weight_gflops: float = 100.0
    cpp_line_gflops: float = 75.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            assert isinstance(default, float)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{field.name} must be a number, got {ascii(value)[:60]}")
            if not default / _TRUSTED_FACTOR <= value <= default * _TRUSTED_FACTOR:  # false for NaN too
                bounds = f"within a factor of {_TRUSTED_FACTOR:g} of {default:g}"
                raise ValueError(f"{field.name} must be {bounds}, got {ascii(value)[:60]}")
            object.__setattr__(self, field.name, float(value))

    def to_json(self) -> dict[str, float]:
        """Every constant by name, as JSON can hold it; ``Rates.from_json`` reads it back unchanged."""
        return {name: getattr(self, name) for name in NAMES}

    @staticmethod
    def from_json(obj: object) -> Rates:
        """Read what ``to_json`` gave, strictly: every constant once and nothing else.

        Raises:
            ValueError: anything else; the message says what.
        """
        if not isinstance(obj, dict) or obj.keys() != set(NAMES):
            odd = sorted(map(str, obj.keys() ^ set(NAMES))) if isinstance(obj, dict) else [ascii(obj)[:60]]
            raise ValueError(f"rates are exactly the constants {', '.join(NAMES)}; at odds: {odd[:5]}")
        return Rates(**obj)


NAMES = tuple(field.name for field in fields(Rates))
DEFAULTS = Rates()


def is_overhead(name: str) -> bool:
    """Whether a constant is a time, which predictions grow with, and not a speed, which they shrink with."""
    return name.endswith("_us")


def unit(name: str) -> str:
    """Unit of a constant, for people."""
    return _UNITS[name.rpartition("_")[2]]
