"""Sites: the convolutions, and sums of convolutions, in a dynamo graph. Finds; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from adaptconv import arguments, trilinear
from adaptconv.compile.effects import Effects, mutates
from adaptconv.compile.folding import folded
from adaptconv.compile.neighbours import followed_by
from adaptconv.compile.nodes import Conv, addends, hint, provenance, read_convs, stand_in, value
from adaptconv.compile.unfold import read_products
from adaptconv.problem import Direction, Padding, Problem
from adaptconv.taps import TapPattern


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A place in a graph that could be rewritten.

    Attributes:
        members: one convolution, or the several whose sum this is; () where it was not understood.
        result: the node whose value the site computes.
        kind: what was recognised: "conv", "sum of 2 convs", "unfold", or the name of what was not.
        taps, padding: of the whole site, all members in one window.
        problem: the FORWARD problem, at the sizes seen (hints where they are symbolic) and in the layout
            Inductor will run it in; None where the site cannot be a problem.
        as_written: the problem that the graph states, where it states another: a constructed kernel in full.
        layout: the layout it was traced in, which is what an eager call would see.
        grad_input, grad_weight: which gradients training will ask for.
        dynamic: whether an extent is symbolic.
        where: module path in the model, "" at the top.
        source: "file:line" that called it.
        made: what is known of the construction of its weight, "" where the graph constructs none with holes.
        note: what else people should know: weights computed at run time, what follows the convolution.
        reason: why there is no problem, in words.
    """

    members: tuple[Conv, ...]
    result: fx.Node
    kind: str
    taps: TapPattern | None
    padding: Padding
    problem: Problem | None
    as_written: Problem | None = None
    layout: str = "contiguous"
    grad_input: bool = False
    grad_weight: bool = False
    dynamic: bool = False
    where: str = ""
    source: str = ""
    made: str = ""
    note: str = ""
    reason: str = ""

    @property
    def folded(self) -> bool:
        """Whether zero padding before it was taken in."""
        return any(m.inner for m in self.members if m.kind != "unfold")

    def stated(self) -> Site:
        """The same site with the kernel that the graph states: what is constructed taken in full."""
        assert self.as_written is not None and len(self.members) == 1
        taps = self.as_written.taps
        conv = replace(self.members[0], taps=taps, made=None, stated=None)
        return replace(self, members=(conv,), taps=taps, problem=self.as_written, as_written=None)

    def problems(self) -> tuple[Problem, ...]:
        """What is worth tuning for this site, in every direction it needs.

        In the layout of a compiled graph; where the model calls adaptconv itself, also in the layout of an eager
        call; and where a kernel is constructed, also with that in full.
        """
        if self.problem is None:
            return ()
        forwards = [self.problem] if self.as_written is None else [self.problem, self.as_written]
        if len(self.members) == 1 and self.members[0].compact and self.layout != self.problem.layout:
            forwards.append(replace(self.problem, layout=self.layout))
        wanted = [Direction.FORWARD]
        wanted += [Direction.GRAD_INPUT] if self.grad_input else []
        wanted += [Direction.GRAD_WEIGHT] if self.grad_weight else []
        return tuple(forward.facing(direction) for forward in forwards for direction in wanted)


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """The sites of a graph: sums first, then every convolution, also those that sums are made of, in graph order.

    A sum is maximal, of convolutions of the same input, and one convolution on the union of their taps.
    """
    found, effects = read_convs(gm), Effects.of(gm)
    convs = {node: folded(conv, effects) for node, conv in found.convs.items()}
    products = {node: folded(conv, effects) for node, conv in read_products(gm, effects).items()}
    singles = [_single(conv, node) for node, conv in {**convs, **products}.items()]
    constructing = {step for conv in convs.values() if conv.made is not None for step in conv.made.steps}
    singles += [_unread(node, reason) for node, reason in found.unread.items() if node not in constructing]
    singles.sort(key=lambda site: effects.order[site.result])
    return _sums(gm, convs, effects.order) + singles


def _single(conv: Conv, node: fx.Node) -> Site:
    try:
        return _site((conv,), node, conv.kind)
    except Exception as error:  # noqa: BLE001 - one convolution that is not understood leaves the others
        return _unread(node, f"not understood: {type(error).__name__}: {error}")


def _unread(node: fx.Node, reason: str) -> Site:
    where, source = provenance(node)
    name = getattr(node.target, "__name__", str(node.target))
    return Site((), node, name, None, (), None, where=where, source=source, reason=reason)


