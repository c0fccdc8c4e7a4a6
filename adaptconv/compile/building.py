"""Building: the nodes that stand in for a site, its operands in the shapes the logical op takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from adaptconv.backends.weights import picked
from adaptconv.compile.nodes import Conv, current, hint, value
from adaptconv.compile.probing import Made
from adaptconv.compile.sites import Site, common_window
from adaptconv.trilinear import layout_of


def torchs_own(graph: fx.Graph, site: Site) -> fx.Node:
    """Insert torch's convolution with the zeros before it as its padding; the node whose value is the site's."""
    (conv,) = site.members
    grid = conv.taps.single_grid()
    assert grid is not None, "a convolution of torch's is one grid"
    padding = [before for before, _ in conv.padding]
    args = (conv.x, conv.weight, conv.bias, list(conv.stride), padding, list(grid.dilation), conv.groups)
    node = graph.call_function(conv.node.target, args)  # type: ignore[arg-type]
    node.meta = dict(site.result.meta)
    return node


def built(graph: fx.Graph, site: Site, plan: str) -> fx.Node:
    """Insert what computes a site through the logical op; the node whose value is the site's."""
    assert site.taps is not None
    first = site.members[0]
    weight = _compact(graph, first) if len(site.members) == 1 else _merged_weight(graph, site)
    bias = first.bias if len(site.members) == 1 else _merged_bias(graph, site)
    padding = [zeros for pair in site.padding for zeros in pair]
    node = graph.call_function(
        torch.ops.adaptconv.conv.default,
        (first.x, weight, bias, str(site.taps), list(first.stride), padding, first.groups, plan),
    )
    node.meta = dict(site.result.meta)
    return _as_product(graph, first, node) if first.kind == "unfold" else node


def _derived(graph: fx.Graph, target: object, args: tuple[object, ...], like: fx.Node, example: Tensor) -> fx.Node:
    node = graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta = {**like.meta, "example_value": example}
    return node


# ---- weights ----------------------------------------------------------------------------------------


def _compact(graph: fx.Graph, conv: Conv) -> fx.Node:
    """The weight of one convolution as ``[C_out, C_in/groups, T]``."""
    weight = conv.weight
    if conv.kind == "op":
        return weight
    if conv.kind == "unfold":
        turned = _derived(graph, torch.t, (weight,), weight, value(weight).t()) if conv.turned[1] else weight
        shape = (value(turned).shape[-2], -1, len(conv.taps))
        return _derived(graph, torch.reshape, (turned, shape), weight, value(turned).reshape(shape))
    if conv.made is not None and conv.made.columns is not None:
        return _in_format(graph, conv, _from_leaves(graph, conv, conv.made, conv.made.columns))
    flat = _derived(graph, torch.flatten, (weight, 2), weight, value(weight).flatten(2))
    if conv.made is None:
        return flat
    window = conv.made.taps.window
    strides = [math.prod(window[axis + 1 :]) for axis in range(len(window))]
    live = [sum(i * step for i, step in zip(offset, strides, strict=True)) for offset in conv.made.taps.offsets]
    return _in_format(graph, conv, _placed(graph, flat, live))


def _in_format(graph: fx.Graph, conv: Conv, kernel: fx.Node) -> fx.Node:
    """A compact weight with channels innermost where the written one has them so: torch's answer takes after it."""
    if layout_of(value(conv.x), value(conv.weight)) != "mixed":
        return kernel
    turned = _derived(graph, torch.transpose, (kernel, 1, 2), kernel, value(kernel).transpose(1, 2))
    laid = graph.call_method("contiguous", (turned,))
    laid.meta = {**kernel.meta, "example_value": value(turned).contiguous()}
    return _derived(graph, torch.transpose, (laid, 1, 2), kernel, value(laid).transpose(1, 2))


