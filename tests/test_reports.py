"""Reports and explanations: pure functions of plans and records."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import adaptconv
from adaptconv import records
from adaptconv.problem import Device, Direction, Problem
from adaptconv.records import Record, Rival
from adaptconv.reports import NothingToReport
from adaptconv.taps import TapPattern

PATTERN = "101010101111101010101"


def _layer():
    return adaptconv.AdaptiveConv1d(8, 8, taps=PATTERN, padding="same", groups=8)


def _remember(problem, choice="gather", gain=4.0):
    """Put a record of this problem in the database: that backend, so many times faster than native."""
    from adaptconv.backends import backend_named

    backend = backend_named(choice)
    cpu = torch.device("cpu")
    record = Record(
        problem.key(), backend.name, backend.version, dict(backend.space(problem).default), 100.0, 110.0, 130.0,
        100.0 * gain, 1e-7, 1e-7, records.toolchain(cpu), "2026-01-31", (Rival("dense@1{}", 250.0),),
    )  # fmt: skip
    records.default_store().write(record)


def test_a_layer_that_ran_has_a_row_a_direction():
    net = nn.Sequential(_layer(), nn.ReLU(), _layer())
    net(torch.randn(2, 8, 64, requires_grad=True))
    made = adaptconv.report(net)
    assert [(row.where, row.direction) for row in made.rows] == [
        (name, str(direction)) for name in ("0", "2") for direction in Direction
    ]
    assert all(row.kind == "layer" and row.decided_by == "cost" for row in made.rows)
    assert "adaptconv.tune" in made.summary


def test_a_record_shows_as_time_native_and_gain():
    net, x = nn.Sequential(_layer(), _layer()), torch.randn(2, 8, 64)
    with torch.no_grad():
        net(x)
        _remember(net[0].plans.forward.problem)
        net(x)  # the database changed, so the next call plans anew
    made = adaptconv.report(net)
    assert [(row.backend, row.decided_by, row.time_us, row.native_us, row.gain) for row in made.rows] == [
        ("gather", "record", 100.0, 400.0, 4.0)
    ] * 2
    text = str(made)
    assert "4.00x" in text
    assert "0 (+1)" in text  # the two layers are one problem: one line
    assert "forward: 0.8 -> 0.2 ms measured (4.00x)" in made.summary


def test_markdown_and_json_carry_every_row_and_the_machine():
    layer = _layer()
    layer(torch.randn(2, 8, 64))
    made = adaptconv.report(layer)
    assert made.to_markdown().count("\n|") == len(made.rows) + 2  # the header and its rule
    read = json.loads(made.to_json())
    assert len(read["rows"]) == len(made.rows)
    assert read["machine"] == str(Device.of(torch.device("cpu")))
    assert read["toolchain"]["torch"] == torch.__version__


def test_a_dry_run_compiles_nothing_and_says_what_would_happen(monkeypatch):
    monkeypatch.setattr(torch._inductor, "compile", lambda *a, **k: pytest.fail("a dry run compiled"))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8))
    made = adaptconv.report(net, torch.randn(1, 3, 16, 16), train=True)
    assert {(row.where, row.direction) for row in made.rows} == {
        ("0", "forward"), ("0", "grad_weight"), ("1", "forward"), ("1", "grad_input"), ("1", "grad_weight"),
    }  # fmt: skip


def test_a_model_without_convolutions_gets_a_plain_sentence():
    made = adaptconv.report(nn.Linear(4, 4), torch.randn(2, 4))
    assert made.rows == ()
    assert "no convolutions were found" in str(made)
    assert "calls no convolution" in adaptconv.explain(nn.Linear(4, 4), torch.randn(2, 4))
    assert "not optimized" in str(adaptconv.report(nn.Linear(4, 4)))


@pytest.mark.parametrize("what", [3, "model", None])
def test_what_is_no_model_is_refused(what):
    with pytest.raises(NothingToReport, match=type(what).__name__):
        adaptconv.report(what)
    with pytest.raises(NothingToReport, match=type(what).__name__):
        adaptconv.explain(what)
    with pytest.raises(NothingToReport, match="inputs"):
        adaptconv.explain(nn.Conv1d(1, 1, 1))


def _problem(taps=PATTERN, **changed):
    given = {
        "direction": Direction.FORWARD, "batch": 2, "c_in": 8, "c_out": 8, "groups": 8, "spatial": (64,),
        "taps": TapPattern.parse(taps), "stride": (1,), "padding": ((10, 10),), "dtype": "float32",
        "layout": "contiguous", "device": Device.of(torch.device("cpu")),
    }  # fmt: skip
    return Problem(**{**given, **changed})


def test_an_explanation_names_every_backend_and_its_answer():
    text = adaptconv.explain(_problem())
    for name in adaptconv.backends():
        assert name in text
    assert "not one regular grid" in text  # why native declined
    assert "source: cost" in text


def test_an_explanation_shows_what_was_measured():
    problem = _problem()
    _remember(problem)
    text = adaptconv.explain(problem)
    assert "source: record" in text
    assert "override database, measured 2026-01-31" in text
    assert "rival dense@1{}: 250 us" in text


def test_a_near_problem_borrows_the_plan_and_says_from_where():
    _remember(_problem(batch=3))
    plan = adaptconv.dispatch.plan(_problem())
    assert (plan.choice.backend, str(plan.source)) == ("gather", "nearest")
    assert "distance" in plan.why
    far = adaptconv.dispatch.plan(_problem(batch=2000, spatial=(9000,)))
    assert str(far.source) == "cost"
