"""Sharded operands: a convolution of DTensors as one convolution of each rank's own part.

Torch's convolution of DTensors has a rule for few placements and answers wrong, without a word, for others (2.13:
weight and bias sharded over C_out; input sharded over H). Here each dimension of the mesh gets one of five rules, each
exact; an operand that is placed otherwise is first redistributed to what its rule asks for.

=========  ============  ========  ========  ==============  ===================================================
rule       x             w         bias      y               when
=========  ============  ========  ========  ==============  ===================================================
batch      Shard(N)      whole     whole     Shard(N)        x comes sharded over the batch
outputs    whole         Shard(0)  Shard(0)  Shard(C)        one group, w comes sharded over C_out
inputs     Shard(C)      Shard(1)  whole     Partial(sum)    one group, x or w comes sharded over C_in
groups     Shard(C)      Shard(0)  Shard(0)  Shard(C)        several groups, x or w comes sharded over channels
whole      whole         whole     whole     Replicate       everything else: spatial shards, partial sums, shards
                                                             that do not divide channels or groups evenly
=========  ============  ========  ========  ==============  ===================================================

Rules are tried in this order; "whole" is Replicate. Gradients come placed as their operands did: what a rank's part
contributes to a whole operand is summed over the ranks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adaptconv.errors import AdaptConvError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

Local = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


class ShardingError(AdaptConvError, RuntimeError):
    """DTensor operands that do not go together: plain tensors among them, or another mesh."""


class _Rule(NamedTuple):
    """Placements on one dimension of the mesh: of the operands, the result, and what backward gets of each operand."""

    name: str
    x: Placement
    w: Placement
    bias: Placement
    y: Placement
    grad_x: Placement
    grad_w: Placement
    grad_bias: Placement


def is_sharded(*operands: object) -> bool:
    """Whether any operand is a DTensor. Imports nothing: where nobody imported DTensors there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and any(isinstance(operand, kind) for operand in operands)


