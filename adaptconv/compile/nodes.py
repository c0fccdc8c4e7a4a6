"""Nodes: reading a dynamo graph's convolutions, additions, side effects and origins."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from adaptconv import arguments
from adaptconv.errors import AdaptConvError
from adaptconv.problem import Padding
from adaptconv.taps import TapPattern

_CONV_AXES: dict[object, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OP_ARGS = ("input", "weight", "bias", "taps", "stride", "padding", "groups", "plan")  # first three as torch's
_ADDS = (operator.add, operator.iadd, torch.add)
_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_MODULE_ROOT = re.compile(r"^L\[['\"](self|fn)['\"]\](\.__self__)?(\._orig_mod)?")  # the model itself
_MODULE_STEP = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]|\.(\w+)")
_CONTEXT = re.compile(r"autocast|grad_enabled|grad_mode|functorch|checkpoint")


@dataclass(frozen=True, slots=True, eq=False)
class Conv:
    """One convolution node, its arguments normalised.

    Attributes:
        node: the node.
        taps: where its taps sit.
        stride, padding, groups: geometry, padding as (before, after) an axis.
        compact: whether its weight is already ``[C_out, C_in/groups, T]``: it is our own op.
    """

    node: fx.Node
    taps: TapPattern
    stride: tuple[int, ...]
    padding: Padding
    groups: int
    compact: bool

    # Operands are read off the node each time: rewriting one site renames the operands of the next.

    @property
    def x(self) -> fx.Node:
        """The input's node."""
        node: fx.Node = _arguments(self.node, _CONV_ARGS)["input"]
        return node

    @property
    def weight(self) -> fx.Node:
        """The weight's node."""
        node: fx.Node = _arguments(self.node, _CONV_ARGS)["weight"]
        return node

    @property
    def bias(self) -> fx.Node | None:
        """The bias's node, if there is one."""
        node: fx.Node | None = _arguments(self.node, _CONV_ARGS).get("bias")
        return node

    @property
    def axes(self) -> int:
        """Spatial axes."""
        return self.taps.axes


@dataclass(slots=True)
class Found:
    """The convolution nodes of a graph.

    Attributes:
        convs: those understood.
        unread: the others, and why.
    """

    convs: dict[fx.Node, Conv] = field(default_factory=dict)
    unread: dict[fx.Node, str] = field(default_factory=dict)


def read_convs(gm: fx.GraphModule) -> Found:
    """Every convolution node of a graph, in order."""
    found = Found()
    for node in gm.graph.nodes:
        axes = _CONV_AXES.get(node.target) if node.op == "call_function" else None
        is_op = node.op == "call_function" and node.target in (
            torch.ops.adaptconv.conv, torch.ops.adaptconv.conv.default,
        )  # fmt: skip
        if axes is None and not is_op:
            continue
        try:
            found.convs[node] = _read_op(node) if axes is None else _read_torch(node, axes)
        except (AdaptConvError, TypeError, KeyError, AttributeError) as error:
            found.unread[node] = f"not understood: {error}"
    return found


def _arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    named = {"x": "input"}  # the op's own name for it
    return {**dict(zip(names, node.args, strict=False)), **{named.get(k, k): v for k, v in node.kwargs.items()}}


def value(node: fx.Node) -> Tensor:
    """The fake tensor that stands for a node's value.

    Raises:
        KeyError: the node carries none.
    """
    example = node.meta["example_value"]
    if not isinstance(example, Tensor):
        raise KeyError("example_value")
    return example


def _read_torch(node: fx.Node, axes: int) -> Conv:
    a = _arguments(node, _CONV_ARGS)
    weight = value(a["weight"])
    size, dilation = arguments.checked_grid(axes, weight, a.get("dilation", 1))
    taps = TapPattern.grid(size, dilation)
    stride = arguments.checked_ints(axes, a.get("stride", 1), "stride", least=1)
    padding = arguments.checked_padding(axes, a.get("padding", 0), taps.window, stride)
    return Conv(node, taps, stride, padding, a.get("groups", 1), False)


def _read_op(node: fx.Node) -> Conv:
    a = _arguments(node, _OP_ARGS)
    padding = tuple((a["padding"][i], a["padding"][i + 1]) for i in range(0, len(a["padding"]), 2))
    taps = TapPattern.parse(a["taps"])
    return Conv(node, taps, tuple(a["stride"]), padding, a["groups"], True)


def is_add(node: fx.Node) -> bool:
    """Whether a node adds two nodes, in place or not, and does nothing else."""
    if node.op == "call_method":
        adds = node.target in ("add", "add_")
    else:
        adds = node.op == "call_function" and node.target in _ADDS
    return adds and not node.kwargs and len(node.args) == 2 and all(isinstance(side, fx.Node) for side in node.args)


def mutates(node: fx.Node) -> bool:
    """Whether a node changes a tensor, or the mode under which later nodes run; in doubt, yes."""
    if node.op in ("call_function", "call_method") and not node.users:
        return True  # it is there for what it does, not for what it returns
    if "out" in node.kwargs or _CONTEXT.search(str(node.target)):
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = getattr(node.target, "__name__", "")
    in_place = getattr(operator, name, None) is node.target and name.startswith("i") and name[1:] in dir(operator)
    called_in_place = name.endswith("_") and not name.endswith("__")
    assigns = node.target in (operator.setitem, setattr) or node.kwargs.get("inplace") is True
    return in_place or called_in_place or assigns


def provenance(node: fx.Node) -> tuple[str, str]:
    """(module path, file:line) of a node, as far as dynamo kept them."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = ""
    if stack:
        path = _MODULE_ROOT.sub("", str(stack[-1][0]))
        steps = [a or b for a, b in _MODULE_STEP.findall(path)]
        where = ".".join(step for step in steps if step != "_modules")
    lines: list[tuple[str, str]] = _STACK_LINE.findall(node.meta.get("stack_trace") or "")
    own = [pair for pair in lines if "/torch/" not in pair[0] and "/adaptconv/" not in pair[0]] or lines
    return where, f"{own[-1][0]}:{own[-1][1]}" if own else ""
