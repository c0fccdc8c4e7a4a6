"""A driver that names an sm_90, and launches that stop once the kernel is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from adaptconv.backends.triton.compiler_process import Driver, Target


@dataclass(slots=True)
class Seen:
    """What was compiled for the calls of a test."""

    kernels: list[Any] = field(default_factory=list)


@contextmanager
def driver(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Have Triton compile for a card that is not here, and note what it would launch."""
    import triton
    from triton.runtime.jit import JITFunction

    seen = Seen()
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        seen.kernels.append(kernel)
        return kernel

    active = triton.runtime.driver
    before = active._active
    active.set_active(Driver(Target("cuda", 90, 32)))
    patch.setattr(JITFunction, "run", run)
    yield seen
    active._active = before
