"""Nodes: reading a dynamo graph's convolutions, additions and origins."""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from adaptconv import arguments, ops  # noqa: F401 - registers the op that _OURS names
from adaptconv.compile.probing import Made
from adaptconv.errors import AdaptConvError
from adaptconv.problem import Padding
from adaptconv.taps import TapPattern

CONV_AXES: dict[object, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OP_ARGS = ("input", "weight", "bias", "taps", "stride", "padding", "groups", "plan")  # first three as torch's
_ADDS = (operator.add, operator.iadd, torch.add)
_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_MODULE_ROOT = re.compile(r"^L\[['\"](self|fn)['\"]\](\.__self__)?(\._orig_mod)?")  # the model itself
_MODULE_STEP = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]|\.(\w+)")
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
_OURS = (torch.ops.adaptconv.conv, torch.ops.adaptconv.conv.default)
_REPLACED_BY = "adaptconv_replaced_by"


@dataclass(frozen=True, slots=True, eq=False)
class Conv:
    """One convolution in a graph, its arguments normalised.

    Attributes:
        node: the node that computes it.
        operands: the nodes of the input, the weight and, if there is one, the bias.
        taps: where its taps sit.
        stride, padding, groups: geometry, padding as (before, after) an axis.
        kind: "conv"; "op", our own, whose weight is ``[C_out, C_in/groups, T]``; or "unfold", whose weight is
            ``[C_out, C_in T]``.
        made: what constructs its weight, if that leaves holes in it; ``taps`` are then those of the kernel made.
        stated: the taps that the call itself states, where ``made`` leaves some of them out.
        inner: nodes it takes in besides ``node``, later ones first: zero padding before it, the unfolded input.
        turned: of "unfold": whether its answer is ``[N, L, C_out]``, not ``[N, C_out, L]``, and whether its weight is
            ``[C_in T, C_out]``.
        note: what to tell people about its weight.
    """

    node: fx.Node
    operands: tuple[fx.Node, fx.Node, fx.Node | None]
    taps: TapPattern
    stride: tuple[int, ...]
    padding: Padding
    groups: int
    kind: str = "conv"
    made: Made | None = None
    stated: TapPattern | None = None
    inner: tuple[fx.Node, ...] = ()
    turned: tuple[bool, bool] = (False, False)
    note: str = ""

    # Rewriting one site puts a new node in the place of what another reads.

    @property
    def x(self) -> fx.Node:
        """The input's node."""
        return current(self.operands[0])

    @property
    def weight(self) -> fx.Node:
        """The weight's node."""
        return current(self.operands[1])

    @property
    def bias(self) -> fx.Node | None:
        """The bias's node, if there is one."""
        return None if self.operands[2] is None else current(self.operands[2])

    @property
    def compact(self) -> bool:
        """Whether it is our own op."""
        return self.kind == "op"

    @property
    def axes(self) -> int:
        """Spatial axes."""
        return self.taps.axes


def current(node: fx.Node) -> fx.Node:
    """The node that now stands for another."""
    while _REPLACED_BY in node.meta:
        node = node.meta[_REPLACED_BY]
    return node


def replaced(node: fx.Node, by: fx.Node) -> None:
    """Note that a node stands for another, and have everyone read it instead."""
    node.replace_all_uses_with(by)
    node.meta[_REPLACED_BY] = by


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
        if node.op != "call_function":
            continue
        axes = CONV_AXES.get(node.target)
        if node.target in _TRANSPOSED:
            found.unread[node] = "transposed convolutions are left to torch"
        elif axes is not None or node.target in _OURS:
            try:
                found.convs[node] = _read_op(node) if axes is None else _read_torch(node, axes)
            except (AdaptConvError, TypeError, KeyError, AttributeError) as error:
                found.unread[node] = f"not understood: {error}"
    return found


def named(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """A node's arguments by name, positional or not; what was not given is left out."""
    ours = {"x": "input"}  # the op's own name for it
    return {**dict(zip(names, node.args, strict=False)), **{ours.get(k, k): v for k, v in node.kwargs.items()}}


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
    a = named(node, _CONV_ARGS)
    weight = value(a["weight"])
    size, dilation = arguments.checked_grid(axes, weight, a.get("dilation", 1))
    taps = TapPattern.grid(size, dilation)
    stride = arguments.checked_ints(axes, a.get("stride", 1), "stride", least=1)
    padding = arguments.checked_padding(axes, a.get("padding", 0), taps.window, stride)
    return Conv(node, (a["input"], a["weight"], a.get("bias")), taps, stride, padding, a.get("groups", 1))


def _read_op(node: fx.Node) -> Conv:
    a = named(node, _OP_ARGS)
    padding = tuple((a["padding"][i], a["padding"][i + 1]) for i in range(0, len(a["padding"]), 2))
    taps = TapPattern.parse(a["taps"])
    return Conv(node, (a["input"], a["weight"], a["bias"]), taps, tuple(a["stride"]), padding, a["groups"], "op")


def addends(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that a node adds up, in place or not, and does nothing else; () where it is no such node.

    One alone where a zero is added to it, as Python's ``sum`` does first.
    """
    if node.op == "call_method":
        adds = node.target in ("add", "add_")
    else:
        adds = node.op == "call_function" and node.target in _ADDS
    if not adds or node.kwargs or len(node.args) != 2:
        return ()
    sides = tuple(side for side in node.args if isinstance(side, fx.Node))
    others = [side for side in node.args if not isinstance(side, fx.Node)]
    return sides if not others or (len(others) == 1 and type(others[0]) is int and others[0] == 0) else ()


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


def hint(extent: int | torch.SymInt) -> int:
    """A symbolic extent's value in the example, read without guarding on it."""
    if isinstance(extent, int):
        return extent
    known: int = extent.node.hint
    return known


def stand_in(x: Tensor) -> Tensor:
    """Something with a tensor's strides in plain numbers: layout is all that is read off it."""
    if all(isinstance(extent, int) for extent in (*x.shape, *x.stride())):
        return x
    sizes, strides = [hint(extent) for extent in x.shape], [hint(step) for step in x.stride()]
    return torch.empty_strided(sizes, strides, device="meta")
