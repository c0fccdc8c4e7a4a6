"""What a kernel is compiled for where there is no GPU: argument types, constants and options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Build:
    """One compilation of one kernel.

    Attributes:
        label: unique among all builds, e.g. ``sparse forward 128x128x64``.
        kernel: the ``@triton.jit`` function.
        types: argument name to Triton's type: ``"*bf16"``, ``"i32"``, ``"fp32"``; constants left out.
        constants: argument name to value.
        divisible: arguments known to be divisible by 16, as the run-time specialisation finds them.
        warps: warps a program.
        stages: depth of the software pipeline.
    """

    label: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    warps: int
    stages: int