def _sums(gm: fx.GraphModule, convs: Mapping[fx.Node, Conv], order: Mapping[fx.Node, int]) -> list[Site]:
    groups: dict[fx.Node, tuple[Conv, ...]] = {node: (conv,) for node, conv in convs.items()}
    sums: dict[fx.Node, tuple[Conv, ...]] = {}
    for node in gm.graph.nodes:
        sides = addends(node)
        if not sides or len(set(sides)) != len(sides):
            continue
        if any(side not in groups or len(side.users) != 1 for side in sides):
            continue
        members = tuple(member for side in sides for member in groups[side])
        if len(sides) > 1 and (not _mergeable(members) or _mutates_between(gm, order, groups, members, node)):
            continue
        groups[node] = members
        for side in sides:
            sums.pop(side, None)
        if len(members) > 1:
            sums[node] = members
    sites = [_site(members, node, f"sum of {len(members)} convs") for node, members in sums.items()]
    return [site for site in sites if site.problem is not None]


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
    if any(m.taps.footprint is not None for m in members):
        return False  # spread taps do not unite with others
    return common_window(members) is not None


def common_window(members: Sequence[Conv]) -> tuple[TapPattern, Padding, list[list[tuple[int, ...]]]] | None:
    """The union of the members' taps in one window with one padding, and each member's moved offsets.

    A tap reads the input at (offset - padding before), so moving a window by the difference in padding
    keeps what it reads. None where the windows then end at different places.
    """
    if len(members) == 1:
        return members[0].taps, members[0].padding, [list(members[0].taps.offsets)]
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


def _mutates_between(
    gm: fx.GraphModule,
    order: Mapping[fx.Node, int],
    groups: Mapping[fx.Node, tuple[Conv, ...]],
    members: Iterable[Conv],
    last: fx.Node,
) -> bool:
    """Whether anything is changed in place between the first convolution and the sum.

    The merged call reads its operands at the sum, so they must still hold what each member read. Only the
    sums found so far may add in place: what they change is a convolution's result that nobody else uses.
    """
    start = min(order[m.node] for m in members)
    between = [node for node in gm.graph.nodes if start < order[node] < order[last]]
    return any(mutates(node) for node in between if node not in groups)


# ---- sites ------------------------------------------------------------------------------------------


def _site(members: tuple[Conv, ...], result: fx.Node, kind: str) -> Site:
    first = members[0]
    merged = common_window(members)
    assert merged is not None, "members were checked to share a window"
    taps, padding, _ = merged
    where, source = provenance(first.node)
    made = "; ".join(m.made.text for m in members if m.made is not None)
    note = "; ".join(filter(None, (*(m.note for m in members), followed_by(result))))
    bare = Site(
        members, result, "conv" if kind == "op" else kind, taps, padding, None, where=where, source=source, made=made,
        note=note,
    )  # fmt: skip
    try:
        x = value(first.x)
        weights = [value(m.weight) for m in members]
        out = value(first.node)
    except KeyError:
        return replace(bare, reason="its operands carry no shapes")
    if not all(type(t) is FakeTensor for t in (x, *weights)):
        other = next(type(t).__name__ for t in (x, *weights) if type(t) is not FakeTensor)
        ours = "each rank plans its own part of it" if kind == "op" else "left to torch"
        return replace(bare, reason=f"a {other} input or weight: {ours}")
    if x.dim() != first.axes + 2:
        return replace(bare, reason="an unbatched input is left to torch")
    if any(not isinstance(extent, int) for w in weights for extent in w.shape):
        return replace(bare, reason="the weight's shape is symbolic")
    if out.dtype not in arguments.SUPPORTED or 0 in (*weights[0].shape, *x.shape[1:]):
        return replace(bare, reason=f"dtype {out.dtype} or an empty operand is left to torch")
    sizes = [hint(extent) for extent in x.shape]
    weight = weights[0] if kind != "unfold" else _as_kernel(first, sizes[1])
    layout = trilinear.layout_of(stand_in(x), weight)

    def problem_of(pattern: TapPattern) -> Problem:
        problem = trilinear.forward_problem(
            x, weight, pattern, first.stride, padding, first.groups, any(m.bias is not None for m in members), layout
        )
        dtype = str(out.dtype).removeprefix("torch.")
        problem = replace(problem, batch=sizes[0], c_in=sizes[1], spatial=tuple(sizes[2:]), dtype=dtype)
        return replace(problem, layout=compiled_layout(problem))

    grad = torch.is_grad_enabled()  # a parameter requires gradients even where none will be asked for
    return replace(
        bare, problem=problem_of(taps),
        as_written=None if len(members) > 1 or first.stated is None else problem_of(first.stated),
        layout=layout, grad_input=grad and x.requires_grad,
        grad_weight=grad and any(w.requires_grad for w in weights),
        dynamic=any(not isinstance(extent, int) for extent in x.shape),
    )  # fmt: skip


def _as_kernel(conv: Conv, c_in: int) -> Tensor:
    """The weight of a product with an unfolded input, as a convolution has it; of use for its shape alone."""
    c_out = value(conv.weight).numel() // (c_in * len(conv.taps))
    return torch.empty((c_out, c_in, len(conv.taps)), device="meta")


def compiled_layout(problem: Problem) -> str:
    """The layout Inductor runs a convolution in: on a CPU it turns every 2-D one to channels_last."""
    from torch._inductor import config

    turned = problem.axes == 2 and problem.device.kind == "cpu" and torch.backends.mkldnn.is_available()
    return "channels_last" if turned and config.layout_optimization else problem.layout
