"""What only looks like a site is left alone, and every answer, gradient and side effect stays torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.compared import answer, built, difference, optimized
from tests.lookalikes import LOOKALIKES, Lookalike
from tests.lookalikes.verdict import verdict
from tests.patterns import PATTERNS

COMPILED = (
    "input changed after the convolution", "leaf changed after its use", "one output changed in place",
)  # fmt: skip


@pytest.mark.parametrize("lookalike", LOOKALIKES, ids=lambda lookalike: lookalike.name.replace(" ", "-"))
def test_what_only_looks_alike_is_left_alone(lookalike: Lookalike) -> None:
    assert not verdict(lookalike)


@pytest.mark.parametrize("name", COMPILED)
def test_what_only_looks_alike_stays_right_through_inductor(name: str) -> None:
    (lookalike,) = (known for known in LOOKALIKES if known.name == name)
    xs, model = lookalike.inputs(), built(lookalike.make)
    right = answer(model, model, xs, train=lookalike.train)
    given, _, _ = optimized(lookalike.make, xs, "gather", train=lookalike.train)
    assert not difference(given, right, strict=False)


@pytest.mark.parametrize(
    ("seems", "name"),
    [
        ("holes", "holes by slices"),
        ("padding", "padded with zeros"),
        ("sum", "sum of two"),
        ("unfold", "unfold and product"),
    ],
)
def test_the_real_thing_would_be_noticed(seems: str, name: str) -> None:
    """A site of each kind, given out for a look-alike of it, is one that was touched."""
    (real,) = (pattern for pattern in PATTERNS if pattern.name == name)
    pretended = replace(LOOKALIKES[0], name=name, make=real.make, seems=seems, shape=real.shapes[0], train=True)
    assert f"taken for {seems}" in verdict(pretended)


def test_every_kind_of_site_has_its_lookalikes() -> None:
    counts = {
        seems: sum(known.seems == seems for known in LOOKALIKES) for seems in ("holes", "padding", "sum", "unfold")
    }
    assert min(counts.values()) >= 10
    assert sum(counts.values()) >= 100
