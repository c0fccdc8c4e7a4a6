"""The C++ tap kernel: its build cache, its threads, and what conformance does not ask of it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import adaptconv
from adaptconv import pinned
from adaptconv.backends import backend_named
from adaptconv.backends.base import Config
from adaptconv.backends.cpp import build
from adaptconv.dispatch import Plan, Source
from adaptconv.errors import BackendRejected
from adaptconv.modules import AdaptiveConv2d
from adaptconv.problem import Device, Direction, Problem, same_padding
from adaptconv.reference import reference
from adaptconv.taps import TapPattern
from adaptconv.trilinear import execute

CPP = backend_named("cpp")
ROOT = Path(adaptconv.__file__).parent.parent
CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


def problem_of(
    direction: Direction, taps: str, spatial: tuple[int, ...], *, batch: int = 2, channels: int = 3, outs: int = 1,
    padding: tuple[tuple[int, int], ...] | None = None, stride: int = 1, dtype: torch.dtype = torch.float64,
    ins: int = 1,
) -> Problem:  # fmt: skip
    pattern = TapPattern.parse(taps)
    return Problem(
        direction, batch, channels * ins, channels * outs, channels, spatial, pattern, (stride,) * len(spatial),
        same_padding(pattern.window) if padding is None else padding, str(dtype)[6:], "contiguous", Device.of(CPU),
    )  # fmt: skip


def operands_of(problem: Problem) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(problem.torch_dtype)
        for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )
    return {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}[problem.direction]


def run(problem: Problem, a: Tensor, b: Tensor, **knobs: int) -> Tensor:
    return CPP.run(problem, Config({**CPP.space(problem).default, **knobs}), a, b)


# ---- the build cache -----------------------------------------------------------------------------


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As in a process that has not built yet, with a cache of its own; gives the cache's directory."""
    monkeypatch.setattr(build, "_library", None)
    monkeypatch.setattr(build, "_failure", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.compiler.cache_clear()
    yield tmp_path / "cache" / "adaptconv" / "cpp"
    build.compiler.cache_clear()


def again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has loaded, as another process would not know of it."""
    monkeypatch.setattr(build, "_library", None)
    monkeypatch.setattr(build, "_failure", None)


def compilations(caplog: pytest.LogCaptureFixture) -> int:
    return sum("building the C++ tap kernel" in record.getMessage() for record in caplog.records)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def check_one_call() -> None:
    problem = problem_of(Direction.FORWARD, "101/010/101", (7, 9))
    a, b = operands_of(problem)
    torch.testing.assert_close(run(problem, a, b), reference(problem, a, b))


@needs_compiler
def test_it_is_built_once_and_a_damaged_library_is_built_anew(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "adaptconv.backends.cpp")
    assert CPP.rejects(problem_of(Direction.FORWARD, "3x3", (8, 8))) is None
    assert compilations(caplog) == 0 and not fresh.exists(), "asking builds nothing"
    check_one_call()
    assert compilations(caplog) == 1
    (library,) = fresh.iterdir()
    assert library.suffix == ".so" and not library.stat().st_mode & 0o077 and not fresh.stat().st_mode & 0o077

    again(monkeypatch)
    check_one_call()
    assert compilations(caplog) == 1, "a second process finds it"
    assert build.library().path == library

    whole = library.read_bytes()
    library.unlink()  # not written in place: this process has it mapped
    library.write_bytes(whole[: len(whole) // 2])
    library.chmod(0o700)
    again(monkeypatch)
    check_one_call()
    assert compilations(caplog) == 2
    assert [path.read_bytes() == whole for path in fresh.iterdir()] == [True]

    library.chmod(0o777)
    again(monkeypatch)
    check_one_call()
    assert compilations(caplog) == 3, "what others could have written is not loaded"
    assert not warnings_in(caplog)


@needs_compiler
@pytest.mark.parametrize("trouble", ["a file in the way", "writable by others", "a link"])
def test_where_the_cache_cannot_be_used_it_builds_in_a_temporary_directory(
    trouble: str, fresh: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.parent.mkdir(parents=True)
    if trouble == "a file in the way":
        fresh.write_text("")
    elif trouble == "writable by others":
        fresh.mkdir()
        fresh.chmod(0o777)
    else:
        (tmp_path / "elsewhere").mkdir()
        fresh.symlink_to(tmp_path / "elsewhere")
    check_one_call()
    check_one_call()
    assert len(warnings_in(caplog)) == 1 and "temporary directory" in warnings_in(caplog)[0]
    assert fresh not in build.library().path.parents
    assert build.library().path.parent.stat().st_mode & 0o077 == 0
    assert not fresh.is_dir() or not list(fresh.iterdir())


def test_without_a_compiler_it_declines(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("PATH", "")
    problem = problem_of(Direction.FORWARD, "3x3", (8, 8))
    assert CPP.rejects(problem) == "no C++ compiler was found ($CXX, c++, g++, clang++)"
    a, b = operands_of(problem)
    with pinned("cpp"), pytest.raises(BackendRejected, match="no C\\+\\+ compiler was found"):
        adaptconv.conv2d(a, b.reshape(3, 1, 3, 3), padding=1, groups=3)
    monkeypatch.delenv("CXX")
    build.compiler.cache_clear()
    assert CPP.rejects(problem) == "no C++ compiler was found ($CXX, c++, g++, clang++)"


def test_a_compiler_that_fails_is_remembered_and_the_answer_is_right(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = tmp_path / "calls"
    script = tmp_path / "c++"
    script.write_text(
        f"#!/bin/sh\necho called >> {calls}\necho 'In file included' >&2\necho 'taps.cpp:1: error: no' >&2\nexit 1\n"
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    problem = problem_of(Direction.FORWARD, "3x3", (8, 8))
    assert CPP.rejects(problem) is None
    for direction in Direction:
        each = problem_of(direction, "101/010/101", (7, 9), outs=2)
        a, b = operands_of(each)
        torch.testing.assert_close(run(each, a, b), reference(each, a, b))
    assert len(warnings_in(caplog)) == 1
    made = len(calls.read_text().split())
    reason = CPP.rejects(problem)
    assert reason == "its kernel could not be built: taps.cpp:1: error: no"
    check_one_call()
    assert len(calls.read_text().split()) == made, "it is not asked again"
    assert list(fresh.iterdir()) == []


_CHILD = """
import json, os, sys, torch, adaptconv
from adaptconv.backends.cpp import build
def tasks(): return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
x, w = torch.randn(8, 64, 48, 48), torch.randn(64, 1, 7, 7)
torch.set_num_threads(1)
before = tasks()
def call():
    with adaptconv.pinned("cpp"):
        return adaptconv.conv2d(x, w, padding=3, groups=64)
y = call()
alone = tasks()
torch.set_num_threads(3)
z = call()
three = tasks()
torch.mm(torch.randn(512, 512), torch.randn(512, 512)); torch.randn(1 << 22).add_(1)
torch.nn.functional.conv2d(x, w, padding=3, groups=64)
after = tasks()
call()
maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
omp = sorted({line.split()[-1] for line in maps.splitlines() if "omp" in line.rsplit("/", 1)[-1] and ".so" in line})
right = torch.nn.functional.conv2d(x.double(), w.double(), padding=3, groups=64)
print(json.dumps({"tasks": [before, alone, three, after, tasks()], "omp": omp, "same": torch.equal(y, z),
                  "error": float((y - right).abs().max()), "parallel": build.library().parallel}))
"""


def start(cache: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)}
    env.pop("OMP_NUM_THREADS", None)
    return subprocess.Popen([sys.executable, "-c", _CHILD], env=env, stdout=subprocess.PIPE, text=True)


@needs_compiler
@needs_proc
def test_two_processes_build_at_once_and_threads_are_torchs_own(tmp_path: Path) -> None:
    both = [start(tmp_path), start(tmp_path)]
    for child in both:
        out, _ = child.communicate(timeout=300)
        assert child.returncode == 0
        found = json.loads(out)
        before, alone, three, after, last = found["tasks"]
        assert alone == before, "one thread asked for, none started"
        if found["parallel"] is not None:
            assert three == before + 2
            assert after == last == three, "torch's kernels and this one share their threads"
        assert len(found["omp"]) <= 1, "a second OpenMP runtime came in"
        assert found["same"]
        assert found["error"] < 1e-4
    folder = tmp_path / "adaptconv" / "cpp"
    assert {path.suffix for path in folder.iterdir()} == {".so"}


@needs_compiler
def test_torchs_openmp_is_found_where_torch_uses_openmp() -> None:
    if sys.platform == "linux" and "ATen parallel backend: OpenMP" in torch.__config__.parallel_info():
        assert build.torchs_parallel()


# ---- numbers ---------------------------------------------------------------------------------------

GEOMETRIES = {
    "cropped": problem_of(Direction.FORWARD, "3x5", (9, 12), padding=((-2, 1), (3, -4))),
    "cropped and strided": problem_of(Direction.FORWARD, "3x5", (12, 13), padding=((-1, 2), (4, -3)), stride=2),
    "uneven": problem_of(Direction.FORWARD, "101/011", (6, 7), padding=((0, 3), (5, 1)), outs=2),
    "window over map": problem_of(Direction.FORWARD, "31x31", (5, 4)),
    "dilation over map": problem_of(Direction.FORWARD, "3x3d9x9", (8, 8), padding=((9, 9), (9, 9))),
    "nothing but padding": problem_of(Direction.FORWARD, "2x2", (3, 3), padding=((7, 0), (7, 0))),
    "rows of a grid": problem_of(Direction.FORWARD, "5x3d3x1", (26, 17), padding=((6, 6), (1, 1))),
    "strided columns": problem_of(Direction.FORWARD, "7x7d2x3", (40, 41), stride=3),
    "tiles of rows": problem_of(Direction.FORWARD, "5x5", (150, 160), batch=1, channels=1),
    "tiles of columns": problem_of(Direction.FORWARD, "9d7", (30011,), batch=1, channels=2),
    "tiles of planes": problem_of(Direction.FORWARD, "3x3x3", (21, 33, 35), batch=1, channels=1),
}


@needs_compiler
@pytest.mark.parametrize("tile_kib", [64, 1024])
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_unusual_geometry(name: str, direction: Direction, tile_kib: int) -> None:
    problem = GEOMETRIES[name].facing(direction)
    if CPP.rejects(problem):
        assert direction is Direction.GRAD_INPUT and "stride" in str(CPP.rejects(problem))
        return
    a, b = operands_of(problem)
    torch.testing.assert_close(run(problem, a, b, tile_kib=tile_kib), reference(problem, a, b))


GROUPS = {  # several channels a group; those of output in registers together are 1, 2 or 4
    "4 to 4": problem_of(Direction.FORWARD, "3x3", (9, 37), ins=4, outs=4),
    "2 to 2, two rows of two": problem_of(Direction.FORWARD, "5x3d3x2", (13, 20), ins=2, outs=2),
    "2 to 8": problem_of(Direction.FORWARD, "101/010/101", (7, 18), ins=2, outs=8),
    "3 to 6": problem_of(Direction.FORWARD, "3x3", (6, 7), ins=3, outs=6),
    "4 to 3": problem_of(Direction.FORWARD, "2x5", (6, 19), ins=4, outs=3),
    "1 to 4": problem_of(Direction.FORWARD, "7x7", (16, 14), outs=4),
    "strided": problem_of(Direction.FORWARD, "3x3", (15, 33), ins=2, outs=4, stride=2),
    "a line": problem_of(Direction.FORWARD, "9d3", (300,), ins=4, outs=2),
    "a line, 16 to 16": problem_of(Direction.FORWARD, "5", (70,), ins=16, outs=16, channels=2),
    "planes": problem_of(Direction.FORWARD, "3x3x3", (5, 6, 17), ins=2, outs=2),
    "tiles": problem_of(Direction.FORWARD, "5x5", (90, 100), batch=1, ins=4, outs=4, channels=2),
    "tiles of planes": problem_of(Direction.FORWARD, "3x3x3", (9, 25, 31), batch=1, ins=4, outs=2, channels=2),
    "more plans than are kept": problem_of(Direction.FORWARD, "9x9", (9, 9), outs=160, channels=2),
}


def facing(problem: Problem, direction: Direction) -> Problem:
    """In another direction, with as many input channels as it takes there; strides have no gradient of the input."""
    here = problem.facing(direction)
    if direction is Direction.GRAD_INPUT and CPP.rejects(here):
        pytest.skip(str(CPP.rejects(here)))
    return here


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_several_channels_a_group(name: str, direction: Direction, dtype: torch.dtype) -> None:
    problem = problem_in(facing(GROUPS[name], direction), direction, dtype)
    a, b = operands_of(problem)
    exact = reference(problem_in(problem, direction, torch.float64), a.double(), b.double())
    bound = {torch.float32: 6e-7, torch.float64: 1e-14, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    bound *= max(1.0, problem.flops / exact.numel() / 2000) ** 0.5  # a sum of so many thousands
    for config in CPP.space(problem):
        assert (CPP.run(problem, config, a, b).double() - exact).norm() / exact.norm() < bound, config


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.parametrize("machine", ["x86-64", "x86-64-v3"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_every_width_of_vector_and_every_compiler(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, machine: str
) -> None:
    """As the kernel is compiled on processors with vectors of 16 bytes (ARM's too are that wide) and of 32."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    if machine != "x86-64" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor has no AVX2")
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(build, "_TUNED", ((f"-march={machine}",),))
    assert build.library().path.is_relative_to(fresh)
    check_every_float16()
    bounds = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for name, case in (GEOMETRIES | GROUPS).items():
        for direction, dtype in itertools.product(Direction, bounds):
            problem = problem_in(case.facing(direction), direction, dtype)
            if CPP.rejects(problem):
                continue
            a, b = operands_of(problem)
            exact = reference(problem_in(problem, direction, torch.float64), a.double(), b.double())
            for config in CPP.space(problem):
                apart = (CPP.run(problem, config, a, b).double() - exact).norm()
                assert apart <= bounds[dtype] * exact.norm(), (name, direction, dtype, config)


@needs_compiler
def test_zero_weights_are_skipped_in_each_channel_of_a_group() -> None:
    problem = problem_of(Direction.FORWARD, "3x3", (9, 20), ins=2, outs=4, channels=2)
    x, w = operands_of(problem)
    w[1, 0] = 0  # the others of its group keep theirs
    w[6] = 0
    torch.testing.assert_close(run(problem, x, w), reference(problem, x, w))
    x[:, 0, 4, 4] = float("inf")
    x[:, 2, 0, 0] = float("nan")
    y = run(problem, x, w)
    assert torch.isfinite(y[:, 1]).all() and torch.equal(y[:, 6], torch.zeros_like(y[:, 6]))
    assert all(not torch.isfinite(y[:, c]).all() for c in (0, 2, 3, 4, 5, 7))


RUNS = {  # what float64 has no loops for: taps one above the other, met by several rows of the gradient
    "taller than the map": problem_of(Direction.GRAD_WEIGHT, "27x5", (14, 18)),
    "many images between two flushes": problem_of(Direction.GRAD_WEIGHT, "13x3", (14, 9), batch=90),
    "many columns": problem_of(Direction.GRAD_WEIGHT, "9x2", (30, 700), batch=1),
    "dilated": problem_of(Direction.GRAD_WEIGHT, "5x3d4x2", (31, 21)),
    "strided": problem_of(Direction.GRAD_WEIGHT, "6x3", (37, 20), stride=2),
    "strided and dilated": problem_of(Direction.GRAD_WEIGHT, "4x3d4x1", (41, 20), stride=2),
    "planes outside": problem_of(Direction.GRAD_WEIGHT, "7x5x3", (3, 6, 17)),
    "cropped": problem_of(Direction.GRAD_WEIGHT, "5x3", (29, 12), padding=((-3, 2), (3, -4))),
    "columns of three, by threes": problem_of(Direction.GRAD_WEIGHT, "3x8", (16, 37)),
    "columns of five": problem_of(Direction.GRAD_WEIGHT, "5x7", (12, 21)),
    "columns of four in several planes": problem_of(Direction.GRAD_WEIGHT, "2x4x5", (4, 9, 18)),
    "holes": problem_of(Direction.GRAD_WEIGHT, "101/111/101/011/111/110/111", (23, 34)),
}


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_weight_gradients_leave_out_only_what_is_zero(name: str, dtype: torch.dtype) -> None:
    problem = problem_in(RUNS[name], Direction.GRAD_WEIGHT, dtype)
    a, b = operands_of(problem)
    exact = reference(problem_in(problem, Direction.GRAD_WEIGHT, torch.float64), a.double(), b.double())
    error = (run(problem, a, b).double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 6e-7, torch.float64: 1e-14, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("name", ["tiles of rows", "rows of a grid", "tiles of columns", "uneven", "tiles", "2 to 8"])
def test_any_number_of_threads_gives_the_same_bits(name: str, direction: Direction, dtype: torch.dtype) -> None:
    problem = problem_in({**GEOMETRIES, **GROUPS}[name], direction, dtype)
    a, b = operands_of(problem)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 1, 2):
            torch.set_num_threads(threads)
            results.append(run(problem, a, b))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def problem_in(problem: Problem, direction: Direction, dtype: torch.dtype) -> Problem:
    here = problem.facing(direction)
    return Problem(**{**{f: getattr(here, f) for f in here.__dataclass_fields__}, "dtype": str(dtype)[6:]})


@needs_compiler
def test_zero_weights_are_skipped_channel_by_channel() -> None:
    """Exact for finite inputs; a skipped weight also adds nothing where native makes NaN of 0 * inf."""
    problem = problem_of(Direction.FORWARD, "5x5", (9, 40), channels=4)
    x, w = operands_of(problem)
    w = w * (torch.rand(w.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    w[3] = 0
    torch.testing.assert_close(run(problem, x, w), reference(problem, x, w))
    x[:, :, 4, 20] = float("inf")
    x[:, :, 0, 0] = float("nan")
    y = run(problem, x, w)
    assert torch.equal(y[:, 3], torch.zeros_like(y[:, 3]))
    padded = F.pad(x, (2, 2, 2, 2))
    for c in range(3):
        expected = torch.zeros(2, 9, 40, dtype=torch.float64)
        for t, (i, j) in enumerate(problem.taps.offsets):
            if w[c, 0, t]:
                expected += w[c, 0, t] * padded[:, c, i : i + 9, j : j + 40]
        torch.testing.assert_close(y[:, c], expected, equal_nan=True)


@needs_compiler
@pytest.mark.parametrize("place", [(0, 0), (4, 20), (8, 39), (3, 0)])
def test_what_is_not_finite_reaches_only_the_taps_that_read_it(place: tuple[int, int]) -> None:
    problem = problem_of(Direction.GRAD_WEIGHT, "101/010/101", (9, 40), padding=((0, 0), (0, 0)))
    x, dy = operands_of(problem)
    x[0, 1, place[0], place[1]] = float("inf")
    dw = run(problem, x, dy)
    for t, (i, j) in enumerate(problem.taps.offsets):
        reads = 0 <= place[0] - i < 7 and 0 <= place[1] - j < 38
        assert torch.isfinite(dw[1, 0, t]) == (not reads)
    assert torch.isfinite(dw[0]).all() and torch.isfinite(dw[2]).all()


@needs_compiler
def test_bfloat16_rounds_once_to_nearest_even() -> None:
    problem = problem_of(Direction.FORWARD, "7x7", (20, 37), dtype=torch.bfloat16)
    x, w = operands_of(problem)
    exact = reference(problem, x, w)
    right = exact.to(torch.bfloat16)
    assert (run(problem, x, w) != right).sum() <= 0.002 * right.numel()  # float32 sums that fall on the other side
    x[0, 0, 5, 5] = float("nan")
    assert run(problem, x, w)[0, 0, 5, 5].isnan()
    one = problem_of(Direction.FORWARD, "1x1", (4, 16), dtype=torch.bfloat16, channels=1, batch=1)
    values = torch.tensor([1e38, 3.3e38, -3.3e38, 1e-40, 0.0, -0.0, 1.0, 257.0] * 8).bfloat16().reshape(1, 1, 4, 16)
    weight = torch.full((1, 1, 1), 1.0078125, dtype=torch.bfloat16)
    assert torch.equal(run(one, values, weight), (values.float() * weight.float().reshape(1, 1, 1, 1)).bfloat16())


@needs_compiler
@pytest.mark.parametrize("flushed", [False, True])
def test_float16_rounds_once_to_nearest_even(flushed: bool) -> None:
    """Also where the processor takes its own subnormals for zero: those of float16 are none of them in float32."""
    if not torch.set_flush_denormal(flushed):
        pytest.skip("this processor cannot be told to")
    try:
        check_every_float16()
    finally:
        torch.set_flush_denormal(False)


def check_every_float16() -> None:
    """All float16 numbers times some weights, of which most products lie between two float16 numbers."""
    problem = problem_of(Direction.FORWARD, "1", (1 << 16,), batch=1, channels=1, dtype=torch.float16)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    wide = torch.from_numpy(every.numpy().astype("float32"))  # not by torch, whose setting may be to flush
    for factor in (1.0, -1.0, 0.5, 0.0009765625, 1.0009765625, 0.333251953125, 1024.0, -37.59375):
        weight = torch.full((1, 1, 1), factor, dtype=torch.float16)
        found = run(problem, every.reshape(1, 1, -1), weight).flatten()
        with numpy.errstate(over="ignore", invalid="ignore"):
            right = torch.from_numpy((wide.numpy() * numpy.float32(factor)).astype("float16"))
        ours, true = found.view(torch.int16), right.view(torch.int16)
        same = (ours == true) | ((ours | true) & 0x7FFF == 0)  # a sum that begins with 0 is never -0
        assert (same | wide.isnan() & found.isnan()).all(), factor


@needs_compiler
@pytest.mark.parametrize("direction", Direction, ids=str)
def test_an_empty_batch(direction: Direction) -> None:
    problem = problem_of(direction, "3x3", (6, 7), batch=0)
    a, b = operands_of(problem)
    result = execute(Plan(problem, CPP.default(problem), Source.PINNED, "by the test"), a, b)
    shape = problem.weight_shape if direction is Direction.GRAD_WEIGHT else problem.input_shape
    assert torch.equal(result, torch.zeros(shape, dtype=torch.float64))


def test_what_it_declines_and_why() -> None:
    forward = problem_of(Direction.FORWARD, "3x3", (9, 9), stride=2)
    reasons = {
        "stride": forward.facing(Direction.GRAD_INPUT),
        "footprint": problem_of(Direction.FORWARD, "3x3d2x2*0.5,1,0.5x0.5,1,0.5", (9, 9)),
        "complex64": problem_in(forward, Direction.FORWARD, torch.complex64),
        "at most 4 input channels a group here, not 5": problem_of(Direction.FORWARD, "3x3", (9, 9), ins=5),
        "at most 16 input channels a group here, not 17": problem_of(Direction.FORWARD, "3", (9,), ins=17),
        "of a single group": problem_of(Direction.FORWARD, "3x3", (9, 9), channels=1, ins=2),
    }
    for word, problem in reasons.items():
        assert word in str(CPP.rejects(problem))


# ---- inside torch ------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("direction", ["forward", "grad_weight"])
def test_the_op_is_sound(direction: str) -> None:
    x, w, dy = torch.randn(2, 3, 8, 9), torch.randn(3, 1, 5), torch.randn(2, 3, 8, 9)
    args = (direction, x, w if direction == "forward" else dy, None, "010/111/010", [1, 1], [1, 1, 1, 1], 3, 1, 256)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.adaptconv.cpp_taps.default, args, test_utils=checks)
    x, w = torch.randn(2, 6, 8, 9), torch.randn(6, 2, 5)
    args = (direction, x, w if direction == "forward" else x + 1, None, *args[4:7], 3, 4, 256)
    torch.library.opcheck(torch.ops.adaptconv.cpp_taps.default, args, test_utils=checks)


@needs_compiler
@pytest.mark.parametrize("direction", ["forward", "grad_weight"])
def test_the_op_refuses_what_does_not_belong_together(direction: str) -> None:
    x = torch.randn(2, 3, 8, 9)
    right = torch.randn(3, 1, 5) if direction == "forward" else torch.randn(2, 3, 8, 9)
    good: list[Any] = [direction, x, right, None, "010/111/010", [1, 1], [1, 1, 1, 1], 3, 1, 256]
    assert torch.ops.adaptconv.cpp_taps(*good).numel()
    changes: dict[int, list[Any]] = {
        1: [x[:, :2], x.double(), x.half(), x[0], *([] if direction == "forward" else [x[..., :2]])],
        2: [right[..., :3], right[:1], right.double()],
        3: [torch.randn(2), torch.randn(3).double()] if direction == "forward" else [],
        4: ["111/111/111", "111"] if direction == "forward" else ["111"],
        5: [[1], [0, 1], [-1, 1]],
        6: [[1, 1], [-9, 0, 0, 0]],
        7: [2, 0],
        8: [3],
        9: [0],
    }
    for position, values in changes.items():
        for value in values:
            arguments = [*good[:position], value, *good[position + 1 :]]
            with pytest.raises((RuntimeError, ValueError, ZeroDivisionError)):
                torch.ops.adaptconv.cpp_taps(*arguments)


@needs_compiler
def test_a_default_device_does_not_reach_it() -> None:
    problem = problem_of(Direction.GRAD_WEIGHT, "101/010/101", (8, 7))
    a, b = operands_of(problem)
    with torch.device("meta"):
        result = run(problem, a, b)
    torch.testing.assert_close(result, reference(problem, a, b))


@needs_compiler
def test_a_compiled_layer_keeps_it_as_one_node_each_way() -> None:
    layer = AdaptiveConv2d(6, 6, "10101/00000/10101", groups=6, padding=(1, 2))
    x = torch.randn(2, 6, 11, 12, requires_grad=True)
    seen: list[str] = []

    def keep(module: torch.fx.GraphModule, _: object) -> object:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    from torch._dynamo.backends.common import aot_autograd

    with pinned("cpp"):
        expected = layer(x)
        (right,) = torch.autograd.grad(expected.square().sum(), layer.weight)
        compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep), fullgraph=True)
        y = compiled(x)
        (dw,) = torch.autograd.grad(y.square().sum(), layer.weight)
    assert sum("cpp_taps" in name for name in seen) == 3, seen
    assert not any("convolution" in name for name in seen)
    assert torch.equal(y, expected)
    torch.testing.assert_close(dw, right)


@needs_compiler
def test_under_inductor() -> None:
    layer = AdaptiveConv2d(4, 4, "101/010/101", groups=4, padding=1)
    x = torch.randn(2, 4, 9, 10)
    with pinned("cpp"), torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))
