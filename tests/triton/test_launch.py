"""The launch code with Triton's real specialisation and compiler, for a GPU that is not here: nothing is launched.

A stub driver says which GPU there is. What a host wrapper passes then decides, as on the card, what is compiled:
whether channels and strides are known to be multiples of 16 bytes, which integers are 1, which constants a kernel gets.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from adaptconv.backends import backend_named
from adaptconv.backends.triton import op
from adaptconv.problem import Direction
from benchmarks.kernels import read_nvidia
from tests.cases import Case, case
from tests.triton.harness import INTERPRETED, operands
from tests.triton.stub import Seen, driver

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
        case("dilated", "7x7d3x3", (28, 28), channels=(16, 16), groups=16, pad=9, bias=True),
        case("line", "31", (128,), channels=(8, 8), groups=8, pad=15),
    ),
}  # fmt: skip
EVERY = [(name, each) for name, cases in CASES.items() for each in cases]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    with driver(monkeypatch) as seen:
        yield seen


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
