"""Ways to write a convolution: each is found for what it is, and every answer stays torch's."""

from __future__ import annotations

import pytest

from tests.patterns import PATTERNS, Pattern
from tests.patterns.columns import COLUMNS, compiled

COMPILED = (
    "sum of an island and wings", "unfold and matmul with bias", "holes by kron untrimmed", "interpolated twice",
)  # fmt: skip


EVERY = ("recognised", "gradients", "dynamic shapes")  # of every pattern; of the others one each, in turn
OTHERS = [column for column in COLUMNS if column not in EVERY]
CELLS = [
    pytest.param(pattern, column, id=f"{pattern.name.replace(' ', '-')}-{column}")
    for i, pattern in enumerate(PATTERNS)
    for column in (*EVERY, OTHERS[i % len(OTHERS)])
]


@pytest.mark.parametrize(("pattern", "column"), CELLS)
def test_a_pattern_is_found_and_stays_right(pattern: Pattern, column: str) -> None:
    """``python -m benchmarks.patterns`` prints the whole table."""
    assert not COLUMNS[column](pattern)


@pytest.mark.parametrize("name", COMPILED)
def test_a_pattern_stays_right_through_inductor(name: str) -> None:
    (pattern,) = (known for known in PATTERNS if known.name == name)
    assert not compiled(pattern)
