"""That the watch over memory sees what it is there for."""

from __future__ import annotations

import pytest
import torch

from tests.triton.harness import INTERPRETED
from tests.triton.memory import watched

tl = pytest.importorskip("triton.language")
import triton  # noqa: E402

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="watches the interpreter")


@triton.jit
def copy(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count, other=0.0), mask=at < count)


@triton.jit
def pile(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    at = tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at))


def test_a_sound_kernel_has_no_faults() -> None:
    x, y = torch.ones(100), torch.ones(100)
    with pytest.MonkeyPatch.context() as patch, watched(patch) as found:
        copy[(2,)](x, y, 100, BLOCK=64)
    assert found == []


def test_reading_and_writing_past_the_end_is_seen() -> None:
    x, y = torch.ones(100), torch.ones(130)
    with pytest.MonkeyPatch.context() as patch, watched(patch) as found:
        copy[(2,)](x, y, 102, BLOCK=64)  # the allocator rounds up: nothing crashes
    assert [fault.split(":")[1].strip()[:29] for fault in found] == ["read of 2 elements out of bou"]


def test_two_programs_at_one_element_are_seen() -> None:
    x, y = torch.ones(64), torch.ones(64)
    with pytest.MonkeyPatch.context() as patch, watched(patch) as found:
        pile[(2,)](x, y, BLOCK=64)
    assert found == ["pile: write of 64 elements that another program of the launch wrote"]
