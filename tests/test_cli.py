"""The command line as a user meets it: what it prints, and that mistakes are one line."""

from __future__ import annotations

import json

import pytest

from adaptconv import cli, doctor, records
from tests.test_rates import _steady
from tests.test_reports import _problem, _remember

FACTORY = """
import torch
from torch import nn

def good():
    return nn.Sequential(nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=4), nn.ReLU()), torch.randn(1, 4, 32)

def empty():
    return nn.Linear(4, 4), torch.randn(2, 4)

def wrong():
    return 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "cli_factories.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "cli_factories"


def run(capsys, *argv):
    status = cli.main(list(argv))
    out, err = capsys.readouterr()
    return status, out, err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("demo", "tune", "report", "explain", "bench", "db", "doctor", "examples:", "factory"):
        assert word in text


def test_tune_then_report_shows_the_record(capsys, factories):
    status, out, _ = run(capsys, "tune", f"{factories}:good", "--budget", "2s")
    assert status == 0
    assert "tuned 1 problem" in out
    status, out, _ = run(capsys, "report", f"{factories}:good", "--format", "json")
    (row,) = json.loads(out)["rows"]
    assert row["decided_by"] == "record"
    status, out, _ = run(capsys, "db", "list")
    assert "1 records" in out


def test_a_model_that_runs_under_autocast_is_tuned_as_it_runs(capsys, factories):
    status, out, _ = run(capsys, "tune", f"{factories}:good", "--budget", "2s", "--autocast", "bfloat16")
    assert status == 0 and "tuned 1 problem" in out
    (hit,) = records.default_store().records()
    assert " bfloat16 " in hit.record.key
    status, out, _ = run(capsys, "report", f"{factories}:good", "--format", "json", "--autocast", "bfloat16")
    assert {row["decided_by"] for row in json.loads(out)["rows"]} == {"record"}
    _, out, _ = run(capsys, "report", f"{factories}:good", "--format", "json")
    assert {row["decided_by"] for row in json.loads(out)["rows"]} != {"record"}, "of float32 nothing is known"
    status, out, _ = run(capsys, "explain", f"{factories}:good", "--autocast", "float16")
    assert status == 0 and "float16" in out
    status, _, err = run(capsys, "explain", "--input", "1,4,8", "--weight", "4,4,3", "--autocast", "float16")
    assert status == 2 and "--dtype" in err


def test_a_model_without_convolutions_is_a_plain_sentence(capsys, factories):
    status, out, err = run(capsys, "tune", f"{factories}:empty", "--budget", "2s")
    assert (status, err) == (0, "")
    assert "no convolution" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tune", "nonsense"], "package.module:factory"),
        (["tune", "cli_factories:absent"], "has no attribute"),
        (["report", "cli_factories:wrong"], "must return (model, inputs)"),
        (["report", "no_such_module:factory"], "no module"),
        (["explain"], "--input and --weight"),
        (["explain", "--input", "4,8,9,9", "--weight", "8,8,9,3", "--groups", "3"], "groups"),
        (["explain", "--input", "4", "--weight", "8,8"], "--input is N,C"),
        (["explain", "--input", "1,2,9", "--weight", "2,2,3", "--taps", "1x"], "cannot read tap pattern"),
        (["db", "verify"], "usage: adaptconv db verify PATH"),
        (["db", "verify", "/nowhere/at/all"], "no such file"),
    ],
)
def test_mistakes_are_one_line_on_stderr(capsys, factories, argv, words):
    status, out, err = run(capsys, *argv)
    shown = err + out
    assert status in (1, 2)
    assert words in shown
    assert "Traceback" not in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("argv", [["tune", "a:b", "--budget", "soon"], ["tune", "a:b", "--trials", "0"], ["dance"]])
def test_malformed_options_are_argparse_errors(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_explain_a_layer_from_shapes(capsys):
    status, out, _ = run(
        capsys, "explain", "--input", "4,8,20,20", "--weight", "8,1,7,7", "--dilation", "3", "--padding", "9",
        "--groups", "8", "--train", "--channels-last",
    )  # fmt: skip
    assert status == 0
    assert all(word in out for word in ("forward", "grad_input", "grad_weight", "channels_last", "gather"))
    status, out, _ = run(
        capsys, "explain", "--input", "4,8,64", "--weight", "8,1,13", "--taps", "101010101111101010101", "--groups", "8"
    )
    assert "dual" in out


def test_the_database_is_verified_exported_merged_and_compared(capsys, tmp_path):
    _remember(_problem())
    _remember(_problem(batch=4), "dense")
    shipped, other = tmp_path / "shipped", tmp_path / "other"
    assert run(capsys, "db", "export", str(shipped))[0] == 0
    (pack,) = shipped.glob("*.json")
    assert run(capsys, "db", "verify", str(shipped)) == (0, f"{shipped}: intact, 2 records\n", "")
    assert run(capsys, "db", "merge", str(other), str(shipped))[0] == 0
    assert run(capsys, "db", "diff", str(shipped), str(other)) == (0, "no difference\n", "")
    pack.write_text(pack.read_text()[:-40])
    assert run(capsys, "db", "verify", str(shipped))[0] == 1
    assert [hit.layer for hit in records.default_store().records()] == ["override", "override"]


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "C++ compiler: none found" in out
    assert "runs them uncompiled" in out
    assert "tuning writes to" in out
    assert "half precision: torch has " in out and "computed in float32" in out
    monkeypatch.setattr(doctor.halves, "has_kernels", lambda dtype: dtype != "float16")
    assert "half precision: torch has no kernels for float16 on this processor" in run(capsys, "doctor")[1]


def test_doctor_calibrates_and_says_so_afterwards(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("adaptconv.calibration._timed", _steady)  # a busy machine must not decide the test
    assert "calibration: none for" in run(capsys, "doctor")[1]
    status, out, err = run(capsys, "doctor", "--calibrate", "--budget", "0.01s")
    assert status == 0
    assert all(word in out for word in ("gemm_gflops", "default", "GFLOP/s a thread", "kept in"))
    assert "pass 1 of 3" in err
    assert "calibration: override layer, measured" in run(capsys, "doctor")[1]
    (tmp_path / "file").write_text("in the way")
    records.use_database(tmp_path / "file")
    status, out, _ = run(capsys, "doctor", "--calibrate", "--budget", "0.01s")
    assert status == 1
    assert "not kept" in out


def test_interrupting_is_not_a_traceback(capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptconv.doctor.examine", interrupted)
    assert run(capsys, "doctor") == (130, "", "adaptconv doctor: interrupted\n")