def convolve(
    local: Local, axes: int, input: DTensor, weight: DTensor, bias: DTensor | None, groups: int
) -> DTensor:  # fmt: skip
    """Convolve DTensors: redistribute to the rules' placements, convolve each rank's part, name the result's placement.

    Args:
        local: ``(x, w, bias, groups) -> y`` on plain tensors; differentiable.
        axes: spatial axes.
        input: ``[N, C_in, *spatial]`` or ``[C_in, *spatial]``.
        weight: ``[C_out, C_in/groups, *size]``, or compact, ``[C_out, C_in/groups, T]``.
        bias: ``[C_out]`` or None.
        groups: channel groups of the whole convolution.

    Returns:
        The result, placed as the module's table says.

    Raises:
        ShardingError: a plain tensor among the operands, operands on different meshes, or a rank outside the mesh.
    """
    from torch.distributed.tensor import DTensor

    mesh = _mesh_of(f"conv{axes}d", input=input, weight=weight, bias=bias)
    rules = _rules_for(axes, mesh, input, weight, groups)
    first = all(c == 0 for c, rule in zip(_place(axes, mesh), rules, strict=True) if rule.name == "inputs")
    x = _part(input, [r.x for r in rules], [r.grad_x for r in rules])
    w = _part(weight, [r.w for r in rules], [r.grad_w for r in rules])
    b = None if bias is None else _part(bias, [r.bias for r in rules], [r.grad_bias for r in rules])
    if b is not None and not first:
        # One part of a sum adds the bias. The others still answer for its gradient: a rank without one would leave
        # the rest waiting for it.
        b = b.masked_fill(torch.ones_like(b, dtype=torch.bool), 0)
    y = local(x, w, b, groups // _times(mesh, rules, "groups"))
    channel = y.dim() - axes - 1
    shape = (*input.shape[:channel], weight.shape[0], *y.shape[channel + 1 :])
    return DTensor.from_local(
        y, mesh, [r.y for r in rules], run_check=False, shape=torch.Size(shape), stride=_strides(shape, y)
    )


def replicated(function: Callable[..., Tensor], operands: Mapping[str, Tensor]) -> Tensor:
    """A function of whole tensors, computed alike on every rank from DTensors; the result is replicated.

    For what has no rule, such as constructing a kernel. Differentiable; gradients come placed as the operands did.

    Raises:
        ShardingError: as ``convolve``.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh = _mesh_of("a kernel of tensors", **operands)
    whole = [Replicate()] * mesh.ndim
    result = function(*(_part(operand, whole, whole) for operand in operands.values()))  # type: ignore[arg-type]
    return DTensor.from_local(result, mesh, whole, run_check=False)


def by_channel(function: Callable[[Tensor], Tensor], axes: int, input: Tensor) -> Tensor:
    """A function of each channel's own map (a padding), computed on each rank's part of a DTensor.

    Shards of the batch and of channels stay as they are; anything else becomes whole first.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    assert isinstance(input, DTensor)
    maps = input.dim() - axes
    kept = [p if type(p) is Shard and p.dim < maps else Replicate() for p in input.placements]
    part = function(_part(input, kept, kept))
    shape = (*input.shape[:maps], *part.shape[maps:])
    return DTensor.from_local(
        part, input.device_mesh, kept, run_check=False, shape=torch.Size(shape), stride=_strides(shape, part)
    )


def _mesh_of(what: str, **operands: Tensor | None) -> DeviceMesh:
    """The one mesh that all operands are on."""
    from torch.distributed.tensor import DTensor

    named = [(name, t) for name, t in operands.items() if t is not None]
    plain = [name for name, t in named if not isinstance(t, DTensor)]
    if plain:
        sharded = ", ".join(name for name, t in named if isinstance(t, DTensor))
        raise ShardingError(
            f"{what}: {sharded} came as DTensor and {', '.join(plain)} as plain tensor, which says nothing of how "
            f"it lies on the ranks; give all as DTensors, e.g. distribute_tensor({plain[0]}, mesh, [Replicate()])"
        )
    meshes = [(name, t.device_mesh) for name, t in named if isinstance(t, DTensor)]
    mesh = meshes[0][1]
    if any(other != mesh for _, other in meshes):
        given = "; ".join(f"{name} on {other}" for name, other in meshes)
        raise ShardingError(f"{what}: all operands must be DTensors on one mesh; got {given}")
    return mesh


def _place(axes: int, mesh: DeviceMesh) -> Sequence[int]:
    """Where this rank is in the mesh, one coordinate a dimension."""
    place = mesh.get_coordinate()
    if place is None:
        raise ShardingError(
            f"conv{axes}d: this rank is not in {mesh}, so it has no part of the operands; call it on ranks of the mesh"
        )
    return place


def _rules_for(axes: int, mesh: DeviceMesh, x: DTensor, w: DTensor, groups: int) -> list[_Rule]:
    """One rule a dimension of the mesh, in the order of the table."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    channel = x.dim() - axes - 1
    whole, add, over_c, over_0 = Replicate(), Partial(), Shard(max(channel, 0)), Shard(0)
    unsplit = _Rule("whole", whole, whole, whole, whole, whole, whole, whole)
    if channel not in (0, 1) or w.dim() < 3:
        return [unsplit] * mesh.ndim  # refused by whoever convolves the parts
    known = {
        "batch": _Rule("batch", over_0, whole, whole, over_0, over_0, add, add),
        "outputs": _Rule("outputs", whole, over_0, over_0, over_c, add, over_0, over_0),
        "inputs": _Rule("inputs", over_c, Shard(1), whole, add, over_c, Shard(1), add),
        "groups": _Rule("groups", over_c, over_0, over_0, over_c, over_c, over_0, over_0),
    }
    extents = {"outputs": w.shape[0], "inputs": w.shape[1], "groups": groups}
    rules: list[_Rule] = []
    for dim, (of_x, of_w) in enumerate(zip(x.placements, w.placements, strict=True)):
        wanted = [
            ("batch", channel == 1 and of_x == over_0),
            ("outputs", groups == 1 and of_w == over_0),
            ("inputs", groups == 1 and (of_x == over_c or of_w == Shard(1))),
            ("groups", groups > 1 and (of_x == over_c or of_w == over_0)),
        ]
        chosen = unsplit
        for name, asked in wanted:
            # Batches may be uneven, down to none; an empty part of the channels would be no convolution.
            parts = _times(mesh, rules, name) * mesh.size(dim)
            if asked and (name == "batch" or extents[name] % parts == 0):
                chosen = known[name]
                break
        rules.append(chosen)
    return rules


def _times(mesh: DeviceMesh, rules: Sequence[_Rule], name: str) -> int:
    """Into how many parts the dimensions of a rule cut what they cut."""
    return math.prod(mesh.size(dim) for dim, rule in enumerate(rules) if rule.name == name)


def _part(operand: DTensor, placements: Sequence[Placement], gradients: Sequence[Placement]) -> Tensor:
    """The part of an operand that lies on this rank, redistributed; differentiable.

    The redistribution stays where nothing moves: it is what brings the gradient back to the operand's placement.
    """
    part: Any = operand.redistribute(operand.device_mesh, placements).to_local(grad_placements=gradients)
    # The result of a collective nobody has waited for is a tensor without memory of its own.
    own: Tensor = part.wait() if hasattr(part, "trigger_wait") else part
    return own


def _strides(shape: Sequence[int], part: Tensor) -> tuple[int, ...]:
    """Strides of the whole result, in the memory format of a part."""
    if part.dim() in (4, 5):
        last = torch.channels_last if part.dim() == 4 else torch.channels_last_3d
        if part.is_contiguous(memory_format=last) and not part.is_contiguous():
            return torch.empty(tuple(shape), device="meta", memory_format=last).stride()
    return torch.empty(tuple(shape), device="meta").stride()
