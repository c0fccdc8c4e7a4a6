"""Sites: the convolutions, and sums of convolutions, in a dynamo graph. Finds; changes nothing."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from adaptconv import arguments, trilinear
from adaptconv.errors import AdaptConvError
from adaptconv.problem import Direction, Padding, Problem
from adaptconv.taps import TapPattern

_CONV_AXES: dict[object, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_CONV_ARGS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OP_ARGS = ("input", "weight", "bias", "taps", "stride", "padding", "groups", "plan")  # first three as torch's
_ADDS = (operator.add, operator.iadd, torch.add)
_STACK_LINE = re.compile(r'File "([^"]+)", line (\d+)')
_MODULE_ROOT = re.compile(r"^L\[['\"](self|fn)['\"]\](\.__self__)?(\._orig_mod)?")  # the model itself
_MODULE_STEP = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]|\.(\w+)")


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


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A place in a graph that could be rewritten.

    Attributes:
        members: one convolution, or the several whose sum this is.
        result: the node whose value the site computes.
        taps, padding: of the whole site, all members in one window.
        problem: the FORWARD problem, at the sizes seen (hints where they are symbolic) and in the layout
            Inductor will run it in; None where the site cannot be a problem.
        layout: the layout it was traced in, which is what an eager call would see.
        grad_input, grad_weight: which gradients training will ask for.
        dynamic: whether an extent is symbolic.
        where: module path in the model, "" at the top.
        source: "file:line" that called it.
        reason: why there is no problem, in words.
    """

    members: tuple[Conv, ...]
    result: fx.Node
    taps: TapPattern | None
    padding: Padding
    problem: Problem | None
    layout: str = "contiguous"
    grad_input: bool = False
    grad_weight: bool = False
    dynamic: bool = False
    where: str = ""
    source: str = ""
    reason: str = ""

    @property
    def kind(self) -> str:
        """What was recognised."""
        return "conv" if len(self.members) == 1 else f"sum of {len(self.members)} convs"

    def problems(self) -> tuple[Problem, ...]:
        """What is worth tuning for this site, in every direction it needs.

        In the layout of a compiled graph; and, where the model calls adaptconv itself, also in the layout
        of an eager call.
        """
        if self.problem is None:
            return ()
        forwards = [self.problem]
        if len(self.members) == 1 and self.members[0].compact and self.layout != self.problem.layout:
            forwards.append(replace(self.problem, layout=self.layout))
        wanted = [Direction.FORWARD]
        wanted += [Direction.GRAD_INPUT] if self.grad_input else []
        wanted += [Direction.GRAD_WEIGHT] if self.grad_weight else []
        return tuple(forward.facing(direction) for forward in forwards for direction in wanted)


@dataclass(slots=True)
class _Found:
    convs: dict[fx.Node, Conv] = field(default_factory=dict)
    unread: list[Site] = field(default_factory=list)


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """Every convolution of a graph as a site of its own, in graph order."""
    found = _read_convs(gm)
    sites = [_site((conv,), conv.node) for conv in found.convs.values()]
    return sites + found.unread


def find_sums(gm: fx.GraphModule) -> list[Site]:
    """Maximal sums of convolutions of the same input that are one convolution on the union of their taps."""
    convs = _read_convs(gm).convs
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    groups: dict[fx.Node, tuple[Conv, ...]] = {node: (conv,) for node, conv in convs.items()}
    sums: dict[fx.Node, tuple[Conv, ...]] = {}
    for node in gm.graph.nodes:
        if not _is_add(node):
            continue
        left, right = node.args
        if left is right or any(side not in groups or len(side.users) != 1 for side in (left, right)):
            continue
        members = groups[left] + groups[right]
        if not _mergeable(members) or _mutates_between(gm, order, members, node):
            continue
        groups[node] = members
        for side in (left, right):
            sums.pop(side, None)
        sums[node] = members
    sites = [_site(members, node) for node, members in sums.items()]
    return [site for site in sites if site.problem is not None]


# ---- reading nodes --------------------------------------------------------------------------------


def _read_convs(gm: fx.GraphModule) -> _Found:
    found = _Found()
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
            where, source = _provenance(node)
            found.unread.append(
                Site((), node, None, (), None, where=where, source=source, reason=f"not understood: {error}")
            )
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


