"""Everything in this folder is of the Triton kernels; where they are interpreted, what they do to memory is watched."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from adaptconv.backends.triton import op
from tests.triton.harness import INTERPRETED, cudnn_flags
from tests.triton.memory import Poisoned, watched


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark it so."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.triton)


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """On a GPU torch allows tf32 by default; results here are held against float64."""
    with cudnn_flags(allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def sound_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """No interpreted kernel reads out of bounds, what nothing wrote, or what another program of its launch writes."""
    if not INTERPRETED or request.path.name == "test_memory.py":  # there the watch itself is tested
        yield
        return
    compute_of = op.compute_of

    @cache
    def poisoned(backend: str) -> op.Compute:
        compute = compute_of.__wrapped__(backend)

        def run(*args: Any) -> Tensor:
            with Poisoned():
                return compute(*args)

        return run

    with pytest.MonkeyPatch.context() as patch:  # one of its own: what a test patches is undone before
        patch.setattr(op, "compute_of", poisoned)
        with watched(patch) as faults:
            yield
    assert not faults, f"{len(faults)} accesses, the first: {faults[0]}"
