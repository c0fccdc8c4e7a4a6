"""Whole models beside plain torch.compile: as many graphs, no recompilation of ours, equal code where all is native."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import adaptconv
import benchmarks.compiled.__main__ as command
from adaptconv.compile.rewrite import rewrite
from adaptconv.problem import Direction
from adaptconv.records import use_database
from benchmarks.compiled import rows
from benchmarks.compiled.check import results_of
from benchmarks.compiled.forced import native_ways, other_ways, problems_of, write_database
from benchmarks.compiled.models import MODELS
from benchmarks.compiled.overhead import difference, generated_code
from benchmarks.models import DualContext, LargeKernelAttention, SeparationBlock, WingedBlock

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


class Broken(nn.Module):
    """A partially dilated block and a dilated one on either side of a graph break, and a branch on the length."""

    def __init__(self) -> None:
        super().__init__()
        self.winged = WingedBlock(4)
        self.separate = SeparationBlock(4, 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.winged(x)
        torch._dynamo.graph_break()
        return self.separate(y) if x.shape[-1] > 40 else -self.separate(y)


class Dual(nn.Module):
    """A sum of convolutions that is one convolution on no regular grid."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv1d(4, 4, 3, padding=1)
        self.far = nn.Conv1d(4, 4, 3, padding=3, dilation=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.near(x) + self.far(x)


class Everyday(nn.Module):
    """Convolutions as most models have them, whose plans are torch's own when nothing was measured."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.mix = nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.relu(self.stem(x)))


PICTURES = ((1, 3, 24, 24), (1, 3, 16, 28), (1, 3, 32, 20), (1, 3, 20, 32), (1, 3, 28, 16))
RECORDINGS = ((2, 4, 32), (2, 4, 37), (2, 4, 30), (2, 4, 50), (2, 4, 64))
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "pictures": (lambda: nn.Sequential(DualContext(3, 4, 2), LargeKernelAttention(4)), PICTURES),
    "recordings, with a graph break": (Broken, RECORDINGS),
}


def _made(name: str) -> tuple[nn.Module, list[Tensor]]:
    make, shapes = CASES[name]
    torch.manual_seed(0)
    return make().double().train(), [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def _rewritten(done: list[bool]) -> Backend:
    """The rewriting, and then all of the tracing that Inductor would be given; Inductor itself takes seconds."""

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        done.extend(report.rewritten for report in rewrite(gm))
        compiled: Callable[..., Any] = aot_eager(gm, inputs)
        return compiled

    return backend


def _graphs(module: nn.Module, backend: Backend, inputs: Sequence[Tensor]) -> tuple[list[int], int]:
    """Graphs after each size and graph breaks of a training step, whose results must be plain torch's."""
    torch._dynamo.reset()
    counters.clear()
    call, graphs = torch.compile(module, backend=backend), []
    for x in inputs:
        ours = results_of(call, module, x, train=True)
        graphs.append(counters["stats"]["unique_graphs"])
        for got, wanted in zip(ours, results_of(module, module, x, train=True), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-10)
    return graphs, sum(counters["graph_break"].values())


@pytest.mark.parametrize("name", CASES)
def test_five_sizes_make_as_many_graphs_as_without_us(name: str, tmp_path: Path) -> None:
    module, inputs = _made(name)
    plain = _graphs(module, aot_eager, inputs)
    assert plain[0][-1] >= 2
    assert _graphs(module, _rewritten([]), inputs) == plain
    write_database(tmp_path, problems_of(module, inputs), other_ways())
    use_database(tmp_path)
    done: list[bool] = []
    assert _graphs(module, _rewritten(done), inputs) == plain
    assert done and all(done)  # no convolution was left as it was


def test_forcing_names_another_way_for_every_problem_and_native_for_none() -> None:
    module, inputs = _made("pictures")
    problems = problems_of(module, inputs[:1])
    assert {p.direction for p in problems} == set(Direction)
    choose = other_ways()
    assert all(choose(problem).backend != "native" for problem in problems)
    own = {native_ways(problem).backend for problem in problems}
    assert own == {"native", "dual"}  # the sum is two grids


# ---- generated code -----------------------------------------------------------------------------


def _code(call: Any, module: nn.Module, x: Tensor, *, train: bool = True) -> list[str]:
    torch._dynamo.reset()
    with generated_code() as codes:
        results_of(call, module, x, train=train)
    return codes


@pytest.mark.parametrize("dynamic", [False, True])
def test_where_every_plan_is_native_inductor_generates_the_same_code(dynamic: bool) -> None:
    torch.manual_seed(0)
    module, x = Everyday(), torch.randn(2, 3, 16, 24)
    plain = _code(torch.compile(module, dynamic=dynamic), module, x)
    assert len(plain) == 2 and "convolution" in plain[0]
    fast = adaptconv.optimize(module, dynamic=dynamic)  # an empty database predicts native here
    assert difference(plain, _code(fast, module, x)) == ""
    assert adaptconv.report(fast).rows and not any(row.rewritten for row in adaptconv.report(fast).rows)


def test_pinned_native_generates_the_same_code_and_another_backend_does_not() -> None:
    torch.manual_seed(0)
    module, x = Dual(), torch.randn(2, 4, 32)
    plain = _code(torch.compile(module), module, x, train=False)
    with adaptconv.pinned("native"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="adaptconv left")  # native takes no union of taps: it is left alone
        assert difference(plain, _code(adaptconv.optimize(module), module, x, train=False)) == ""
    with adaptconv.pinned("gather"):
        assert difference(plain, _code(adaptconv.optimize(module), module, x, train=False))


def test_code_differs_by_lines_and_not_by_comments() -> None:
    assert difference(["# one\nx = 1\n"], ["# two\n\nx = 1\n"]) == ""
    assert "+x = 2" in difference(["x = 1\n"], ["x = 2\n"])
    assert "1 graphs" in difference(["x = 1"], ["x = 1", "y = 2"])


# ---- the command --------------------------------------------------------------------------------


def _size(graphs: int = 1, **changed: float) -> dict[str, Any]:
    errors = {"output": 1e-6, "gradients": 1e-6, "parameter": 1e-6, "error": 1e-6}
    return {"shape": [1, 3], "graphs": graphs, "eager_error": 1e-6, "conditioning": 1e-6, **errors, **changed}


def _row() -> rows.Row:
    def part() -> dict[str, Any]:
        return {
            "wall_s": 10.0, "rewrite_s": 0.1, "breaks": 0, "sites": 3, "rewritten": 1, "sizes": [_size(1), _size(2)],
        }  # fmt: skip

    row: rows.Row = {"model": "m", "what": "check", "failed": {}}
    for variant in ("compile", "optimize"):
        row[variant] = {"forward": part(), "training": part()}
    row["forced"] = {"training": part(), "double": {"errors": [1e-14]}}
    row["times"] = [rows.times_of(row)]
    return row


def test_a_model_that_keeps_every_promise_has_no_fault() -> None:
    row = _row()
    assert rows.faults(row) == []
    lines = rows.table([row]).splitlines()
    assert len({line.count("|") for line in lines}) == 1  # as many cells as headings
    assert "1 of 3" in rows.table([row]) and "10.0 -> 10.0 s" in rows.table([row])


@pytest.mark.parametrize(
    ("variant", "what", "change", "says"),
    [
        ("optimize", "training", {"sizes": [_size(1), _size(3)]}, "graphs after each size [1, 3]"),
        ("forced", "training", {"sizes": [_size(1), _size(2, error=3e-6)]}, "error 3.0e-06"),
        ("optimize", "forward", {"sizes": [_size(1, error=math.inf), _size(2)]}, "error inf"),
        ("optimize", "forward", {"breaks": 1}, "1 graph breaks"),
    ],
)
def test_a_promise_that_is_not_kept_is_a_fault(variant: str, what: str, change: dict[str, Any], says: str) -> None:
    row = _row()
    row[variant][what] |= change
    (fault,) = rows.faults(row)
    assert says in fault


def test_what_failed_and_what_is_wrong_in_double_are_faults() -> None:
    row = _row()
    row["forced"]["double"] = {"errors": [1e-14, 1e-6]}
    row["failed"] = {"compile": "RuntimeError: no"}
    assert [fault.split(":")[0] for fault in rows.faults(row)] == ["compile failed", "forced, in float64"]


def test_compile_times_are_the_fastest_of_each_side() -> None:
    row = _row()
    row["times"][0]["optimize"]["training"] = 14.0
    assert rows.slow(row) == ["training: 14.0 s against torch.compile's 10.0 s"]
    row["times"].append(
        {"compile": {"forward": 20.0, "training": 20.0}, "optimize": {"forward": 20.0, "training": 12.9}}
    )
    assert rows.slow(row) == [] and rows.fastest(row, "compile", "training") == 10.0


def test_an_overhead_is_a_fault_over_one_percent_or_with_other_code() -> None:
    part = {"again": "", "pinned": "", "records": "", "times_us": {"plain": 100.0, "again": 99.0, "records": 100.9}}
    row: rows.Row = {"model": "m", "what": "overhead", "failed": {}, "overhead": {"forward": part}}
    assert rows.overhead_faults(row) == []
    assert "1.0090x" in rows.table([row])
    part["times_us"] = {"plain": 100.0, "again": 102.0, "records": 103.0}  # a machine too busy to tell
    assert rows.overhead_faults(row) == []
    part["records"], part["times_us"] = "+x", {"plain": 100.0, "again": 99.0, "records": 101.1}
    assert len(rows.overhead_faults(row)) == 2 and "DIFFERS" in rows.table([row])


def test_the_command_goes_on_where_it_was_and_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str, float]] = []

    def answer(row: rows.Row, key: str, task: str, number: float) -> None:
        asked.append((row["model"], task, number))
        row[key] = _row()[task]
        if row["model"] == "denoiser" and task == "optimize":
            row[key]["training"]["wall_s"] = 99.0

    monkeypatch.setattr(command, "_child", answer)
    monkeypatch.setattr(command, "machine_facts", lambda device: {"device": "a", "toolchain": {}, "adaptconv": "0"})
    out = tmp_path / "compiled.json"
    assert command.main(["--only", "segmenter", "--out", str(out)]) == 0
    assert asked == [("segmenter", "compile", 5), ("segmenter", "optimize", 5), ("segmenter", "forced", 5)]
    asked.clear()
    assert command.main(["--only", "segmenter", "denoiser", "--sizes", "2", "--out", str(out), "--resume"]) == 1
    assert [task for _, task, _ in asked[:3]] == ["compile", "optimize", "forced"]
    assert [task for _, task, _ in asked[3:]] == ["optimize", "compile", "compile", "optimize"]  # in turn
    assert {number for _, _, number in asked[3:]} == {1}
    assert [row["model"] for row in json.loads(out.read_text())["rows"]] == ["segmenter", "denoiser"]
    assert "WRONG: denoiser: compiling training: 99.0 s" in capsys.readouterr().out


def test_every_model_has_five_sizes_of_one_rank() -> None:
    assert sum(model.network.needs == "transformers" for model in MODELS.values()) >= 6
    for model in MODELS.values():
        for shapes in (model.shapes(train=False), model.shapes(train=True)):
            assert len(set(shapes)) == 5
            assert len({(len(shape), shape[1:2] if len(shape) > 3 else ()) for shape in shapes}) == 1
            assert torch.equal(model.input_of(shapes[1]), model.input_of(shapes[1]))
