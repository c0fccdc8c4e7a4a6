"""Constructed kernels: weights that a graph makes from parameters, cut out so that they can be probed.

Zero-hole expansion has a dozen spellings; none is matched. What makes the weight is cut back to the first tensors that
are not made linearly (parameters, as a rule), and run on values of our own. Because every node in between is affine by
construction (``linear``), what two random probes show holds for every value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from adaptconv.compile.effects import Effects, Storages, mutates, storages
from adaptconv.compile.linear import Kind, kind_of, name_of

_CASTS = ("to", "float", "half", "double", "bfloat16", "type", "type_as", "detach")
_LARGEST = 1 << 25  # elements of a weight beyond which it is not probed


@dataclass(frozen=True, slots=True, eq=False)
class Cutting:
    """The part of a graph that makes a weight.

    Attributes:
        weight: the node it ends in.
        leaves: the tensors it starts from, whose values are known at run time only.
        steps: the nodes in between, in order.
    """

    weight: fx.Node
    leaves: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]

    def run(self, values: Sequence[Tensor]) -> Tensor:
        """The weight for these values of the leaves, on the CPU; to be called outside of every mode."""
        known: dict[fx.Node, Any] = dict(zip(self.leaves, values, strict=True))
        for step in self.steps:
            known[step] = _call(step, known)
        result: Tensor = known[self.weight]
        return result


def _call(step: fx.Node, known: dict[fx.Node, Any]) -> Any:
    def given(argument: Any) -> Any:
        return fx.node.map_aggregate(argument, lambda a: known[a] if isinstance(a, fx.Node) else _on_cpu(a))

    args = given(step.args)
    kwargs = {k: torch.device("cpu") if k == "device" and v is not None else given(v) for k, v in step.kwargs.items()}
    if step.op == "call_method":
        return getattr(args[0], str(step.target))(*args[1:], **kwargs)
    assert callable(step.target)
    return step.target(*args, **kwargs)


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


@dataclass(frozen=True, slots=True)
class Uncut:
    """Why a weight is taken as it is: a reason for people, "" where there is nothing to say."""

    reason: str = ""


def cut(weight: fx.Node, reader: fx.Node, effects: Effects) -> Cutting | Uncut:
    """What makes a weight, back to the tensors that are not made linearly.

    Args:
        weight: the node.
        reader: the convolution that reads it.
        effects: of its graph.
    """
    if weight.op in ("placeholder", "get_attr"):
        return Uncut()
    kinds, runtime, failure = _kinds(_ancestry(weight, reader, effects))
    if failure:
        return Uncut(failure)
    if kinds[weight] is Kind.OPAQUE:
        return Uncut(_opaque(weight))
    if not (storages(weight) or frozenset()) & runtime:
        return Uncut("its weight is a constant of the graph")
    used = _ancestry(weight, reader, effects, lambda node: kinds.get(node) is not Kind.OPAQUE)
    leaves = tuple(node for node in used if kinds[node] is Kind.OPAQUE)
    steps = tuple(node for node in used if kinds[node] is not Kind.OPAQUE)
    moving = [node for node in (*leaves, *steps) if (storages(node) or frozenset()) & runtime]
    if not all(_is_plain(node) for node in (*leaves, weight)) or not _rounds_once(moving, leaves, weight):
        return Uncut("its weight is made from other than plain floating-point tensors of one dtype")
    if any(_value(node).numel() > _LARGEST for node in (*leaves, weight)):
        return Uncut(f"its weight is made in the graph and has over {_LARGEST:,} elements: too many to look into")
    touched: Storages = frozenset().union(*(storages(node) or () for node in used))
    if effects.changed(touched, steps[0], reader, steps):
        return Uncut("what its weight is made from is changed, or a mode is, before the convolution reads it")
    if effects.changed_later(frozenset().union(*(storages(leaf) or () for leaf in leaves)), reader):
        return Uncut("what its weight is made from is changed after the convolution, before its gradient is taken")
    return Cutting(weight, leaves, steps)


def _ancestry(
    weight: fx.Node, reader: fx.Node, effects: Effects, enter: Callable[[fx.Node], bool] = lambda node: True
) -> list[fx.Node]:
    """What a weight depends on, whoever writes to it in place included, no further than what ``enter`` lets in."""
    found: set[fx.Node] = set()
    waiting = [weight]
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if name_of(node) is None or not enter(node):
            continue
        waiting += node.all_input_nodes
        waiting += effects.writers(storages(node) or frozenset(), reader)
    return sorted(found, key=effects.order.__getitem__)


def _kinds(nodes: Sequence[fx.Node]) -> tuple[dict[fx.Node, Kind], set[int], str]:
    """The kind of every node, in order; the storages that hold run-time values in the end; what cannot be followed."""
    kinds: dict[fx.Node, Kind] = {}
    runtime: set[int] = set()
    leaves: set[int] = set()

    def is_runtime(node: fx.Node) -> bool:
        mine = storages(node)
        return bool(mine & runtime) if mine else kinds.get(node) is not Kind.CONSTANT

    for node in nodes:
        kind = kinds[node] = kind_of(node, is_runtime)
        changed = _changed_by(node)
        if changed is not None and (kind is Kind.OPAQUE or changed & leaves):
            return kinds, runtime, f"its weight goes through {described(node)}, which is not followed"
        mine = storages(node) or frozenset()
        if kind is not Kind.CONSTANT:
            runtime |= mine | (changed or frozenset())
        if kind is Kind.OPAQUE:
            leaves |= mine
    return kinds, runtime, ""


def _changed_by(node: fx.Node) -> Storages | None:
    """The storages a node writes to; None if it writes to none."""
    if node.op in ("placeholder", "get_attr") or not mutates(node):
        return None
    target = node.args[0] if node.args else None
    return (storages(target) or frozenset()) if isinstance(target, fx.Node) else frozenset()


def _value(node: fx.Node) -> Tensor:
    value = node.meta.get("example_value")
    assert isinstance(value, Tensor)
    return value


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is an ordinary tensor of real numbers and of known shape."""
    value = node.meta.get("example_value")
    return (
        type(value) is FakeTensor
        and value.is_floating_point()
        and all(isinstance(extent, int) for extent in (*value.shape, *value.stride()))
    )


def _rounds_once(moving: Sequence[fx.Node], leaves: Sequence[fx.Node], weight: fx.Node) -> bool:
    """Whether values are rounded to the weight's dtype alone on their way, so that doing so at the end is the same."""
    first = {_value(node).dtype for node in leaves}
    values = (node.meta.get("example_value") for node in moving)
    return len(first) == 1 and all(
        value.dtype in (*first, _value(weight).dtype) for value in values if isinstance(value, Tensor)
    )


def described(node: fx.Node) -> str:
    """A node's operation, for people."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
        return "item assignment" if node.target is operator.setitem else name
    return node.op


def _opaque(weight: fx.Node) -> str:
    """What to say of a weight that is computed from run-time values in other than linear ways."""
    if weight.op == "call_method" and str(weight.target) in _CASTS:
        return ""
    return (
        f"its weight is computed in the graph by {described(weight)}: where it is zero depends on values known at run "
        "time, so no tap can be left out; where the holes are fixed, AdaptiveConv with taps= or a frozen kernel says so"
    )