def _is_add(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("add", "add_") and len(node.args) == 2 and not node.kwargs
    if node.op != "call_function" or node.target not in _ADDS or len(node.args) != 2 or node.kwargs:
        return False
    return all(isinstance(side, fx.Node) for side in node.args)


# ---- sums -------------------------------------------------------------------------------------------


def _mergeable(members: Sequence[Conv]) -> bool:
    """Same input, stride, groups, output: then the sum is one convolution on the union of taps."""
    first = members[0]
    same_call = all(
        (m.x, m.stride, m.groups, m.axes) == (first.x, first.stride, first.groups, first.axes) for m in members
    )
    # Symbolic extents compare by their expression: comparing them as numbers would add guards.
    if not same_call or len({str(value(m.node).shape) for m in members}) != 1:
        return False
    if len({value(m.node).dtype for m in members}) != 1:
        return False
    return common_window(members) is not None


def common_window(members: Sequence[Conv]) -> tuple[TapPattern, Padding, list[list[tuple[int, ...]]]] | None:
    """The union of the members' taps in one window with one padding, and each member's moved offsets.

    A tap reads the input at (offset - padding before), so moving a window by the difference in padding
    keeps what it reads. None where the windows then end at different places.
    """
    padding: list[tuple[int, int]] = []
    window: list[int] = []
    for axis in range(members[0].axes):
        before = max(m.padding[axis][0] for m in members)
        after = max(m.padding[axis][1] for m in members)
        extents = {m.taps.window[axis] - sum(m.padding[axis]) + before + after for m in members}
        if len(extents) != 1:
            return None
        padding.append((before, after))
        window.append(extents.pop())
    moved = [
        [tuple(o + padding[axis][0] - m.padding[axis][0] for axis, o in enumerate(offset)) for offset in m.taps.offsets]
        for m in members
    ]
    union = TapPattern(tuple({offset for part in moved for offset in part}), tuple(window))
    return union, tuple(padding), moved


def _mutates_between(gm: fx.GraphModule, order: dict[fx.Node, int], members: Iterable[Conv], last: fx.Node) -> bool:
    """Whether anything is changed in place between the first convolution and the sum.

    The merged call reads its operands at the sum, so they must still hold what each member read.
    """
    start = min(order[m.node] for m in members)
    between = [node for node in gm.graph.nodes if start < order[node] < order[last]]
    return any(_mutates(node) and not _is_add(node) for node in between)


_CONTEXT = re.compile(r"autocast|grad_enabled|grad_mode|functorch|checkpoint")


def _mutates(node: fx.Node) -> bool:
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


# ---- sites ------------------------------------------------------------------------------------------


def _site(members: tuple[Conv, ...], result: fx.Node) -> Site:
    first = members[0]
    merged = common_window(members)
    assert merged is not None, "members were checked to share a window"
    taps, padding, _ = merged
    where, source = _provenance(first.node)
    bare = Site(members, result, taps, padding, None, where=where, source=source)
    try:
        x = value(first.x)
        weights = [value(m.weight) for m in members]
        out = value(first.node)
    except KeyError:
        return replace(bare, reason="its operands carry no shapes")
    if not all(type(t) is FakeTensor for t in (x, *weights)):
        return replace(bare, reason=f"a {type(x).__name__} input or weight is left to torch")
    if x.dim() != first.axes + 2:
        return replace(bare, reason="an unbatched input is left to torch")
    if any(not isinstance(extent, int) for w in weights for extent in w.shape):
        return replace(bare, reason="the weight's shape is symbolic")
    if out.dtype not in arguments.SUPPORTED or 0 in (*weights[0].shape, *x.shape[1:]):
        return replace(bare, reason=f"dtype {out.dtype} or an empty operand is left to torch")
    dynamic = any(not isinstance(extent, int) for extent in x.shape)
    sizes = [_hint(extent) for extent in x.shape]
    layout = trilinear.layout_of(_stand_in(x, sizes), weights[0])
    problem = trilinear.forward_problem(
        x, weights[0], taps, first.stride, padding, first.groups, any(m.bias is not None for m in members), layout
    )
    problem = replace(
        problem, batch=sizes[0], c_in=sizes[1], spatial=tuple(sizes[2:]), dtype=str(out.dtype).removeprefix("torch.")
    )
    grad = torch.is_grad_enabled()  # a parameter requires gradients even where none will be asked for
    grad_weight = grad and any(w.requires_grad for w in weights)
    return replace(
        bare, problem=replace(problem, layout=compiled_layout(problem)), layout=layout,
        grad_input=grad and x.requires_grad, grad_weight=grad_weight, dynamic=dynamic,
    )  # fmt: skip


def compiled_layout(problem: Problem) -> str:
    """The layout Inductor runs a convolution in: on a CPU it turns every 2-D one to channels_last."""
    from torch._inductor import config

    turned = problem.axes == 2 and problem.device.kind == "cpu" and torch.backends.mkldnn.is_available()
    return "channels_last" if turned and config.layout_optimization else problem.layout


def _hint(extent: int | torch.SymInt) -> int:
    """A symbolic extent's value in the example, read without guarding on it."""
    if isinstance(extent, int):
        return extent
    hint: int = extent.node.hint
    return hint


def _stand_in(x: Tensor, sizes: list[int]) -> Tensor:
    """Something with the input's strides in plain numbers: layout is all that is read off it."""
    if all(isinstance(extent, int) for extent in x.shape):
        return x
    return torch.empty_strided(sizes, [_hint(step) for step in x.stride()], device="meta")


def _provenance(node: fx.Node) -> tuple[str, str]:
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
