"""Unfold: convolutions written as a matrix product with the unfolded input."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from adaptconv import arguments
from adaptconv.compile.effects import Effects, storages
from adaptconv.compile.nodes import Conv, named, value
from adaptconv.errors import AdaptConvError
from adaptconv.taps import TapPattern

_UNFOLD_ARGS = ("input", "kernel_size", "dilation", "padding", "stride")
_PRODUCTS = (operator.matmul, torch.matmul, "matmul", torch.bmm, "bmm")
_TURNS = ("transpose", "swapaxes", "swapdims", torch.transpose, torch.swapaxes, torch.swapdims)
_PERMUTES = ("permute", torch.permute)


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """The unfolded input: the node of ``F.unfold``, and what stands for it, maybe ``[N, L, C T]`` instead."""

    unfold: fx.Node
    node: fx.Node
    turned: bool

    @property
    def inner(self) -> tuple[fx.Node, ...]:
        return (self.node, self.unfold) if self.turned else (self.unfold,)


def read_products(gm: fx.GraphModule, effects: Effects) -> dict[fx.Node, Conv]:
    """Every product of a weight with an unfolded input, by its node."""
    found: dict[fx.Node, Conv] = {}
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        try:
            conv = _read(node)
        except (AdaptConvError, TypeError, KeyError, AttributeError, ValueError):
            continue  # a product like any other
        if conv is None:
            continue
        read = conv.inner[-1]
        mine = storages(read.args[0]) if isinstance(read.args[0], fx.Node) else None
        if mine is None or effects.changed(mine | (storages(read) or mine), read, node):
            continue
        if not effects.changed_later(mine, node):
            found[node] = conv
    return found


def _read(node: fx.Node) -> Conv | None:
    if node.target in _PRODUCTS and len(node.args) == 2 and not node.kwargs:
        left, right = node.args
        if (columns := _columns(right)) is not None and not columns.turned:
            return _product(node, columns, left, None, transposed=False, weight_transposed=False)
        if (columns := _columns(left)) is not None and columns.turned:
            return _product(node, columns, right, None, transposed=True, weight_transposed=True)
        return None
    if node.target in (F.linear, torch._C._nn.linear):
        a = named(node, ("input", "weight", "bias"))
        columns = _columns(a["input"])
        if columns is None or not columns.turned:
            return None
        return _product(node, columns, a["weight"], a.get("bias"), transposed=True, weight_transposed=False)
    if node.target in (torch.einsum, torch.functional.einsum):
        return _read_einsum(node)
    return None


def _read_einsum(node: fx.Node) -> Conv | None:
    """``'ok,nkl->nol'`` by any letters, with the operands and the axes of the answer either way round."""
    equation, *operands = node.args
    if isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    terms, arrow, answer = str(equation).replace(" ", "").partition("->")
    letters = terms.split(",")
    if len(operands) != 2 or len(letters) != 2 or not arrow or "." in terms:
        return None
    if _columns(operands[0]) is not None:
        operands, letters = operands[::-1], letters[::-1]
    columns = _columns(operands[1])
    weight, unfolded = letters
    if columns is None or len(weight) != 2 or len(set(unfolded)) != 3 or len(unfolded) != 3:
        return None
    batch = unfolded[0]
    channel, place = (unfolded[2], unfolded[1]) if columns.turned else (unfolded[1], unfolded[2])
    out = weight.replace(channel, "")
    if channel not in weight or len(out) != 1 or out in unfolded or channel in answer:
        return None
    if answer not in (batch + out + place, batch + place + out):
        return None
    return _product(
        node, columns, operands[0], None, transposed=answer[1] == place, weight_transposed=weight[0] == channel
    )


def _columns(node: object) -> _Columns | None:
    """An unfolded input, as ``F.unfold`` gives it or with its last two axes exchanged."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_function" and node.target is F.unfold:
        return _Columns(node, node, False)
    turned = (node.target in _TURNS and {a % 3 for a in _ints(node.args[1:])} == {1, 2}) or (
        node.target in _PERMUTES and [a % 3 for a in _ints(node.args[1:])] == [0, 2, 1]
    )
    of = node.args[0] if node.args else None
    if turned and not node.kwargs and isinstance(of, fx.Node) and of.op == "call_function" and of.target is F.unfold:
        return _Columns(of, node, True)
    return None


def _without_batch(node: object) -> fx.Node | None:
    """The matrix behind a weight, where every item of the batch has the same one: ``[A, B]`` or ``[1, A, B]``."""
    if isinstance(node, fx.Node) and node.target in ("expand", "expand_as", torch.broadcast_to):
        node = node.args[0]
    if not isinstance(node, fx.Node):
        return None
    shape = value(node).shape
    return node if len(shape) == 2 or (len(shape) == 3 and shape[0] == 1) else None


def _ints(given: Sequence[object]) -> list[int]:
    flat = list(given[0]) if len(given) == 1 and isinstance(given[0], tuple | list) else list(given)
    return [a for a in flat if isinstance(a, int)]


def _product(
    node: fx.Node, columns: _Columns, weight: object, bias: fx.Node | None, *, transposed: bool, weight_transposed: bool
) -> Conv | None:
    weight = _without_batch(weight)
    if weight is None or (weight_transposed and value(weight).dim() != 2):
        return None
    a = named(columns.unfold, _UNFOLD_ARGS)
    x = a["input"]
    if value(x).dim() != 4:
        return None
    size = arguments.checked_ints(2, a["kernel_size"], "kernel_size", least=1)
    dilation = arguments.checked_ints(2, a.get("dilation", 1), "dilation", least=1)
    stride = arguments.checked_ints(2, a.get("stride", 1), "stride", least=1)
    taps = TapPattern.grid(size, dilation)
    padding = arguments.checked_padding(2, a.get("padding", 0), taps.window, stride)
    turned = (transposed, weight_transposed)
    return Conv(node, (x, weight, bias), taps, stride, padding, 1, "unfold", inner=columns.inner, turned=turned)
