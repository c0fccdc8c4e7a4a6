"""The laws of the design (section 6) that are about the whole: imports, purity, the database."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import adaptconv
from adaptconv import dispatch, records
from adaptconv.backends import BACKENDS
from adaptconv.dispatch import Source
from adaptconv.problem import Direction, Problem
from adaptconv.records import DatabaseWarning, Record
from adaptconv.records.files import entry_name
from tests.cases import CASES

ROOT = Path(adaptconv.__file__).parent
PROBLEM = CASES[0].problem(Direction.FORWARD, torch.float32)

# ---- 1, 2: imports look down, and few look out ------------------------------------------------------

# From the ground up; a module may import its own floor and those below it, never one above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors", "graphs"),
    ("grids", "tap_text", "tap_shapes", "taps", "measure", "rates", "precision"),
    ("problem",),
    ("arguments", "plots", "table", "kernel", "reference", "records", "ranks", "sharding"),
    ("backends",),
    ("pins", "predictions"),
    ("dispatch",),
    ("trilinear",),
    ("ops",),
    ("tracing",),
    ("functional",),
    ("kernels", "warm"),
    ("modules",),
    ("attention", "convert", "compat"),
    ("swap",),
    ("compile",),
    ("tuner", "reports"),
    ("databases", "probes", "calibration", "doctor"),
    ("cli",),
    ("__main__", ""),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
OUTSIDERS = {  # packages that only one room may import, and the room
    "optuna": "tuner.search",
    "triton": "backends.triton",
    "sqlalchemy": None,
    "tabulate": "table",
    "tqdm": "tuner",
    "matplotlib": "plots",
}


def name_of(path: Path) -> str:
    """``backends.grid``, ``records`` (a package's own file), ``""`` (adaptconv itself)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, at any depth, type-checking blocks left out."""
    tree = ast.parse(path.read_text(), str(path))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who looks where"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def inside(name: str) -> frozenset[str]:
    """The adaptconv modules that one imports."""
    found = set()
    for full in imports(MODULES[name]):
        if full.split(".")[0] != "adaptconv":
            continue
        target = full.removeprefix("adaptconv").removeprefix(".")
        while target not in MODULES:  # the name of something in a module
            target = target.rpartition(".")[0]
        found.add(target)
    return frozenset(found - {name})


def floor(name: str) -> int:
    room = name.split(".")[0]
    assert room in FLOOR, f"{name}: say on which floor it stands"
    return FLOOR[room]


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "adaptconv")
def test_imports_only_look_down(name: str) -> None:
    above = {target for target in inside(name) if floor(target) > floor(name)}
    assert not above, f"{name} looks up at {sorted(above)}"


