"""The layer benchmark: its rivals compute the layer, its limits are right, and its files keep what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import benchmarks.run as run
from adaptconv import dispatch
from adaptconv.backends import Choice, backend_named
from adaptconv.dispatch import Source
from adaptconv.measure import Timing
from adaptconv.problem import Direction
from adaptconv.reference import reference, relative_error
from adaptconv.taps import TapPattern
from adaptconv.tuner import tune_problems
from adaptconv.tuner.entrants import contenders
from benchmarks import limits, nearby, regret
from benchmarks.facts import merged, read_rows, write_results
from benchmarks.layers import rows, summary
from benchmarks.layers.by_hand import ways_of
from benchmarks.layers.exhaustive import searched
from benchmarks.layers.tensors import Truth, layouts_of, tensors_of
from benchmarks.layers.variants import OURS, NotCompiled, Variant, fresh, variants_of
from benchmarks.suites import MUST_SHOW, SUITES, Layer

CPU = torch.device("cpu")
LIMITS = {"copy_gb_s": 20.0, "gemm_gflop_s": 100.0}
WINGS = str(TapPattern.partial(island=5, wing=2, dilation=3))
SPREAD = str(TapPattern.grid((3, 3), 2).spread_by(((0.5, 1, 0.5), (0.5, 1, 0.5))))


def _layer(
    name: str, channels: tuple[int, int, int], spatial: tuple[int, ...], taps: str, padding: Any = None, **more: Any
) -> Layer:
    ins, outs, groups = channels
    stride = more.pop("stride", (1,) * len(spatial))
    sides = tuple((w // 2, (w - 1) // 2) for w in TapPattern.parse(taps).window) if padding is None else padding
    return Layer(
        name, "a test", 2, ins, outs, groups, spatial, taps, stride, sides, more.pop("dtype", "float32"), **more
    )


LAYERS = (
    _layer("depthwise", (6, 6, 6), (9, 8), "3x3d2x2"),
    _layer("causal", (4, 6, 1), (17,), "3d2", ((4, 0),)),
    _layer("strided", (4, 6, 2), (9, 10), "3x3", stride=(2, 2)),
    _layer("volume", (3, 2, 1), (5, 6, 7), "3x3x3"),
    _layer("scattered", (4, 4, 4), (8, 9), "10010/00100/01001"),
    _layer("wings", (4, 6, 1), (40,), WINGS),
    _layer("wings, depthwise", (4, 4, 4), (40,), WINGS),
    _layer("footprint", (3, 4, 1), (9, 9), SPREAD),
    _layer("holes", (5, 5, 5), (9, 9), "5x5", holes=7),
)
EVERY = [pytest.param(layer, id=layer.name) for layer in LAYERS]


def _expected(layer: Layer, direction: Direction) -> Tensor:
    problem = layer.problem(direction)
    return reference(problem, *tensors_of(layer, "contiguous", CPU).operands(direction))


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("layer", EVERY)
def test_every_eager_variant_of_either_side_computes_the_layer(layer: Layer, direction: Direction) -> None:
    variants = variants_of(layer, direction, CPU, "eager")
    assert {v.kind for v in variants} == {"eager", "dispatch"}
    assert {v.layout for v in variants} == set(layouts_of(layer)) and len({v.name for v in variants}) == len(variants)
    exact = _expected(layer, direction)
    for variant in variants:
        result = variant.first()
        assert result.shape == exact.shape and relative_error(result, exact) < 1e-6, variant.name
        if direction is not Direction.GRAD_WEIGHT and variant.layout == "channels_last":
            two = torch.channels_last if len(layer.spatial) == 2 else torch.channels_last_3d
            assert result.is_contiguous(memory_format=two), variant.name


def test_taps_that_are_no_grid_are_written_in_every_way() -> None:
    names = {}
    for layer in LAYERS:
        weight = tensors_of(layer, "contiguous", CPU).w
        names[layer.name] = [way.name for way in ways_of(layer.problem(), weight)]
    assert names["depthwise"] == names["holes"] == names["causal"] == ["conv"]
    assert names["scattered"][:2] == names["footprint"] == ["constructed", "dense"]
    assert names["wings"] == names["wings, depthwise"] == ["constructed", "dense", "sum"]
    wings = LAYERS[5]
    kernels = ways_of(wings.problem(Direction.GRAD_INPUT), tensors_of(wings, "contiguous", CPU).w)
    assert [way.name for way in kernels] == ["dense", "sum"]  # backward, the kernel has been constructed


@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[6]], ids=lambda layer: layer.name)
def test_compiled_and_frozen_variants_compute_the_layer(layer: Layer) -> None:
    exact = _expected(layer, Direction.FORWARD)
    with torch.no_grad():
        variants = variants_of(layer, Direction.FORWARD, CPU, "all")
        assert {v.kind for v in variants} == {"eager", "compile", "freezing", *OURS}
        for variant in variants:
            assert relative_error(variant.first(), exact) < 1e-6, variant.name  # first() insists that it compiles
        compiled = counters["stats"]["unique_graphs"]
        for variant in reversed(variants):
            assert relative_error(variant.call(), exact) < 1e-6, variant.name
        assert counters["stats"]["unique_graphs"] == compiled  # each still has its own code, frozen or not


@pytest.mark.parametrize("direction", [Direction.GRAD_INPUT, Direction.GRAD_WEIGHT])
def test_compiled_gradients_are_the_layers(direction: Direction) -> None:
    layer = LAYERS[6]
    with torch.no_grad():
        variants = [v for v in variants_of(layer, direction, CPU, "all") if v.compiles]
        assert [v.name for v in variants] == ["compile contiguous dense", "compile contiguous sum"]
        for variant in variants:
            assert relative_error(variant.first(), _expected(layer, direction)) < 1e-6


def test_freezing_has_the_kernel_as_a_constant() -> None:
    from torch._inductor.utils import run_and_get_code

    layer = LAYERS[4]
    with torch.no_grad():
        frozen = next(v for v in variants_of(layer, Direction.FORWARD, CPU, "all") if v.kind == "freezing")
        _, code = run_and_get_code(frozen.first)
    assert "frozen_param" in code[0]


def test_a_variant_that_was_not_compiled_does_not_pass_for_one() -> None:
    with pytest.raises(NotCompiled, match="compile contiguous conv"):
        Variant("compile", "contiguous", "conv", lambda: torch.ones(1)).first()

    def twice(x: Tensor) -> Tensor:
        return 2 * x

    copy = fresh(twice)
    assert copy.__code__ is not twice.__code__ and copy(3) == 6


def test_a_call_that_never_returns_is_never_made() -> None:
    layer = _layer("thin", (4, 4, 4), (20, 20), "15x15", dtype="bfloat16")
    names = {v.name for v in variants_of(layer, Direction.FORWARD, CPU, "all") if v.kind not in OURS}
    assert names == {"eager contiguous conv"}
    sparse = _layer(
        "thin", (4, 4, 4), (20, 20), "1" + 14 * "0" + ("/" + 15 * "0") * 13 + "/" + 15 * "1", dtype="bfloat16"
    )
    assert all(
        v.layout == "contiguous" for v in variants_of(sparse, Direction.FORWARD, CPU, "all") if v.kind not in OURS
    )


def test_operands_have_one_value_in_every_layout_and_as_many_weights_as_holes_leave() -> None:
    layer = LAYERS[8]
    first, second = (tensors_of(layer, layout, CPU) for layout in layouts_of(layer))
    for a, b in ((first.x, second.x), (first.w, second.w), (first.dy, second.dy)):
        assert torch.equal(a, b)
    live = first.w != 0
    assert (live.sum(-1) == 7).all() and len({tuple(row.flatten().tolist()) for row in live}) > 1
    assert tensors_of(LAYERS[7], "contiguous", CPU).w.shape == (4, 3, 9)


def test_the_truth_on_a_slice_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.layers.tensors.ORACLE_S", 1e-4)  # so that a slice is all it can afford
    layer = _layer("many", (32, 32, 32), (12, 12), "3x3")
    for direction in Direction:
        truth = Truth(layer.problem(direction), tensors_of(layer, "contiguous", CPU))
        exact = _expected(layer, direction)
        assert truth.error(exact) < 1e-12
        assert truth.error(exact * 1.01) > 5e-3
        assert truth.error(exact * math.nan) == math.inf


# ---- limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [layer for layer in EVERY if layer.id not in ("footprint", "holes")])
def test_the_arithmetic_counted_is_that_of_taps_inside_the_input(layer: Layer) -> None:
    problem = layer.problem()
    ones = torch.ones(problem.input_shape), torch.ones(problem.weight_shape)
    assert limits.needed_flops(problem) == 2 * float(reference(problem, *ones).sum())


def test_the_limit_follows_dtype_and_holes() -> None:
    layer = LAYERS[8]
    forward, weight = layer.problem(), layer.problem(Direction.GRAD_WEIGHT)
    assert limits.needed_flops(forward, 7) == pytest.approx(limits.needed_flops(forward) * 7 / 25)
    assert limits.needed_flops(weight, 7) == limits.needed_flops(weight)
    memory_bound = {"copy_gb_s": 1e-3, "gemm_gflop_s": 1e9}
    half = _layer("half", (5, 5, 5), (9, 9), "5x5", dtype="bfloat16").problem()
    assert limits.limit_ms(half, memory_bound) == pytest.approx(limits.limit_ms(forward, memory_bound) / 2)
    found = limits.rates(CPU, "bfloat16", budget_s=0.02)
    assert found.keys() == LIMITS.keys() and min(found.values()) > 0


# ---- suites -------------------------------------------------------------------------------------


def test_suites_are_cut_from_one_table() -> None:
    assert set(SUITES["depthwise"]) | set(SUITES["control"]) < set(SUITES["cpu"])
    assert all(layer.groups == layer.c_in > 1 for layer in SUITES["depthwise"])
    controls = SUITES["control"]
    assert all(TapPattern.parse(layer.taps).single_grid() and layer.groups < layer.c_in for layer in controls)
    assert {"resnet50-stem", "resnet50-1x1", "drn-d4", "conformer-linear"} <= {layer.name for layer in controls}
    for wide, half in (("cpu", "cpu-bf16"), ("depthwise", "depthwise-bf16")):
        for a, b in zip(SUITES[wide], SUITES[half], strict=True):
            assert (a.name, a.batch, a.taps, b.dtype) == (b.name, b.batch, b.taps, "bfloat16")
    named = {layer.name: layer for layer in SUITES["cpu"]}
    assert set(MUST_SHOW) < set(named)
    classic, holes = named["dense-k17"], named["holes-34of17"]
    assert (classic.batch, classic.c_in, classic.spatial, classic.taps) == (4, 96, (56, 56), "17x17")
    assert (holes.taps, holes.holes, classic.holes) == ("17x17~0.125", 34, 0)


# ---- rows and what is said of them --------------------------------------------------------------


def _row(layer: str, direction: str, ours_ms: float, kind: str = "depthwise", error: float = 1e-7) -> rows.Row:
    row = rows.Row(layer, "float32", direction, kind, limit_ms=0.5)
    row.times_ms = {
        "eager contiguous conv": 3.0, "compile channels_last conv": 2.0, "dispatch contiguous": 2 * ours_ms,
        "optimized freezing contiguous": ours_ms, "dcls contiguous": 0.1,
    }  # fmt: skip
    row.rounds = dict.fromkeys(row.times_ms, 5)
    row.errors = {"eager contiguous conv": 1e-7, "compile channels_last conv": 1e-6, "dispatch contiguous": error}
    row.settle()
    return row


def test_ratios_are_of_the_fastest_and_the_dcls_package_is_no_rival() -> None:
    row = _row("a", "forward", 1.0)
    assert (row.best_rival, row.best_ours) == ("compile channels_last conv", "optimized freezing contiguous")
    assert (row.ratio, row.native_ratio, row.over_limit) == (2.0, 1.5, 2.0)
    assert row.native_error == 1e-7 and not row.wrong  # under the floor of the dtype
    assert _row("a", "forward", 1.0, error=1.1e-6).wrong == ["dispatch contiguous: error 1.1e-06, 1.0e-06 allowed"]
    assert _row("a", "forward", 1.0, error=math.nan).wrong
    row.failed["dispatch contiguous"] = "RuntimeError: no"
    row.settle()
    assert row.wrong == ["dispatch contiguous did not run: RuntimeError: no"]


def test_means_are_geometric_and_the_gradients_together_as_well() -> None:
    times = {"forward": 4.0, "grad_input": 1.0, "grad_weight": 0.25}
    found = [_row("mamba-k4", direction, ms).as_json() for direction, ms in times.items()]
    found.append(_row("drn-d4", "forward", 2.0, "control").as_json())
    said = {(m["layers"], m["direction"]): m for m in summary.means(found)}
    assert said["depthwise", "both gradients"]["ratio"] == pytest.approx(4.0)  # of 2 and 8
    assert said["depthwise", "all"]["ratio"] == pytest.approx(2.0) and said["all", "forward"]["rows"] == 2
    assert said["depthwise", "forward"]["under 0.97"] == 1 and said["control", "forward"]["under 0.97"] == 0
    text = summary.summary(found)
    assert "Under 0.97, after timing again: 1 of 4" in text and text.index("Always shown") < text.index("Under 0.97, ")
    assert "drn-d4" in summary.table(found) and "WRONG" not in text


def test_a_far_slower_variant_is_not_timed_again_and_a_loss_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = {"eager conv": 10.0, "eager slow": 100.0, "eager slower": 20.0, "dispatch ": 11.0}
    asked: list[tuple[float, set[str]]] = []

    def timed(calls: dict[str, Any], *, budget_s: float, device: torch.device) -> dict[str, Timing]:
        asked.append((budget_s, {name.replace(" contiguous", "") for name in calls}))
        return {name: Timing.of([1e3 * pace[f"{v.kind} {v.way}"]] * 7) for name, v in known.items() if name in calls}

    exact = _expected(LAYERS[0], Direction.FORWARD).float()
    made = [Variant(kind, "contiguous", way, lambda: exact) for kind, way in (name.split(" ") for name in pace)]
    known = {variant.name: variant for variant in made}
    monkeypatch.setattr(rows, "variants_of", lambda *args: made)
    monkeypatch.setattr(rows, "_first_ms", lambda variant, device: pace[f"{variant.kind} {variant.way}"])
    monkeypatch.setattr(rows.measure, "interleave", timed)
    row = rows.measured(LAYERS[0], Direction.FORWARD, CPU, LIMITS, seconds=0.25)
    duel = {"eager conv", "dispatch"}
    assert asked == [(0.25, {*duel, "eager slower"}), (0.125, duel), (0.5, duel), (0.5, duel)]
    assert row.duel_ms == {"eager contiguous conv": 10.0, "dispatch contiguous": 11.0}
    assert row.ratio == pytest.approx(10 / 11) and row.times_ms["eager contiguous slow"] == 100.0
    assert row.rounds["eager contiguous slow"] == 0 < row.rounds["eager contiguous slower"]


# ---- files --------------------------------------------------------------------------------------


def test_rows_are_replaced_in_place_and_others_stay(tmp_path: Path) -> None:
    old = [{"k": 1, "v": "old"}, {"k": 2, "v": "old"}]
    assert merged(old, [{"k": 3, "v": "new"}, {"k": 1, "v": "new"}], lambda row: row["k"]) == [
        {"k": 1, "v": "new"}, {"k": 2, "v": "old"}, {"k": 3, "v": "new"},
    ]  # fmt: skip
    path = tmp_path / "a" / "b.json"
    assert read_rows(path) == []
    write_results(path, CPU, facts={"device": "a test"}, rows=old)
    assert read_rows(path) == old and [p.name for p in path.parent.iterdir()] == ["b.json"]
    path.write_text("[]")
    with pytest.raises(ValueError, match="no results file"):
        read_rows(path)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES, "quick", (LAYERS[0], LAYERS[6]))
    facts = {"device": "a test", "toolchain": {"torch": "0"}, "adaptconv": "0"}
    for module in (run, regret):
        monkeypatch.setattr(module, "machine_facts", lambda device: dict(facts))
    monkeypatch.setattr(run, "rates", lambda device, dtype: LIMITS)


@pytest.mark.usefixtures("tiny")
def test_a_run_adds_resumes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, chart = tmp_path / "out.json", tmp_path / "out.png"
    plain = ["--rivals", "eager", "--seconds", "0", "--out", str(out)]
    assert run.main([*plain, "--only", "depthwise", "--directions", "forward", "dx", "--chart", str(chart)]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")
    first = read_rows(out)
    assert [(row["layer"], row["direction"]) for row in first] == [
        ("depthwise", "forward"),
        ("depthwise", "grad_input"),
    ]
    assert all(row["ratio"] > 0 and row["limit_ms"] > 0 and row["error"] < 1e-6 and row["plans"] for row in first)
    assert json.loads(out.read_text())["limits"] == {"float32": LIMITS}

    assert run.main([*plain, "--add", "--only", "wings, depthwise", "--directions", "dw"]) == 0
    assert read_rows(out)[:2] == first and len(read_rows(out)) == 3

    asked: list[tuple[str, str]] = []

    def noted(layer: Layer, direction: Direction, *args: Any, **kwargs: Any) -> rows.Row:
        asked.append((layer.name, str(direction)))
        return rows.measured(layer, direction, *args, **kwargs)

    monkeypatch.setattr(run, "measured", noted)
    capsys.readouterr()
    assert run.main([*plain, "--resume", "--only", "depthwise"]) == 0
    assert asked == [("depthwise", "grad_weight")] and len(read_rows(out)) == 4
    assert capsys.readouterr().out.count("| depthwise") >= 3  # the table has what was taken over too
    asked.clear()
    assert run.main([*plain[:3], "0.01", *plain[4:], "--resume", "--only", "depthwise", "--directions", "dx"]) == 0
    assert asked == [("depthwise", "grad_input")]  # with other settings it is another measurement


@pytest.mark.usefixtures("tiny")
def test_a_run_cut_off_keeps_its_rows_and_a_wrong_result_fails_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"

    def cut_off(layer: Layer, direction: Direction, *args: Any, **kwargs: Any) -> rows.Row:
        if direction is Direction.GRAD_INPUT:
            raise KeyboardInterrupt
        return _row(layer.name, str(direction), 1.0, error=1.0)

    monkeypatch.setattr(run, "measured", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--only", "depthwise", "--out", str(out)])
    assert [row["direction"] for row in read_rows(out)] == ["forward"]
    assert run.main(["--only", "depthwise", "--directions", "forward"]) == 1


def test_arguments_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--only", "nonesuch"], "no layer nonesuch"), (["--resume"], "need --out"), (["--chart", "a.png"], "--out"),
        (["--draw", "a.json"], "--chart"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            run.main(arguments)
        assert said in capsys.readouterr().err


# ---- regret -------------------------------------------------------------------------------------


def test_an_exhaustive_search_times_every_configuration() -> None:
    problem = LAYERS[0].problem(Direction.GRAD_WEIGHT)
    slowest = backend_named("gather").default(problem)
    tuned = dispatch.plan_from_choice(problem, slowest, Source.PINNED, "a test")
    row = searched(("depthwise", "dw", "contiguous"), tuned, CPU, 0.05)
    assert row.candidates == sum(backend.space(problem).size for backend in contenders(problem)) > 4
    assert 2 <= row.timed <= row.candidates and not row.wrong
    assert row.tuned == str(slowest) and row.regret >= 1 and row.tuned_ms >= row.best_ms > 0
    named = Choice.parse(row.best)
    assert named.config in backend_named(named.backend).space(problem)


@pytest.mark.usefixtures("tiny")
def test_regret_asks_for_records_and_has_both_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--suite", "quick", "--only", "depthwise", "--directions", "forward", "--seconds", "0.02"]
    assert regret.main(only) == 0
    assert "knows none of the 2 problems" in capsys.readouterr().out
    tune = ["--only", "depthwise", "--directions", "forward", "--rivals", "eager", "--seconds", "0"]
    assert run.main([*tune, "--tune", "--budget", "6"]) == 0
    out = tmp_path / "regret.json"
    capsys.readouterr()
    assert regret.main([*only, "--exhaustive", "--out", str(out)]) == 0
    assert [row["layout"] for row in read_rows(out)] == ["contiguous", "channels_last"]
    assert "2 problems, 0 more without a record; regret of tuned plans" in capsys.readouterr().out
    assert regret.main([*only, "--native"]) == 0
    assert "against native: least" in capsys.readouterr().out


def test_nearby_times_what_is_carried_over_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "conformer-k31-infer", "--changes", "2", "--seconds", "0.02"]
    assert nearby.main(only) == 0
    assert "knows nothing near" in capsys.readouterr().out
    assert regret.main([*only[:2], "--directions", "forward"]) == 0  # no record of it either
    (layer,) = (layer for layer in SUITES["cpu"] if layer.name == "conformer-k31-infer")
    tune_problems([layer.problem()], budget_s=0.5, progress=False)
    out = tmp_path / "nearby.json"
    assert nearby.main([*only, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 and {row["direction"] for row in rows} == {"forward"}
    assert all(row["why"].startswith("nearest override record") and row["ratio"] > 0 for row in rows)
    assert "2 problems near tuned ones" in capsys.readouterr().out
