"""One rank of a distributed test: runs scenarios by name and writes down what it saw. Started by test_distributed.

A scenario returns facts that JSON can hold; it raises where something is wrong, and the test shows the traceback.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import adaptconv
from adaptconv.records import Store, store
from adaptconv.records.layers import Layer


def close(ours: Tensor, theirs: Tensor, what: object, tolerance: float = 1e-4) -> None:
    """Values that agree, relative to the largest; DTensors by their whole value."""
    ours = (ours.full_tensor() if hasattr(ours, "full_tensor") else ours).detach()
    theirs = theirs.detach()
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * (scale + 1), msg=lambda m: f"{what}: {m}"
    )  # fmt: skip


def pins(*names: str | None) -> Iterator[tuple[str | None, Any]]:
    """Each name with the context that pins it; None pins nothing."""
    for name in names:
        yield name, adaptconv.pinned(name) if name else contextlib.nullcontext()


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Rewritten graphs run as they are: Inductor takes seconds, and what is tested is the rewriting."""
    from adaptconv.compile import inductor

    kept = inductor._missing_toolchain
    inductor._missing_toolchain = lambda inputs: "a test asked for it"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*runs uncompiled")
            yield
    finally:
        inductor._missing_toolchain = kept


def only_database(folder: Path) -> None:
    """Make a folder the one layer of the database: what is shipped, or lies about, decides nothing."""
    fresh = Store(folder)
    nothing = (Layer(name, None) for name in ("project", "user", "shipped"))
    fresh.__dict__["layers"] = (Layer("override", folder), *nothing)
    store.use_database(folder)
    store._default = fresh


def main() -> None:
    """``RANK WORLD INIT_FILE RESULT_FILE MODULE:SCENARIO...``."""
    rank, world, init, result, *names = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
    torch.set_num_threads(1)
    only_database(Path(result).parent / "empty")
    dist.init_process_group(
        "gloo", init_method=f"file://{init}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60)
    )
    facts: dict[str, Any] = {}
    for name in names:
        module, _, function = name.partition(":")
        torch.manual_seed(7)
        try:
            facts[name] = getattr(importlib.import_module(f"tests.distributed.{module}"), function)(rank, world)
        except Exception:  # noqa: BLE001 - the test shows it
            facts[name] = {"failed": traceback.format_exc()}
            break  # the ranks are no longer in step
        finally:
            Path(result).write_text(json.dumps(facts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may wait for a rank that failed


if __name__ == "__main__":
    main()
