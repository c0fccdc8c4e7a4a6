"""Inductor's caches on disk: a second process takes what the first compiled, and never a plan that is not today's.

Four processes one after the other, over one database and one cache; ``cache_process.py`` is what each does. Which
kernels ran is read off torch's profiler: ``gather`` is a matrix product, ``aten::bmm``, and nothing else here is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import adaptconv
from adaptconv import ops
from adaptconv.backends import BACKENDS
from tests.cache_process import release

ROOT = Path(adaptconv.__file__).parents[1]
WAYS = ("static", "stock", "dynamic")
GATHER, DENSE, APART = (
    "gather@1{workspace_mib=32}", "dense@1{layout=asis,pad=implicit}", "native@1{layout=contiguous,pad=implicit}",
)  # fmt: skip


def _in_all(forward: str, gradients: str) -> dict[str, str]:
    return {"forward": forward, "grad_input": gradients, "grad_weight": gradients}


RECORDS = {
    "traced": _in_all(DENSE, "dense@1{layout=asis,pad=implicit,route=native}"),
    "opaque": _in_all(APART, "native@1{layout=contiguous,pad=implicit,route=native}"),
    "own": _in_all(GATHER, GATHER),
}


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each of the four processes printed."""
    folder = tmp_path_factory.mktemp("caches")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("ADAPTCONV_DB", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        environment[name] = str(folder / name.lower())
        (folder / name.lower()).mkdir(mode=0o700)

    def process(**asked: Any) -> Any:
        command = [sys.executable, "-m", "tests.cache_process", json.dumps(asked)]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return {
        "first": process(records=RECORDS),
        "second": process(),
        "released": process(release={"gather": 2}),
        "changed": process(records={"own": {"forward": DENSE}}),
    }


def test_the_first_process_compiles_every_kind_of_site(history: dict[str, Any]) -> None:
    first = history["first"]
    assert first["written"] == 9
    plans = {where: text.partition("|")[0] for where, text in first["static"]["plans"].items()}
    assert plans == {"traced": DENSE, "opaque": APART, "own": GATHER}
    assert "adaptconv::direction" in first["static"]["ran"], "the opaque plan"
    assert "adaptconv::direction" not in first["stock"]["ran"], "traced in"
    assert "adaptconv::direction" in first["dynamic"]["ran"], "planned at run time"
    for way in WAYS:
        assert first[way]["inductor"] == {"fxgraph_cache_miss": 3}, "forward, backward, inference"
        assert first[way]["aot"] == {"autograd_cache_miss": 2, "autograd_cache_saved": 2}, "nothing bypassed"
        assert "aten::bmm" in first[way]["ran"]


@pytest.mark.parametrize("way", WAYS)
def test_the_second_process_compiles_nothing(history: dict[str, Any], way: str) -> None:
    first, second = history["first"][way], history["second"][way]
    assert second["inductor"] == {"fxgraph_cache_hit": 3}
    assert second["aot"] == {"autograd_cache_hit": 2}
    for fact in ("ran", "bits", "plans"):
        assert second[fact] == first[fact]


@pytest.mark.parametrize("way", WAYS)
def test_a_kernel_of_another_version_is_not_served(history: dict[str, Any], way: str) -> None:
    """The record is of gather's version 1; where that is 2, nothing says how fast it is, and it is not run."""
    first, released = history["first"][way], history["released"][way]
    assert released["aot"] == {"autograd_cache_miss": 2, "autograd_cache_saved": 2}
    assert "aten::bmm" not in released["ran"]
    assert released["norms"] == pytest.approx(first["norms"], rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_one_changed_record_changes_what_runs(history: dict[str, Any], way: str) -> None:
    assert history["changed"]["written"] == 1
    first, changed = history["first"][way], history["changed"][way]
    assert changed["aot"]["autograd_cache_miss"] >= 1
    assert "aten::bmm" not in changed["ran"]
    assert {"aten::mkldnn_convolution", "aten::convolution"} & set(changed["ran"])
    assert changed["bits"] != first["bits"], "another order of adding up"
    assert changed["norms"] == pytest.approx(first["norms"], rel=1e-5)
    if way != "stock":
        assert changed["plans"]["own" if way == "static" else ""].startswith(DENSE)


def test_a_plan_left_to_run_time_is_named_after_all_it_will_rest_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ops.auto_plan()
    assert plain == ops.auto_plan()
    with adaptconv.pinned("gather"):
        assert ops.auto_plan() != plain
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert ops.auto_plan() != plain, "plans are made for a number of threads"
    finally:
        torch.set_num_threads(threads)
    assert ops.auto_plan() == plain
    for backend in BACKENDS:
        with monkeypatch.context() as patch:
            patch.setattr(type(backend), "version", backend.version)
            release(backend.name, backend.version + 1)
            assert ops.auto_plan() != plain, backend.name
    assert ops.auto_plan() == plain