def _from_leaves(graph: fx.Graph, conv: Conv, made: Made, columns: Sequence[Sequence[int]]) -> fx.Node:
    """The kernel straight from the tensors it is made from: its construction is left out."""
    weight = value(conv.weight)
    shape = (weight.shape[0], weight.shape[1], -1)
    leaves = [current(leaf) for leaf in made.leaves]
    flat = [_derived(graph, torch.reshape, (leaf, shape), leaf, value(leaf).reshape(shape)) for leaf in leaves]
    starts = [sum(value(node).shape[2] for node in flat[:k]) for k in range(len(flat))]
    joined = flat[0]
    if len(flat) > 1:
        joined = _derived(graph, torch.cat, (flat, 2), flat[0], torch.cat([value(node) for node in flat], 2))
    sources = [
        next(start + row[tap] for start, row in zip(starts, columns, strict=True) if row[tap] >= 0)
        for tap in range(len(made.taps))
    ]
    kernel = _placed(graph, joined, sources)
    if value(kernel).dtype is weight.dtype:
        return kernel
    node = graph.call_method("to", (kernel, weight.dtype))
    node.meta = {**kernel.meta, "example_value": value(kernel).to(weight.dtype)}
    return node


def _placed(graph: fx.Graph, compact: fx.Node, columns: Sequence[int]) -> fx.Node:
    """Columns of a compact weight by index, zeros for -1."""
    example = value(compact)
    if list(columns) == list(range(example.shape[2])):
        return compact
    shape = (*example.shape[:2], len(columns))
    return _derived(
        graph, torch.ops.adaptconv.place.default, (compact, list(columns)), compact, example.new_empty(shape)
    )


def _merged_weight(graph: fx.Graph, site: Site) -> fx.Node:
    """The sum's compact weight: every member's columns, placed on the union's taps and added."""
    merged = common_window(site.members)
    assert merged is not None
    union, _, moved = merged
    index = {offset: t for t, offset in enumerate(union.offsets)}
    total: fx.Node | None = None
    for member, offsets in zip(site.members, moved, strict=True):
        own = {index[offset]: t for t, offset in enumerate(offsets)}
        placed = _placed(graph, _compact(graph, member), [own.get(t, -1) for t in range(len(union))])
        total = placed if total is None else _derived(graph, torch.add, (total, placed), member.weight, value(placed))
    assert total is not None
    return total


def _merged_bias(graph: fx.Graph, site: Site) -> fx.Node | None:
    total: fx.Node | None = None
    for bias in (member.bias for member in site.members):
        if bias is not None:
            total = bias if total is None else _derived(graph, torch.add, (total, bias), bias, value(bias))
    return total


# ---- products with an unfolded input ----------------------------------------------------------------


def _as_product(graph: fx.Graph, conv: Conv, node: fx.Node) -> fx.Node:
    """A convolution's result ``[N, C_out, H, W]`` in the axes and strides of the product it replaces."""
    product, x, answer_turned = value(conv.node), value(conv.x), conv.turned[0]
    extents = [
        (extent + sum(pair) - window) // step + 1
        for extent, pair, window, step in zip(x.shape[2:], conv.padding, conv.taps.window, conv.stride, strict=True)
    ]
    node.meta["example_value"] = product.new_empty((x.shape[0], product.shape[2 if answer_turned else 1], *extents))
    last = _derived(graph, torch.flatten, (node, 2), node, value(node).flatten(2))
    # The product's axes from the slowest to the fastest, and from the flattened answer's to those.
    order = sorted(range(3), key=lambda axis: -hint(product.stride()[axis]))
    there = [(0, 2, 1)[axis] if answer_turned else axis for axis in order]
    back = [order.index(axis) for axis in range(3)]
    last = _derived(graph, torch.permute, (last, there), node, value(last).permute(there))
    laid = graph.call_method("contiguous", (last,))
    laid.meta = {**node.meta, "example_value": value(last).contiguous()}
    return _derived(graph, torch.permute, (laid, back), node, value(laid).permute(back))


def place(weight: Tensor, columns: list[int]) -> Tensor:
    """Columns of a compact weight by index, zeros for -1: ``[O, I, T]`` -> ``[O, I, len(columns)]``."""
    return picked(weight, columns)


_LIBRARY = torch.library.Library("adaptconv", "FRAGMENT")
_LIBRARY.define("place(Tensor weight, int[] columns) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("place", place, "CompositeImplicitAutograd")
