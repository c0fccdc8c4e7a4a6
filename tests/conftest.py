"""What every test gets: an empty database of its own, caches that are nobody else's, and few threads."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything reads them, child processes included.
_SCRATCH = tempfile.TemporaryDirectory(prefix="adaptconv-tests-")
for _name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    os.environ[_name] = os.path.join(_SCRATCH.name, _name.lower())
os.environ.pop("ADAPTCONV_DB", None)
# Threads that spin for work cost most of the run where other processes share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from adaptconv.records import Store, store  # noqa: E402
from adaptconv.records.layers import Layer  # noqa: E402

torch.set_num_threads(2)
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty database, writable, that is the only layer: no shipped, project or user records decide a test."""
    folder = tmp_path_factory.mktemp("database")
    fresh = Store(folder)
    fresh.__dict__["layers"] = (
        Layer("override", folder), Layer("project", None), Layer("user", None), Layer("shipped", None),
    )  # fmt: skip
    store.use_database(folder)
    store._default = fresh
    yield folder
    store.use_database(None)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_traces() -> Iterator[None]:
    """Dynamo compiles one piece of code eight times and then no more: each test has all of them to itself.

    What optimized models were found to hold is forgotten with it.
    """
    yield
    optimizing, dynamo = sys.modules.get("adaptconv.compile.optimize"), sys.modules.get("torch._dynamo")
    if optimizing is not None:
        optimizing.forget_compiled()
    elif dynamo is not None:
        dynamo.reset()
