"""The GPU campaign, tried out on a CPU: what it checks, writes and takes up again."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptconv.problem import Device, Direction
from benchmarks.gpu import __main__ as campaign
from benchmarks.gpu import checks, clock, predicted, rows, supervisor
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
    assert len(_checks(spread=True)) >= len(found), "each knob's other values"


def test_a_wrong_result_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptconv.backends.gather import Gather

    prepared = Gather.prepared
    monkeypatch.setattr(Gather, "prepared", lambda *each: lambda *operands: prepared(*each)(*operands) * 1.01)
    (check,) = _checks(backends=[Gather()], spread=False)
    assert check.wrong
    assert "error" in check.reason
    assert "1 wrong" in checks.summary([asdict(check)])


def test_suite_layers_are_checked_in_the_forms_that_full_size_takes() -> None:
    layers = [layer for layer in SUITES["gpu"] if layer.name == "dense-k17"]
    found = list(checks.suite_problems(layers, CPU))
    assert {(p.layout, p.direction) for _, p in found} >= {("contiguous", d) for d in Direction}
    assert all(1 < p.batch < layers[0].batch and p.c_in == layers[0].c_in for _, p in found)


def test_a_row_compares_both_sides_and_its_table_says_so() -> None:
    layer = next(layer for layer in SUITES["quick"] if layer.name == "mamba-k4")
    limits = {dtype: {"copy_gb_s": 10.0, "gemm_gflop_s": 50.0} for dtype in ("float32", "bfloat16")}
    found: list[dict[str, Any]] = []
    written: list[int] = []
    settings: dict[str, Any] = {
        "level": "eager", "seconds": 0.05, "rows": found, "write": lambda: written.append(len(found)),
        "alive": lambda: None,
    }  # fmt: skip
    rows.run([layer], [Direction.FORWARD], CPU, limits, deadline=float("inf"), skip={}, **settings)
    (row,) = found
    assert written == [1]
    assert row["best_rival"].startswith("eager")
    assert row["best_ours"].startswith("dispatch")
    assert row["ratio"] == pytest.approx(row["cold_us"][row["best_rival"]] / row["cold_us"][row["best_ours"]])
    assert not row["wrong"]
    assert "mamba-k4" in rows.table(found)
    assert "mamba-k4" in rows.brief(found)
    rows.run([layer], [Direction.FORWARD], CPU, limits, deadline=float("inf"), skip={}, **settings)
    assert written == [1], "what an earlier run has is not timed again"
    found[0]["plans"] = {"contiguous": "gather@1{workspace_mib=32} (fallback)"}
    rows.run([layer], [Direction.FORWARD], CPU, limits, deadline=float("inf"), skip={}, **settings)
    assert written == [1, 1], "unless dispatch would run something else now"
    rows.run([layer], [Direction.GRAD_INPUT], CPU, limits, deadline=0.0, skip={}, **settings)
    key = (layer.name, layer.dtype, "grad_input")
    rows.run([layer], [Direction.GRAD_INPUT], CPU, limits, deadline=float("inf"), skip={key: "died"}, **settings)
    assert len(found) == 1, "out of time nothing is begun, and what ended a process is left out"


def test_a_campaign_is_taken_up_where_it_stopped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    settings = [
        "--device", "cpu", "--minutes", "0.8", "--suite", "quick", "--only", "mamba-k4", "--directions", "forward",
        "--seconds", "0.05", "--steps", "tune", "time",
    ]  # fmt: skip
    assert campaign.main(["--out", str(first), *settings]) == 0
    slug = Device.of(CPU).slug
    assert {path.name for path in first.iterdir()} == {"rows.json", f"{slug}.json", "tables.txt"}
    content = json.loads((first / "rows.json").read_text())
    assert content["machine"]["slug"] == slug
    assert "(record)" in str(content["rows"][0]["plans"])
    said = capfd.readouterr().out
    assert "mamba-k4" in said.splitlines()[-1] or "geometric mean" in said
    assert campaign.main(["--out", str(second), "--continue", str(first), *settings]) == 0
    again = json.loads((second / "rows.json").read_text())
    assert again["rows"] == content["rows"], "neither tuned nor timed again"


_FATAL = """
import os, time
from benchmarks.gpu import steps
begin = steps.begin
def fatal(*item):
    begin(*item)
    if item[:5] == ("check", "1d-dilated", "forward", "float32", "contiguous") and item[5].startswith("gather@"):
        {what}
steps.begin = fatal
"""


@pytest.mark.parametrize("what", ["os.abort()", "time.sleep(1000)"], ids=["killed", "hung"])
def test_what_ends_the_worker_costs_itself_alone(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A GPU's illegal access ends every later call of its process; a kernel may also never end."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(_FATAL.format(what=what))
    monkeypatch.syspath_prepend(str(hook))
    monkeypatch.setattr(supervisor, "_SILENT_S", 15.0 if "sleep" in what else 60.0)  # a busy machine is silent at times
    out = tmp_path / "out"
    settings = ["--device", "cpu", "--minutes", "1.5", "--suite", "quick", "--only", "mamba-k4", "--steps", "check"]
    assert campaign.main(["--out", str(out), *settings]) == 1
    rows = json.loads((out / "checks.json").read_text())["rows"]
    wrong = {(row["case"], row["choice"].partition("@")[0]) for row in rows if row["wrong"]}
    assert wrong == {("1d-dilated", "gather")}, "what it was at, and nothing else"
    assert len({row["case"] for row in rows}) > 20, "the others were checked"
    said = capfd.readouterr().out
    assert "CRASH" in said.splitlines()[-1] or "CRASH" in said
    assert len(json.loads((out / "crashes.json").read_text())["rows"]) == 1


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


def test_each_call_of_a_graph_has_operands_of_its_own() -> None:
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    call = partial(torch.nn.functional.conv2d, x, torch.randn(8, 8, 3, 3), None)
    copies = clock._copies(call, 5)
    kept = [copy.args[0] for copy in copies]  # type: ignore[attr-defined]
    assert len({t.data_ptr() for t in (x, *kept)}) == 6
    assert all(t.stride() == x.stride() and torch.equal(t, x) for t in kept)
    assert all(torch.equal(copy(), call()) for copy in copies)
    plain = lambda: None  # noqa: E731
    assert clock._copies(plain, 3) == [plain] * 3
