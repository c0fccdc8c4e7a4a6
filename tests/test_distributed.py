"""Several ranks: DDP, FSDP2 and DTensors answer as one process does, and ranks agree on plans.

Each test starts ranks of its own (``tests/distributed``), over gloo and a file, and kills those that take too long.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaptconv import ops, ranks
from adaptconv.compile import agreement
from adaptconv.compile.judging import judge
from adaptconv.compile.optimize import collect_sites, optimize
from adaptconv.ranks import RanksDisagree

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
ROOT = Path(__file__).parents[1]
LIMIT_S = 300.0  # to end a hang; alone on two cores each takes a few seconds


def launch(world: int, folder: Path, *scenarios: str) -> list[dict[str, Any]]:
    """Run scenarios on so many ranks; what each rank saw, by scenario. No process outlives the call."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    logs = [folder / f"log{rank}" for rank in range(world)]
    results = [folder / f"result{rank}.json" for rank in range(world)]
    started = []
    try:
        for rank in range(world):
            command = [sys.executable, "-m", "tests.distributed.worker", str(rank), str(world)]
            command += [str(folder / "init"), str(results[rank]), *scenarios]
            with logs[rank].open("w") as log:
                started.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
        end = time.monotonic() + LIMIT_S
        for process in started:
            process.wait(max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pytest.fail(f"the ranks were still running after {LIMIT_S:.0f} s\n" + _tails(logs))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    missing = [rank for rank, result in enumerate(results) if not result.exists()]
    assert not missing, f"ranks {missing} came to nothing\n" + _tails(logs)
    seen = [json.loads(result.read_text()) for result in results]
    failed = [
        f"rank {rank}, {name}:\n{facts['failed']}"
        for rank, one in enumerate(seen)
        for name, facts in one.items()
        if isinstance(facts, dict) and "failed" in facts
    ]
    assert not failed, "\n".join(failed)
    assert all(set(one) == set(scenarios) for one in seen), _tails(logs)
    return seen


def _tails(logs: list[Path]) -> str:
    return "\n".join(f"-- {log.name}:\n{log.read_text()[-3000:]}" for log in logs if log.exists())


# ---- DDP and FSDP2 ------------------------------------------------------------------------------------


def test_ddp_trains_as_one_process_does(tmp_path: Path) -> None:
    one, other = launch(2, tmp_path, "training:ddp_eager", "training:ddp_optimized")
    assert one == other
    for pin in ("gather", "cpp"):
        facts = one["training:ddp_optimized"][pin]
        assert facts["graphs"] > 4, "DDP's pass over compiled graphs cuts them at its buckets"
        assert facts["rewritten"] == 4  # every site of every piece: torch's, the sum, the taps, the constructed


def test_fsdp_trains_as_one_process_does(tmp_path: Path) -> None:
    one, other = launch(2, tmp_path, "training:fsdp_eager", "training:fsdp_refills", "training:fsdp_optimized")
    assert one == other
    assert one["training:fsdp_optimized"]["gather"]["rewritten"] >= 3


def test_ddp_and_fsdp_on_four_ranks(tmp_path: Path) -> None:
    assert len(launch(4, tmp_path, "training:ddp_eager", "training:fsdp_eager", "training:ddp_optimized_gather")) == 4


def test_ddp_through_inductor(tmp_path: Path) -> None:
    for facts in launch(2, tmp_path, "training:ddp_through_inductor"):
        assert facts["training:ddp_through_inductor"]["rewritten"] == 2


# ---- DTensors -----------------------------------------------------------------------------------------

RULES = {  # (input, weight) of one group -> result; the rest becomes whole first
    ("Shard(dim=0)", "Replicate()"): "Shard(dim=0)",
    ("Shard(dim=0)", "Shard(dim=0)"): "Shard(dim=0)",
    ("Replicate()", "Shard(dim=0)"): "Shard(dim=1)",
    ("Shard(dim=1)", "Shard(dim=0)"): "Shard(dim=1)",
    ("Shard(dim=1)", "Replicate()"): "Partial(sum)",
    ("Shard(dim=1)", "Shard(dim=1)"): "Partial(sum)",
    ("Replicate()", "Shard(dim=1)"): "Partial(sum)",
    ("Shard(dim=2)", "Replicate()"): "Replicate()",
    ("Replicate()", "Replicate()"): "Replicate()",
}


@pytest.mark.parametrize("world", [2, 4])
def test_dtensors_of_every_placement_answer_as_plain_tensors_do(world: int, tmp_path: Path) -> None:
    names = ["dtensors:rules"] if world == 2 else ["dtensors:few_rules", "dtensors:two_dimensions"]
    for facts in launch(world, tmp_path, *names):
        found = facts[names[0]]
        assert {pair: found[" ".join(pair)] for pair in RULES} == RULES


def test_layers_of_dtensors(tmp_path: Path) -> None:
    names = ("layers", "formats_and_orders", "refusals", "compiled")
    seen = launch(2, tmp_path, *(f"dtensors:{name}" for name in names))
    for facts in seen:
        for mode, placements in facts["dtensors:layers"].items():
            assert placements == ["Replicate()", "Shard(dim=0)", "Partial(sum)", "Replicate()"], mode
        refused = facts["dtensors:refusals"]
        kinds = {name: kind for name, (kind, _) in refused.items()}
        mixed = dict.fromkeys(
            ("plain weight", "plain input", "plain bias", "sharded bias alone", "another mesh"), "ShardingError"
        )
        assert kinds == {**mixed, "channels": "ConvArgumentError"}
        assert "distribute_tensor(weight, mesh, [Replicate()])" in refused["plain weight"][1]
        assert facts["dtensors:compiled"]["Shard(dim=1) Replicate()"] == "Partial(sum)"
    texts = {facts["dtensors:compiled"]["auto plan"] for facts in seen}
    assert len(texts) == 2, "graphs of DTensors differ from rank to rank, and so must their keys in caches"
    assert ops.auto_plan() not in texts
    assert "@" not in ops.auto_plan(), "one process: nothing to tell apart"


def test_a_rank_takes_no_other_ranks_graph_from_the_cache(tmp_path: Path) -> None:
    for facts in launch(2, tmp_path, "dtensors:caches"):
        if torch.torch_version.TorchVersion(torch.__version__) >= (2, 13):  # before, graphs of DTensors are not kept
            assert facts["dtensors:caches"]["hits"] >= 1


# ---- agreement ------------------------------------------------------------------------------------------


def test_different_databases_on_different_ranks(tmp_path: Path) -> None:
    started = time.monotonic()
    names = ("ddp_apart", "fsdp_apart", "eager_apart")
    one, other = launch(2, tmp_path, *(f"databases:{name}" for name in names))
    assert time.monotonic() - started < LIMIT_S
    for name in ("databases:ddp_apart", "databases:fsdp_apart"):
        assert one[name]["digest"] != other[name]["digest"]
        shared = set(one[name]["plans"]) & set(other[name]["plans"])
        assert len(shared) >= 3
        assert all(one[name]["plans"][site] == other[name]["plans"][site] for site in shared)
        assert all(plan.startswith("True ") for plan in one[name]["plans"].values())
    told = [text for facts in (one, other) for name in names[:2] for text in facts[f"databases:{name}"]["told"]]
    assert 1 <= len(told) <= 2, "once a process, and only where a decision was taken over"
    assert all("ADAPTCONV_DB" in text and "different tuning databases" in text for text in told)
    apart = [facts["databases:eager_apart"]["plans"].split("@")[0] for facts in (one, other)]
    assert apart == ["gather", "cpp"], "eager calls go by each rank's own"


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as rank 1 of 2, with no process group."""
    monkeypatch.setattr(ranks, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(agreement, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(ranks, "_warned", False)
    monkeypatch.setattr(agreement, "_warned", False)


@pytest.mark.usefixtures("second_of_two")
def test_a_store_that_fails_costs_one_warning_and_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", fails)
    with pytest.warns(RanksDisagree, match="RuntimeError: gone"):
        assert ranks.first_said("a topic", "mine") == "mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ranks.first_said("another", "mine") == "mine"


@pytest.mark.usefixtures("second_of_two")
def test_the_first_to_speak_is_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    assert [ranks.first_said("a", "one"), ranks.first_said("a", "two"), ranks.first_said("b", "two")] == [
        "one", "one", "two",
    ]  # fmt: skip


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("said", ["gather@999{workspace_mib=32}|-|-", "nosuch@1{}|-|-", "gather@1{}|-|-", "?"])
def test_a_decision_that_cannot_be_run_here_is_not_taken(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {"stated": False, "rewritten": True, "plans": said, "reason": "", "rank": 0}
    monkeypatch.setattr(agreement, "first_said", lambda topic, mine: json.dumps(theirs))
    (site,) = collect_sites(nn.Conv1d(4, 4, 3), (torch.randn(1, 4, 9),))
    own, verdict = judge(site)
    with pytest.warns(RanksDisagree, match="keeps its own"):
        assert agreement.agreed(site, own, verdict) == (own, verdict)


@pytest.mark.usefixtures("second_of_two")
def test_a_decision_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = {
        "stated": False, "rewritten": True, "plans": "gather@1{workspace_mib=32}|-|-", "reason": "", "rank": 0,
    }  # fmt: skip
    monkeypatch.setattr(agreement, "first_said", lambda topic, mine: json.dumps(theirs))
    (site,) = collect_sites(nn.Conv1d(4, 4, 3), (torch.randn(1, 4, 9),))
    with pytest.warns(RanksDisagree, match="takes its decision"):
        _, verdict = agreement.agreed(site, *judge(site))
    assert verdict.rewritten
    assert verdict.plans is not None
    assert verdict.plans.text == theirs["plans"]


def test_alone_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("a single process asked a store")

    monkeypatch.setattr(agreement, "first_said", asked)
    optimize(nn.Conv1d(4, 4, 3))(torch.randn(1, 4, 9))
    assert ranks.first_said("topic", "mine") == "mine"
