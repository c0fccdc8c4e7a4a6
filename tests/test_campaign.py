"""The GPU campaign, tried out on a CPU: what it checks, writes and takes up again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptconv.problem import Device, Direction
from benchmarks.gpu import __main__ as campaign
from benchmarks.gpu import checks, predicted, rows
from benchmarks.suites import SUITES
from tests.cases import case

CPU = torch.device("cpu")
SMALL = case("small", "5x5", (9, 8), channels=(4, 4), groups=4, pad=2)


def _checks(**changes: Any) -> list[checks.Check]:
    problem = SMALL.problem(Direction.FORWARD, torch.float32)
    found = checks.of_problem("small", problem, changes.pop("backends", checks.BACKENDS), CPU, set(), **changes)
    return list(found)


def test_every_backend_is_checked_against_float64() -> None:
    found = _checks(spread=False)
    assert {check.choice.partition("@")[0] for check in found} >= {"native", "dense", "gather"}
    assert all(not check.wrong and 0 <= check.error <= check.allowed for check in found)
    assert len(_checks(spread=True)) > len(found), "each knob's other values"


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptconv.backends.gather import Gather

    run = Gather.run
    monkeypatch.setattr(Gather, "run", lambda *args, **named: run(*args, **named) * 1.01)
    (check,) = _checks(backends=[Gather()], spread=False)
    assert check.wrong
    assert "error" in check.reason
    assert "1 wrong" in checks.summary([asdict(check)])


def test_a_row_compares_both_sides_and_its_table_says_so() -> None:
    layer = next(layer for layer in SUITES["quick"] if layer.name == "mamba-k4")
    limits = {"copy_gb_s": 10.0, "gemm_gflop_s": 50.0}
    written: list[list[dict[str, Any]]] = []
    settings: dict[str, Any] = {"level": "eager", "seconds": 0.05, "write": lambda found: written.append(list(found))}
    found = rows.run([layer], [Direction.FORWARD], CPU, limits, deadline=float("inf"), old=[], **settings)
    (row,) = found
    assert written == [found]
    assert row["best_rival"].startswith("eager")
    assert row["best_ours"].startswith("dispatch")
    assert row["ratio"] == pytest.approx(row["cold_us"][row["best_rival"]] / row["cold_us"][row["best_ours"]])
    assert not row["wrong"]
    assert "mamba-k4" in rows.table(found)
    again = rows.run([layer], [Direction.FORWARD], CPU, limits, deadline=float("inf"), old=found, **settings)
    assert again == found, "what an earlier run has is not timed again"
    late = rows.run([layer], [Direction.GRAD_INPUT], CPU, limits, deadline=0.0, old=found, **settings)
    assert late == found, "out of time, nothing is begun"


def test_a_campaign_is_taken_up_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    settings = [
        "--device", "cpu", "--minutes", "0.5", "--suite", "quick", "--only", "mamba-k4", "--directions", "forward",
        "--seconds", "0.05", "--steps", "tune", "time",
    ]  # fmt: skip
    assert campaign.main(["--out", str(first), *settings]) == 0
    slug = Device.of(CPU).slug
    assert {path.name for path in first.iterdir()} == {"rows.json", f"{slug}.json"}
    content = json.loads((first / "rows.json").read_text())
    assert content["machine"]["slug"] == slug
    assert campaign.main(["--out", str(second), "--continue", str(first), *settings]) == 0
    assert "already known" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        campaign.main(["--out", str(tmp_path)])
    assert "--device cpu tries the command out" in capsys.readouterr().err


def test_predictions_cover_the_suite_and_stay_above_the_limits() -> None:
    layers = SUITES["gpu"]
    found = predicted.rows(Device("cuda", "NVIDIA H200", 0), layers)
    assert len(found) == 3 * len(layers)
    kernels = [(row, row[name]) for row in found for name in ("sparse", "depthwise", "banded") if row[name]]
    assert len(kernels) > len(layers)
    for row, kernel in kernels:
        assert kernel["us"] > 0.9 * row["traffic_us"], (row["layer"], row["direction"])
    assert "deeplabv3-aspp-d18" in predicted.table(found)