def test_no_import_goes_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in inside(name):
                # A package's own file gathers what is in it; importing it from inside is the circle to forbid.
                visit(target, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_nothing_below_dispatch_knows_of_it() -> None:
    for name in MODULES:
        if floor(name) < FLOOR["dispatch"]:
            assert "dispatch" not in inside(name), name
    assert "dispatch" in inside("trilinear")  # the check would otherwise pass on an empty graph


def test_only_one_room_imports_each_heavy_package() -> None:
    seen = dict.fromkeys(OUTSIDERS, 0)
    for name, path in MODULES.items():
        for full in imports(path):
            package = full.split(".")[0]
            if package in OUTSIDERS:
                room = OUTSIDERS[package]
                assert room is not None, f"{name} imports {package}"
                assert name == room or name.startswith(f"{room}."), f"{name} imports {package}"
                seen[package] += 1
    assert seen["optuna"]


# ---- 2: importing does nothing -----------------------------------------------------------------------

_WATCH = """
import json, sys, os
import torch
before = set(sys.modules)
opened, asked = [], []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
torch.cuda.is_available = torch.cuda.device_count = lambda *a: asked.append("cuda") or 0
torch._C._cuda_getDeviceCount = lambda *a: asked.append("cuda") or 0
environment = []
get = os.environ.__class__.__getitem__
os.environ.__class__.__getitem__ = lambda self, key: environment.append(key) or get(self, key)
import adaptconv
os.environ.__class__.__getitem__ = get
print(json.dumps({"modules": sorted(set(sys.modules) - before), "opened": opened, "asked": asked,
                  "environment": environment, "initialised": torch.cuda.is_initialized()}))
"""


def in_child(code: str, cwd: Path, **environment: str) -> str:
    """Standard output of a fresh interpreter, started outside any project."""
    env = {**os.environ, "PYTHONPATH": str(ROOT.parent), **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_reads_no_file_no_device_and_nothing_heavy(tmp_path: Path) -> None:
    home, cache_home = tmp_path / "home", tmp_path / "cache"
    for folder in (home, cache_home / "adaptconv" / "db", home / ".cache" / "adaptconv" / "db"):
        folder.mkdir(parents=True)
    found = json.loads(in_child(_WATCH, tmp_path, HOME=str(home), XDG_CACHE_HOME=str(cache_home)))
    loaded = {module.split(".")[0] for module in found["modules"]}
    assert not loaded & {"optuna", "triton", "tabulate", "sqlalchemy", "tqdm", "pandas"}
    assert "adaptconv.functional" in found["modules"]
    assert "adaptconv.tuner" not in found["modules"]
    own = [name for name in found["opened"] if not name.endswith((".py", ".pyc")) and not name.isdigit()]
    strange = [name for name in own if str(tmp_path) in name or "tuning_db" in name or name.endswith(".json")]
    assert not strange
    assert not [name for name in found["opened"] if name.startswith("/proc/cpuinfo")]
    assert not found["asked"]
    assert not found["initialised"]
    assert not {"HOME", "XDG_CACHE_HOME", "ADAPTCONV_DB"} & {key.strip("b'") for key in map(str, found["environment"])}


# ---- what is public says what it is --------------------------------------------------------------------


def test_the_public_names_are_few_and_all_documented() -> None:
    assert adaptconv.__all__ == sorted(adaptconv.__all__, key=lambda name: (name.islower(), name))
    assert len(adaptconv.__all__) <= 19
    for name in adaptconv.__all__:
        thing: Any = getattr(adaptconv, name)
        doc = inspect.getdoc(thing)
        assert doc, name
        assert len(doc) > 30, name
        if inspect.isclass(thing):
            for method, function in vars(thing).items():
                if not method.startswith("_") and inspect.isfunction(function):
                    assert inspect.getdoc(function), f"{name}.{method}"
    with pytest.raises(AttributeError, match="no attribute 'fastest'"):
        _ = adaptconv.fastest


def test_every_module_function_and_class_in_the_open_is_documented() -> None:
    bare = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and name != "__main__":
            bare.append(name)
        for node in tree.body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            given = any(isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "__doc__" for s in node.body)
            overload = any("overload" in ast.unparse(d) for d in getattr(node, "decorator_list", []))
            if not ast.get_docstring(node) and not given and not overload:
                bare.append(f"{name}.{node.name}")
    assert not bare


# ---- 3, 10: dispatch is pure -----------------------------------------------------------------------------


def record_of(problem: Problem, backend: str, gain: float = 4.0) -> Record:
    chosen = next(b for b in BACKENDS if b.name == backend)
    return Record(
        key=problem.key(), backend=backend, version=chosen.version, config=dict(chosen.space(problem).default),
        p20_us=10.0, median_us=11.0, p80_us=12.0, native_us=10.0 * gain, error=1e-7, native_error=1e-7,
        toolchain=records.toolchain(torch.device("cpu")), measured_on="2026-01-31",
    )  # fmt: skip


def test_dispatch_writes_nothing_and_tunes_nothing(database: Path) -> None:
    records.default_store().write(record_of(PROBLEM, "gather"))
    before = {path: path.stat().st_mtime_ns for path in database.rglob("*")}
    epoch = records.epoch()
    opened: list[tuple[Any, ...]] = []
    watching = True

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.rename", "os.remove", "os.mkdir", "subprocess.Popen", "os.exec"):
            opened.append((event, *args))

    sys.addaudithook(hook)
    try:
        for case in CASES:
            for direction in Direction:
                dispatch.plan(case.problem(direction, torch.float32))
    finally:
        watching = False
    written = [o for o in opened if o[0] != "open" or (isinstance(o[2], str) and set(o[2]) & set("wax+"))]
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    flags = [o for o in opened if o[0] == "open" and isinstance(o[3], int) and o[3] & writing]
    assert not written
    assert not flags
    assert opened, "the hook saw the database being read"
    assert {path: path.stat().st_mtime_ns for path in database.rglob("*")} == before
    assert records.epoch() == epoch
    assert "optuna" not in {name.split(".")[0] for name in sys.modules} or "adaptconv.tuner.search" in sys.modules


def test_a_read_only_database_is_read(database: Path) -> None:
    records.default_store().write(record_of(PROBLEM, "gather"))
    database.chmod(0o500)
    try:
        assert dispatch.plan(PROBLEM).choice.backend == "gather"
    finally:
        database.chmod(0o700)


_PLANS = """
import sys, torch
torch.set_num_threads(2)
from adaptconv import dispatch, records
from adaptconv.problem import Direction
from tests.cases import CASES
for case in CASES:
    for direction in Direction:
        plan = dispatch.plan(case.problem(direction, torch.float32))
        print(case.name, direction, plan.source, plan.text, plan.why)
"""


def test_the_same_database_gives_every_process_the_same_plans(database: Path, tmp_path: Path) -> None:
    recorded = [case for case in CASES if "*" not in case.taps][::3]  # gather declines spread taps
    for case in recorded:
        for direction in Direction:
            problem = case.problem(direction, torch.float32)
            records.default_store().write(record_of(problem, "gather"))
    runs = [
        in_child(_PLANS, tmp_path, ADAPTCONV_DB=str(database), XDG_CACHE_HOME=str(tmp_path), PYTHONHASHSEED=str(seed))
        for seed in (1, 2)
    ]
    assert runs[0] == runs[1]
    lines = runs[0].splitlines()
    assert len(lines) == 3 * len(CASES)
    assert sum(f" {Source.RECORD} gather" in line for line in lines) == 3 * len(recorded)
    assert any(f" {Source.NEAREST} " in line for line in lines)


def test_every_step_of_dispatch_is_taken_and_says_so() -> None:
    empty = dispatch.plan(PROBLEM)
    assert empty.source is Source.COST
    assert "no record of this problem" in empty.why
    records.default_store().write(record_of(PROBLEM, "gather"))
    assert dispatch.plan(PROBLEM).source is Source.RECORD
    assert dispatch.plan(PROBLEM).choice.backend == "gather"
    narrowed = dispatch.plan(replace(PROBLEM, dtype="bfloat16"))
    assert narrowed.source is Source.COST and f"no record of this problem, only in {PROBLEM.dtype}" in narrowed.why
    near = replace(PROBLEM, spatial=(PROBLEM.spatial[0] + 2,))
    assert dispatch.plan(near).source is Source.NEAREST
    assert dispatch.plan(near).choice.backend == "gather"
    with adaptconv.pinned("dense"):
        assert dispatch.plan(PROBLEM).source is Source.PINNED
    records.default_store().write(record_of(PROBLEM, "gather", gain=1.01))
    assert dispatch.plan(near).choice.backend == "native", "a neighbour's tie goes to native"
    elsewhere = replace(PROBLEM, device=replace(PROBLEM.device, kind="xpu", name="Other", threads=0))
    assert dispatch.plan(elsewhere).source is Source.FALLBACK
    text = dispatch.explain_problem(PROBLEM)
    assert all(backend.name in text for backend in BACKENDS)
    assert "measured" in text


@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_candidate_answers_every_problem(case: Any, direction: Direction) -> None:
    problem = case.problem(direction, torch.float32)
    answers = dispatch.decisions(problem)
    assert [a.backend for a in answers] == list(adaptconv.backends())
    for answer in answers:
        assert answer.reason
        assert answer.accepts == (answer.choice is not None)
        assert answer.predicted_us is None or 0 < answer.predicted_us < float("inf")
    assert dispatch.plan(problem).choice.backend in {a.backend for a in answers if a.accepts}


# ---- 5, 6: keys, and what a record may name ---------------------------------------------------------------


def test_every_field_of_a_problem_is_in_its_key() -> None:
    key = PROBLEM.key()
    for field in fields(Problem):
        value = getattr(PROBLEM, field.name)
        shown = {
            "batch": f"n{value}", "c_in": f"c{value}-", "c_out": f"-{value}", "groups": f"g{value}", "bias": "bias",
            "spatial": f"i{PROBLEM.spatial[0]}", "taps": f"t{value}", "stride": f"s{PROBLEM.stride[0]}",
            "padding": "p1", "deterministic": "anyorder", "device": f"@{PROBLEM.device.slug}",
        }.get(field.name, str(value))  # fmt: skip
        assert shown in key, field.name


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "evil"},
        {"version": 999},
        {"config": {"workspace_mib": 31}},
        {"config": {"workspace_mib": "32"}},
        {"config": {"workspace_mib": True}},
        {"config": {"workspace_mib": 32, "run": "os.system"}},
        {"config": {}},
        {"toolchain": {"torch": "1.0"}},
    ],
    ids=str,
)
def test_a_record_that_names_what_is_not_declared_decides_nothing(change: dict[str, Any]) -> None:
    problem = CASES[0].problem(Direction.GRAD_WEIGHT, torch.float32)
    records.default_store().write(replace(record_of(problem, "gather"), **change))
    plan = dispatch.plan(problem)
    assert plan.source is not Source.RECORD
    if "toolchain" not in change:  # a stale row may still hint from a distance
        assert plan.choice.backend != "gather" or plan.source is Source.COST
    x, w = torch.randn(2, 4, 11, requires_grad=True), torch.randn(6, 4, 3, requires_grad=True)
    b = torch.randn(6, requires_grad=True)
    ours = torch.autograd.grad(adaptconv.conv1d(x, w, b, padding=1).sum(), (x, w, b))
    torch.testing.assert_close(ours, torch.autograd.grad(F.conv1d(x, w, b, padding=1).sum(), (x, w, b)))


