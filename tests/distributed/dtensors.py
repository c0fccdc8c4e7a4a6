"""DTensor operands: values, gradients and placements against the same convolution of plain tensors."""

from __future__ import annotations

import copy
import itertools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

import adaptconv
from adaptconv import ops
from adaptconv.errors import AdaptConvError
from adaptconv.kernels import FixedTaps, Interpolated, LearnableSpacing, Masked, Symmetric
from tests.distributed.worker import close, pins, uncompiled

R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
Placements = tuple[Placement, ...]
# (batch, channels in, channels out, groups): even, one group a channel, and nothing that divides by two or four
EXTENTS = ((4, 8, 16, 1), (4, 8, 16, 4), (1, 8, 8, 8), (3, 9, 6, 3), (5, 6, 9, 1))


def agree(
    mesh: DeviceMesh, extents: tuple[int, int, int, int], x_at: Placements, w_at: Placements, bias_at: Placements,
    axes: int = 2,
) -> Placements:  # fmt: skip
    """One convolution and its gradients, placed so; the result's placements."""
    n, c_in, c_out, groups = extents
    made = torch.Generator().manual_seed(1)
    shapes = ((n, c_in, *(7,) * axes), (c_out, c_in // groups, *(3,) * axes), (c_out,))
    plain = [torch.randn(shape, generator=made).requires_grad_() for shape in shapes]
    torch_conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
    our_conv = {1: adaptconv.conv1d, 2: adaptconv.conv2d, 3: adaptconv.conv3d}[axes]
    expected = torch_conv(*plain, padding=2, dilation=2, groups=groups)
    cotangent = torch.randn(expected.shape, generator=made)
    gradients = torch.autograd.grad(expected, plain, cotangent)
    placed = [
        distribute_tensor(t.detach(), mesh, at).requires_grad_()
        for t, at in zip(plain, (x_at, w_at, bias_at), strict=True)
    ]
    y = our_conv(*placed, padding=2, dilation=2, groups=groups)
    what = (extents, x_at, w_at, bias_at)
    assert isinstance(y, DTensor) and y.shape == expected.shape, what
    close(y, expected, what)
    whole = distribute_tensor(cotangent, mesh, [R] * mesh.ndim)
    ours = torch.autograd.grad((y * whole).sum(), placed)
    for name, mine, theirs, operand in zip(("x", "w", "bias"), ours, gradients, placed, strict=True):
        assert mine.placements == operand.placements, (name, what, mine.placements)
        close(mine, theirs, (name, what), 1e-3)
    return tuple(y.placements)


def rules(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (world,))
    facts = {}
    for name, pin in pins(None, "gather", "dense"):
        with pin:
            for extents in EXTENTS if name != "dense" else EXTENTS[1:2]:
                for x_at, w_at, b_at in itertools.product((R, S0, S1, S2), (R, S0, S1, S2), (R, S0)):
                    (y_at,) = agree(mesh, extents, (x_at,), (w_at,), (b_at,))
                    if name is None and extents == EXTENTS[0] and b_at == R:
                        facts[f"{x_at!r} {w_at!r}"] = repr(y_at)
    with adaptconv.pinned("cpp"):
        for x_at, w_at in itertools.product((R, S0, S1, S2), (R, S0)):
            agree(mesh, (4, 8, 8, 8), (x_at,), (w_at,), (R,))
    for axes in (1, 3):
        agree(mesh, (4, 8, 8, 8), (S0,), (R,), (R,), axes)
    return facts


def few_rules(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (world,))
    facts = {}
    for extents in EXTENTS[:4]:
        for x_at, w_at in itertools.product((R, S0, S1, S2), (R, S0, S1)):
            (y_at,) = agree(mesh, extents, (x_at,), (w_at,), (S0,))
            if extents == EXTENTS[0]:
                facts[f"{x_at!r} {w_at!r}"] = repr(y_at)
    return facts


def two_dimensions(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "model"))
    with adaptconv.pinned("gather"):
        for extents in ((4, 8, 8, 1), (4, 8, 8, 4)):
            for x_at in itertools.product((R, S0, S1), (R, S0, S1, S2)):
                for w_at in itertools.product((R, S0), (R, S0, S1)):
                    agree(mesh, extents, x_at, w_at, (R, S0))
    return "agree"


def layer_agrees(mesh: DeviceMesh, layer: nn.Module, x: Tensor, x_at: Placement, w_at: Placement) -> str:
    """A layer whose parameters and input are placed so, against itself; the result's placement."""
    x = x.detach().clone().requires_grad_()
    expected = layer(x)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (x, *layer.parameters()), cotangent)

    def placed(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for own, p in list(module.named_parameters(recurse=False)):
            module.register_parameter(own, nn.Parameter(distribute_tensor(p.detach(), mesh, [w_at])))

    ours = distribute_module(copy.deepcopy(layer), mesh, placed)
    shared = distribute_tensor(x.detach(), mesh, [x_at]).requires_grad_()
    y = ours(shared)
    close(y, expected, (layer, x_at, w_at))
    whole = distribute_tensor(cotangent, mesh, [R])
    mine = torch.autograd.grad((y * whole).sum(), (shared, *ours.parameters()))
    for a, b in zip(mine, gradients, strict=True):
        close(a, b, (layer, x_at, w_at), 1e-3)
    return repr(y.placements[0])


def layers(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(3, 4, 8, 8)
    facts = {}
    for mode in ("zeros", "circular", "reflect", "replicate"):
        layer = adaptconv.AdaptiveConv2d(4, 4, 3, padding=(2, 1), padding_mode=mode)
        facts[mode] = [layer_agrees(mesh, layer, x, at, R) for at in (R, S0, S1, S2)]
    families = (
        FixedTaps.of("101/010/101"), Interpolated(3), Interpolated(3, learn_footprint=True), Masked(3, density=0.5),
        LearnableSpacing(count=3, window=5), LearnableSpacing(count=3, window=5, shared=True), Symmetric(3),
    )  # fmt: skip
    for family in families:
        layer = adaptconv.AdaptiveConv2d(4, 4, family, padding="same")
        for x_at, w_at in ((R, R), (S0, R), (S1, R), (R, S0)):
            layer_agrees(mesh, layer, x, x_at, w_at)
    return facts


def formats_and_orders(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (world,))
    x, w = torch.randn(4, 4, 6, 6, dtype=torch.float64), torch.randn(4, 4, 3, 3, dtype=torch.float64)
    turned = x.contiguous(memory_format=torch.channels_last)
    shared = DTensor.from_local(turned.chunk(world)[rank], mesh, [S0])
    kernel = distribute_tensor(w, mesh, [R])
    y, expected = adaptconv.conv2d(shared, kernel), F.conv2d(turned, w)
    assert y.stride() == expected.stride()
    close(y, expected, "channels_last")
    with torch.autocast("cpu", torch.bfloat16):
        narrow = adaptconv.conv2d(shared.float(), kernel.float())
    assert narrow.dtype is torch.bfloat16
    unbatched = adaptconv.conv2d(distribute_tensor(x[0], mesh, [S0]), kernel)
    close(unbatched, F.conv2d(x[0], w), "unbatched")
    sums = DTensor.from_local(x, mesh, [Partial()])
    close(adaptconv.conv2d(sums, kernel), F.conv2d(x * world, w), "partial sums")
    if TORCH < (2, 13):  # its DTensors have no second derivatives, of any operation
        return "agree"
    plain = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    placed = [distribute_tensor(t.detach(), mesh, [at]).requires_grad_() for t, at in zip(plain, (S0, R), strict=True)]
    second = []
    for operands, conv in ((plain, F.conv2d), (placed, adaptconv.conv2d)):
        first = torch.autograd.grad(conv(*operands).square().sum(), operands, create_graph=True)
        second.append(torch.autograd.grad(sum(g.square().sum() for g in first), operands))
    for theirs, ours in zip(*second, strict=True):
        close(ours, theirs, "second order")
    return "agree"


def refusals(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (world,))
    x, w, b = torch.randn(4, 4, 6, 6), torch.randn(4, 4, 3, 3), torch.randn(4)
    dx, dw, db = (distribute_tensor(t, mesh, [R]) for t in (x, w, b))
    other = distribute_tensor(w, init_device_mesh("cpu", (world, 1)), [R, R])
    calls = {
        "plain weight": (dx, w, None), "plain input": (x, dw, None), "plain bias": (dx, dw, b),
        "sharded bias alone": (x, w, db), "another mesh": (dx, other, None),
        "channels": (dx, distribute_tensor(torch.randn(4, 3, 3, 3), mesh, [S0]), None),
    }  # fmt: skip
    adaptconv.conv2d(x, w, b)  # the same shapes, prepared for plain tensors
    facts = {}
    for name, operands in calls.items():
        try:
            adaptconv.conv2d(*operands)
        except AdaptConvError as error:
            facts[name] = [type(error).__name__, str(error)]
    return facts


def compiled(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(4, 4, 8, 8)
    facts = {"auto plan": ops.auto_plan()}
    with uncompiled():
        for x_at, w_at in ((S0, R), (R, S0), (S1, R), (S2, R)):
            torch._dynamo.reset()
            layer = adaptconv.AdaptiveConv2d(4, 4, 3, padding=2, dilation=2)
            facts[f"{x_at!r} {w_at!r}"] = layer_agrees(mesh, _Optimized(layer), x, x_at, w_at)
    return facts


class _Optimized(nn.Module):
    """A layer that is called through ``optimize`` where its parameters are DTensors, and plainly where they are not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        call = adaptconv.optimize(self.layer) if isinstance(x, DTensor) else self.layer
        y: Tensor = call(x)
        return y


def caches(rank: int, world: int) -> Any:
    """Through Inductor, twice: the second time from the caches that all ranks write to."""
    from torch._dynamo.utils import counters

    mesh = init_device_mesh("cpu", (world,))
    x, w, b = torch.randn(4, 4, 20), torch.randn(4, 4, 3), torch.randn(4)
    placed = (distribute_tensor(x, mesh, [S1]), distribute_tensor(w, mesh, [R]), distribute_tensor(b, mesh, [R]))
    for _ in range(2):
        torch._dynamo.reset()
        torch.distributed.barrier()
        with torch.no_grad():
            y = torch.compile(adaptconv.conv1d)(*placed)
        close(y, F.conv1d(x, w, b), "from the cache")
    return {"hits": counters["aot_autograd"]["autograd_cache_hit"], "folder": os.environ["TORCHINDUCTOR_CACHE_DIR"]}
