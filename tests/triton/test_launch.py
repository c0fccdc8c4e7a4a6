"""The launch code with Triton's real specialisation and compiler, for a GPU that is not here: nothing is launched.

A stub driver says which GPU there is. What a host wrapper passes then decides, as on the card, what is compiled:
whether channels and strides are known to be multiples of 16 bytes, which integers are 1, which constants a kernel gets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from adaptconv.backends import backend_named
from adaptconv.backends.triton import op
from adaptconv.problem import Direction
from benchmarks.kernels import read_nvidia
from tests.cases import Case, case
from tests.triton.harness import INTERPRETED, operands

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="needs the compiler and no driver")

CASES = {
    "sparse": (
        case("even", "3x3d2x2", (19, 18), channels=(64, 128), pad=2, bias=True),
        case("odd", "3x3", (9, 8), channels=(33, 50), pad=1, bias=True),
        case("strided", "3x3", (12, 11), channels=(32, 64), stride=2, pad=1),
        case("groups", "3x3d2x2", (12, 11), channels=(64, 64), groups=2, pad=2),
        case("line", "3d4", (64,), channels=(32, 64), pad=4),
        case("volume", "3x3x3d2x2x2", (7, 8, 9), channels=(32, 32), pad=2),
    ),
    "depthwise": (
        case("even", "7x7d3x3", (24, 24), channels=(64, 64), groups=64, pad=9, bias=True),
        case("odd", "101/111/010", (9, 11), channels=(5, 5), groups=5, pad=1),
        case("strided", "5x5", (12, 11), channels=(16, 16), groups=16, stride=2, pad=2),
        case("line", "101010101111101010101", (64,), channels=(32, 32), groups=32, pad=10),
        case("volume", "5x5x5", (9, 8, 10), channels=(16, 16), groups=16, pad=2),
    ),
    "banded": (
        case("even", "17x17", (28, 28), channels=(16, 16), groups=16, pad=8, bias=True),
        case("odd", "11x13", (15, 17), channels=(3, 3), groups=3, pad=(5, 6)),
        case("tall", "51x5", (56, 56), channels=(4, 4), groups=4, pad=(25, 2)),
        case("line", "31", (128,), channels=(8, 8), groups=8, pad=15),
    ),
}  # fmt: skip
EVERY = [(name, each) for name, cases in CASES.items() for each in cases]


@dataclass(slots=True)
class Seen:
    """What was compiled for the calls of a test."""

    kernels: list[Any] = field(default_factory=list)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """A driver that names an sm_90, and launches that stop once the kernel is compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime.jit import JITFunction

    class Stub(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int | None = None) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

    seen = Seen()
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        seen.kernels.append(kernel)
        return kernel

    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Stub())
    monkeypatch.setattr(JITFunction, "run", run)
    yield seen
    driver._active = before


@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize(("name", "each"), EVERY, ids=[f"{name}-{each.name}" for name, each in EVERY])
def test_the_host_code_compiles_what_it_would_launch(name: str, each: Case, direction: Direction, card: Seen) -> None:
    backend = backend_named(name)
    for layout in ("contiguous", "channels_last") if len(each.spatial) > 1 else ("contiguous",):
        problem = each.problem(direction, torch.bfloat16, layout)
        if backend.unsuited(problem):  # type: ignore[attr-defined]
            continue
        a, b, bias = operands(problem)
        result = op.compute_of(name)(problem, backend.space(problem).default, a, b, bias)
        assert result.dtype is torch.bfloat16
    assert card.kernels, "nothing was launched"
    for kernel in card.kernels:
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= 227 * 1024
        assert read_nvidia(kernel.asm["cubin"])["spills"] == 0