# ---- 7: a broken database never breaks a forward call -------------------------------------------------------


def call_and_count() -> int:
    """A forward and backward call, right whatever the database holds; how many warnings it gave."""
    x, w, b = torch.randn(2, 4, 11), torch.randn(6, 4, 3), torch.randn(6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(adaptconv.conv1d(x, w, b, padding=1), F.conv1d(x, w, b, padding=1))
    assert all(issubclass(warning.category, DatabaseWarning) for warning in caught), [str(c.message) for c in caught]
    return len(caught)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04cos\nsystem\n", b"{}", b'{"schema": 99}', b"[" * 100_000, b'{"record": {"schema"', b"\xff" * 100],
    ids=["empty", "pickle", "object", "foreign", "deep", "truncated", "binary"],
)
def test_garbage_in_the_place_of_a_record_is_warned_of_once(database: Path, content: bytes) -> None:
    key = replace(PROBLEM, bias=True).key()
    (database / entry_name(key)).write_bytes(content)
    assert call_and_count() == 1
    assert call_and_count() == 0


def test_a_truncated_or_flipped_record_is_warned_of_once(database: Path) -> None:
    path = records.default_store().write(record_of(replace(PROBLEM, bias=True), "gather"))
    assert dispatch.plan(PROBLEM).source is Source.RECORD
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[: len(whole) // 2], whole.replace(b'"gather"', b'"native"'), whole[1:]):
        records.use_database(database)
        path.write_bytes(damaged)
        assert call_and_count() <= 1
        assert dispatch.plan(PROBLEM).source is not Source.RECORD
    path.write_bytes(whole)
    records.use_database(database)
    assert dispatch.plan(PROBLEM).source is Source.RECORD


def test_a_file_in_the_place_of_the_database(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    records.use_database(tmp_path / "file")
    assert call_and_count() == 1
    assert call_and_count() == 0


def test_a_missing_database_is_no_news(tmp_path: Path) -> None:
    records.use_database(tmp_path / "nowhere")
    assert call_and_count() == 0
    assert not (tmp_path / "nowhere").exists()


_HOMELESS = """
import os, warnings
warnings.simplefilter("error")
for name in ("HOME", "XDG_CACHE_HOME", "ADAPTCONV_DB"):
    os.environ.pop(name, None)
import torch, adaptconv
x, w = torch.randn(1, 2, 9), torch.randn(2, 2, 3)
assert torch.equal(adaptconv.conv1d(x, w), torch.conv1d(x, w))
print("right")
"""


def test_without_a_home_a_call_is_right_and_quiet(tmp_path: Path) -> None:
    assert in_child(_HOMELESS, tmp_path).strip() == "right"


# ---- 8 is in test_opinfo and test_properties; 4 in test_conformance; 9 in test_compile -------------------------


def test_a_decision_for_another_thread_count_is_another_decision() -> None:
    x, w = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    layer = adaptconv.AdaptiveConv2d(4, 4, 3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        layer(x)
        assert layer.plans is not None
        assert layer.plans.forward.problem.device.threads == 1
    finally:
        torch.set_num_threads(threads)
    layer(x)
    assert layer.plans.forward.problem.device.threads == threads
    assert adaptconv.conv2d(x, w).shape == (1, 4, 6, 6)


def test_flags_that_change_numerics_change_the_problem() -> None:
    layer, x = adaptconv.AdaptiveConv2d(2, 2, 3), torch.randn(1, 2, 5, 5)

    def seen() -> Problem:
        layer(x)
        assert layer.plans is not None
        return layer.plans.forward.problem

    plain = seen()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert seen().fp32_precision != plain.fp32_precision
    finally:
        torch.set_float32_matmul_precision(precision)
    try:
        torch.use_deterministic_algorithms(True)
        assert seen() == replace(plain, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen() == plain
