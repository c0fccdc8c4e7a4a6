"""Ranks whose tuning databases differ: nobody waits, and all compile the same plans."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import adaptconv
from adaptconv import records
from adaptconv.compile.optimize import collect_sites, log_of
from adaptconv.dispatch import backend_named
from adaptconv.ranks import RanksDisagree
from adaptconv.records import Record
from tests.distributed.training import BATCH, Net, Small, ddp, fsdp, train_alike
from tests.distributed.worker import only_database, uncompiled


def own_database(rank: int, world: int) -> None:
    """A database for this rank alone, by which every site of Net is another backend's than on the next rank."""
    only_database(Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"])))
    backend = backend_named(("gather", "cpp")[rank % 2])
    for site in collect_sites(Net(), (torch.randn(BATCH // world, 8, 40, requires_grad=True),), train=True):
        for problem in site.problems():
            if backend.rejects(problem) is None:
                records.default_store().write(
                    Record(
                        key=problem.key(), backend=backend.name, version=backend.version,
                        config=dict(backend.space(problem).default), p20_us=1.0, median_us=1.0, p80_us=1.0,
                        native_us=1000.0, error=1e-7, native_error=1e-7,
                        toolchain=records.toolchain(torch.device("cpu")), measured_on="2026-01-31",
                    )
                )  # fmt: skip


def plans_of(model: Any) -> dict[str, str]:
    """The plans of a model's sites by where they are."""
    log = log_of(model)
    assert log is not None
    return {
        f"{site.where} {site.kind} {site.problem.key()}": f"{site.rewritten} {site.plans.text}"
        for site in log.sites
        if site.plans is not None and site.problem is not None
    }


def _trained(rank: int, world: int, wrap: Any, alone: bool) -> Any:
    own_database(rank, world)
    with warnings.catch_warnings(record=True) as caught, uncompiled():
        warnings.simplefilter("always")
        net = train_alike(rank, world, lambda model: adaptconv.optimize(wrap(model)), evaluate=False)
        if alone and rank == world - 1:  # a graph that no other rank compiles
            adaptconv.optimize(Small())(torch.randn(2, 8, 50))
    dist.barrier()
    told = [str(w.message) for w in caught if issubclass(w.category, RanksDisagree)]
    return {"plans": plans_of(net), "told": told, "digest": records.default_store().digest()}


def ddp_apart(rank: int, world: int) -> Any:
    return _trained(rank, world, ddp, True)


def fsdp_apart(rank: int, world: int) -> Any:
    return _trained(rank, world, fsdp, False)


def eager_apart(rank: int, world: int) -> Any:
    """Eager layers go by each rank's own database: other plans, equal values."""
    own_database(rank, world)
    net = train_alike(rank, world, lambda model: ddp(model))
    return {"plans": net.module.holes.plans.text, "digest": records.default_store().digest()}
