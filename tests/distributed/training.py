"""DDP and FSDP2: a training run, step by step, against the same run in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import adaptconv
from adaptconv.compile.optimize import forget_compiled, log_of
from adaptconv.kernels import LearnableSpacing, cache
from tests.distributed.worker import close, pins, uncompiled

STEPS, BATCH = 2, 8
Wrap = Callable[[nn.Module], nn.Module]


class Net(nn.Module):
    """Depthwise, so that every backend can be pinned: torch's layers, a sum of two, taps, a constructed kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(8, 8, 7, padding=9, dilation=3, groups=8)
        self.near = nn.Conv1d(8, 8, 3, padding="same", groups=8)
        self.far = nn.Conv1d(8, 8, 3, padding=4, dilation=4, groups=8, bias=False)
        self.holes = adaptconv.AdaptiveConv1d(8, 8, taps="1010011", padding="same", groups=8)
        self.learnt = adaptconv.AdaptiveConv1d(8, 8, LearnableSpacing(3, 9), padding="same", groups=8)
        self.mixed = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.wide(x))
        x = self.near(x) + self.far(x)
        x = self.learnt(self.holes(x))
        return self.mixed(x.transpose(1, 2))


class Small(nn.Module):
    """One graph, cheap to compile."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(8, 8, 7, padding=9, dilation=3, groups=8)
        self.holes = adaptconv.AdaptiveConv1d(8, 8, taps="1010011", padding="same", groups=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.holes(F.gelu(self.wide(x))).transpose(1, 2)


def train_alike(rank: int, world: int, wrap: Wrap, net: type[nn.Module] = Net, evaluate: bool = True) -> nn.Module:
    """Train a wrapped copy on this rank's share of each batch, and the plain model on all of it; compare as it goes.

    Outputs, gradients, and the outputs of evaluation after each step, when whatever was kept of old weights is stale.
    """
    torch.manual_seed(7)
    plain = net()
    ours = wrap(copy.deepcopy(plain))
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (plain, ours)]
    for step in range(STEPS):
        x, cotangent = torch.randn(BATCH, 8, 40), torch.randn(BATCH, 40, 8)
        expected, got = plain(x), ours(x[share])
        close(got, expected[share], ("output", step))
        for optimizer in optimizers:
            optimizer.zero_grad()
        (expected * cotangent).sum().backward()
        (got * cotangent[share]).sum().mul(world).backward()  # gradients are averaged over the ranks
        for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None, name
            close(q.grad, p.grad, (name, step), 1e-3)
        for optimizer in optimizers:
            optimizer.step()
        if evaluate:
            check_kept(plain, ours, x, share)
    return ours


def check_kept(plain: nn.Module, ours: nn.Module, x: Tensor, share: slice) -> None:
    """Evaluate, change the weights, evaluate again. With gradients, as the plain model is called, nothing is kept."""
    for what in ("evaluation", "evaluation of changed weights"):
        with torch.no_grad():
            got = ours(x[share])
        close(got, plain(x)[share], what)
        for module in ours.modules():
            if hasattr(module, "reshard"):  # FSDP's outermost group is still as its last call needed it
                module.reshard()
        with torch.no_grad():
            for p in (*plain.parameters(), *ours.parameters()):
                p.mul_(1.1)


def ddp(model: nn.Module) -> nn.Module:
    """DDP with buckets so small that its pass over compiled graphs cuts them."""
    dist._DEFAULT_FIRST_BUCKET_BYTES = 64  # type: ignore[attr-defined]  # a mebibyte, whatever the others' size
    return nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.0001)  # type: ignore[arg-type]


def fsdp(model: Any) -> nn.Module:
    """FSDP2: groups of parameters for some layers, one for the rest."""
    from torch.distributed.fsdp import fully_shard

    for part in (model.wide, model.learnt):
        fully_shard(part)
    return fully_shard(model)


def blocks(model: nn.Module) -> nn.Module:
    """Layers compiled one by one, as is usual beneath FSDP."""
    for name in ("wide", "holes"):
        setattr(model, name, adaptconv.optimize(getattr(model, name)))
    return model


def seen(model: nn.Module) -> dict[str, int]:
    """How many graphs were compiled, and how many sites rewritten."""
    log = log_of(model)
    assert log is not None
    return {"graphs": log.graphs, "rewritten": sum(site.rewritten for site in log.sites)}


def ddp_eager(rank: int, world: int) -> Any:
    for _, pin in pins(None, "gather", "cpp"):
        with pin:
            train_alike(rank, world, ddp)
    return "agree"


def ddp_optimized(rank: int, world: int) -> Any:
    facts = {}
    with uncompiled():
        for name, pin in pins(None, "gather", "cpp"):
            forget_compiled()
            with pin:
                net = train_alike(rank, world, lambda model: adaptconv.optimize(ddp(model)), evaluate=False)
                facts[str(name)] = seen(net)
        forget_compiled()
        with adaptconv.pinned("dense"):  # the other way round
            train_alike(rank, world, lambda model: ddp(adaptconv.optimize(model)), Small)
    return facts


def ddp_optimized_gather(rank: int, world: int) -> Any:
    with uncompiled(), adaptconv.pinned("gather"):
        return seen(train_alike(rank, world, lambda model: adaptconv.optimize(ddp(model)), evaluate=False))


def ddp_through_inductor(rank: int, world: int) -> Any:
    wrap = nn.parallel.DistributedDataParallel
    with adaptconv.pinned("gather"):
        net = train_alike(rank, world, lambda model: adaptconv.optimize(wrap(model)), Small, evaluate=False)
    return seen(net)


def fsdp_eager(rank: int, world: int) -> Any:
    for _, pin in pins(None, "gather", "cpp"):
        with pin:
            train_alike(rank, world, fsdp)
    return "agree"


def fsdp_refills(rank: int, world: int) -> Any:
    """FSDP's writes leave a parameter's version as it was: a kernel kept by that, as on a GPU, would be an old one.

    There an allocator gives the parameter its old place again, so the place tells nothing either.
    """
    kept = cache._mark, cache._is_marked
    cache._mark = lambda tensor: (tensor, tensor._version)
    cache._is_marked = lambda tensor, mark: mark[0] is tensor and mark[1] == tensor._version
    try:
        train_alike(rank, world, fsdp)
    finally:
        cache._mark, cache._is_marked = kept
    return "agree"


def fsdp_optimized(rank: int, world: int) -> Any:
    facts = {}
    with uncompiled():
        for name, pin in pins(None, "gather"):
            forget_compiled()
            with pin:
                net = train_alike(rank, world, lambda model: adaptconv.optimize(fsdp(model)), evaluate=False)
                facts[str(name)] = seen(net)
        forget_compiled()
        with adaptconv.pinned("cpp"):
            train_alike(rank, world, lambda model: fsdp(blocks(model)), evaluate=False)
    return facts
