"""Effects: what a node of a dynamo graph changes besides its own value. In doubt, everything it is given.

Dynamo's graphs are not functional: tensors are written in place, through views too. Which nodes share memory is read
off the storages of the fake tensors they carry.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

_CONTEXT = re.compile(r"autocast|grad_enabled|grad_mode|functorch|checkpoint")
Storages = frozenset[int]


def mutates(node: fx.Node) -> bool:
    """Whether a node changes a tensor, or the mode under which later nodes run; in doubt, yes."""
    if node.op in ("call_function", "call_method") and not node.users:
        return True  # it is there for what it does, not for what it returns
    if "out" in node.kwargs or changes_mode(node):
        return True
    if node.op == "call_method":
        return _in_place_name(str(node.target))
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return _writes_first(node)


def changes_mode(node: fx.Node) -> bool:
    """Whether a node changes the mode under which later nodes run: autocast, gradients, transforms."""
    return node.op == "call_function" and _CONTEXT.search(str(node.target)) is not None


def _in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _writes_first(node: fx.Node) -> bool:
    """Whether a function or method is one that writes to its first argument."""
    if node.op == "call_method":
        return _in_place_name(str(node.target))
    name = getattr(node.target, "__name__", "")
    in_place = getattr(operator, name, None) is node.target and name.startswith("i") and name[1:] in dir(operator)
    assigns = node.target in (operator.setitem, setattr) or node.kwargs.get("inplace") is True
    return in_place or _in_place_name(name) or assigns


def storages(node: fx.Node) -> Storages | None:
    """The storages behind a node's tensors; None where they cannot be known."""
    if "example_value" not in node.meta:
        return frozenset() if node.target is operator.setitem else None
    try:
        return frozenset(
            value.untyped_storage()._cdata
            for value in torch.utils._pytree.tree_leaves(node.meta["example_value"])
            if isinstance(value, Tensor)
        )
    except (RuntimeError, NotImplementedError):  # a wrapper without a storage of its own
        return None


def written(node: fx.Node) -> Storages | None:
    """The storages a mutating node may write to; None where they cannot be known."""
    first = [node.args[0]] if _writes_first(node) and node.args and isinstance(node.args[0], fx.Node) else None
    targets: Iterable[fx.Node] = first or node.all_input_nodes
    found: Storages = frozenset()
    for target in targets:
        mine = storages(target)
        if mine is None:
            return None
        found |= mine
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Effects:
    """The order of a graph's nodes, and those of them that change something."""

    order: dict[fx.Node, int]
    mutators: tuple[tuple[fx.Node, Storages | None], ...]
    modes: tuple[fx.Node, ...]

    @staticmethod
    def of(gm: fx.GraphModule) -> Effects:
        """Read a graph."""
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        mutators = tuple((node, written(node)) for node in order if mutates(node))
        return Effects(order, mutators, tuple(node for node in order if changes_mode(node)))

    def writers(self, touched: Storages, before: fx.Node) -> list[fx.Node]:
        """The nodes before another that may write to these storages."""
        end = self.order[before]
        return [n for n, to in self.mutators if self.order[n] < end and (to is None or to & touched)]

    def changed_later(self, touched: Storages, after: fx.Node) -> bool:
        """Whether storages may be written to after a node, while autograd may still need what they held.

        Where a graph pads, unfolds or constructs first, autograd keeps that copy; what takes its place keeps the tensor
        it was made from.
        """
        if not torch.is_grad_enabled():
            return False
        start = self.order[after]
        plain = {n for n in self.modes if not isinstance(n.target, torch._ops.HigherOrderOperator)}  # which run a graph
        later = ((n, to) for n, to in self.mutators if self.order[n] > start and n not in plain)
        return any(to is None or to & touched for _, to in later)

    def changed(self, touched: Storages, after: fx.Node, before: fx.Node, but: Sequence[fx.Node] = ()) -> bool:
        """Whether storages may be written to, or a mode changed, strictly between two nodes."""
        start, end = self.order[after], self.order[before]
        if any(start < self.order[n] < end for n in self.modes):
            return True
        return any(start < self.order[n] and n not in but for n in self.writers(touched, before))
