"""The allow-list: which nodes of a dynamo graph are linear in what they are given, by construction.

A weight that is made from parameters by these alone is an affine function of them: two independent probes with random
values then tell everything about where its zeros are. What is not on the list is never taken apart.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from adaptconv.compile.effects import mutates


class Kind(Enum):
    """What a node is, given which of its inputs hold run-time values."""

    CONSTANT = "constant"
    AFFINE = "affine"
    OPAQUE = "opaque"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FIRST = _words(
    """view reshape flatten unflatten ravel permute transpose swapaxes swapdims movedim moveaxis t T mT squeeze
    unsqueeze expand expand_as view_as reshape_as broadcast_to repeat tile repeat_interleave flip fliplr flipud rot90
    roll contiguous clone narrow select index_select getitem chunk split unbind cat concat concatenate stack hstack
    vstack diagonal diag_embed gather take take_along_dim tril triu neg neg_ positive pos sum mean adjoint
    div div_ truediv itruediv divide masked_fill masked_fill_ fill_ zero_ pad"""
)
# Where an operation is linear in what it is given, by position; products are, in any one factor.
_LINEAR_IN: dict[str, frozenset[int]] = {
    **dict.fromkeys(_FIRST, frozenset((0,))),
    **dict.fromkeys(_words("add add_ iadd sub sub_ isub subtract copy_"), frozenset((0, 1))),
    **dict.fromkeys(_words("slice_scatter select_scatter diagonal_scatter"), frozenset((0, 1))),
    **dict.fromkeys(_words("setitem index_put index_put_"), frozenset((0, 2))),
    **dict.fromkeys(_words("scatter scatter_ scatter_add scatter_add_"), frozenset((0, 3))),
    **dict.fromkeys(_words("index_add index_add_ index_copy index_copy_"), frozenset((0, 3))),
    "where": frozenset((1, 2)),
}
_PRODUCTS = _words(
    """mul mul_ imul multiply matmul imatmul mm bmm mv einsum kron tensordot outer ger linear
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"""
)
_OF_SHAPE = _words(
    """new_zeros new_ones new_full new_tensor zeros_like ones_like full_like size dim ndimension numel shape ndim dtype
    device"""
)
_OF_OTHERS_FORM = _words("to type_as expand_as view_as reshape_as")  # of their second argument, they read no value
# Functions of constants: no two calls differ.
_OF_CONSTANTS = _words(
    """zeros ones full eye arange linspace tensor meshgrid tril_indices triu_indices abs sub neg minimum maximum clamp
    clip pow ipow exp sqrt rsqrt square sign eq ne lt le gt ge logical_and logical_or logical_not logical_xor and_ or_
    xor invert not_ floor_divide floordiv ifloordiv remainder mod relu cos sin floor ceil round bool long int float
    double half bfloat16 to type type_as nonzero softmax cumsum prod amax amin max min any all rsub
    argmax argmin sort unique bitwise_and bitwise_or bitwise_not bitwise_xor one_hot len"""
)
_NAMES = frozenset(_LINEAR_IN) | _PRODUCTS | _OF_SHAPE | _OF_CONSTANTS
_NAMESPACES = (operator, torch, torch.functional, F, torch._C._nn, torch.Tensor)


def _functions() -> dict[Any, str]:
    """Every function the names stand for: by identity, so that a namesake of somebody else's is not taken for one."""
    found: dict[Any, str] = {}
    for name in sorted(_NAMES):
        for space in _NAMESPACES:
            function = getattr(space, name, None)
            if callable(function):
                found.setdefault(function, name)
    return found


_FUNCTIONS = _functions()


def name_of(node: fx.Node) -> str | None:
    """The allow-list's name of what a node calls; None where it has none."""
    if node.op == "call_method":
        name = str(node.target)
        return name if name in _NAMES else None
    if node.op != "call_function":
        return None
    if node.target is getattr:
        name = str(node.args[1])
        return name if name in ("T", "mT", "shape", "ndim", "dtype", "device") else None
    if isinstance(node.target, torch._ops.OpOverloadPacket):  # as some properties are traced, ``w.T`` for one
        name = node.target.__name__.removeprefix("numpy_")
        return name if node.target._qualified_op_name.startswith("aten::") and name in _NAMES else None
    return _FUNCTIONS.get(node.target)


def kind_of(node: fx.Node, runtime: Callable[[fx.Node], bool]) -> Kind:
    """Whether a node is a constant, affine in the run-time values it is given, or neither.

    Args:
        node: the node.
        runtime: whether another node holds run-time values.
    """
    name = name_of(node)
    if name is None or "out" in node.kwargs:
        return Kind.OPAQUE
    at = [position for position, given in _inputs(node) if runtime(given)]
    if name in _OF_OTHERS_FORM:
        at = [position for position in at if position != 1]
    if not at:
        # What is left is a function of nothing, so its value can be had here, as long as no two calls differ.
        return Kind.CONSTANT
    if name in _OF_SHAPE and at == [0]:
        return Kind.CONSTANT
    if name in _PRODUCTS:
        kept = len(at) == 1 and (not mutates(node) or at == [0])
        return Kind.AFFINE if kept else Kind.OPAQUE
    if name in _LINEAR_IN and all(position in _LINEAR_IN[name] for position in at):
        return Kind.AFFINE if _keeps_dtype(node) else Kind.OPAQUE
    return Kind.OPAQUE


def _keeps_dtype(node: fx.Node) -> bool:
    """Not so a sum or mean that is asked for another dtype: rounding is no linear map."""
    return "dtype" not in node.kwargs


def _inputs(node: fx.Node) -> Iterator[tuple[int | str, fx.Node]]:
    """Every node given, with its position; one in a list has the list's position, a keyword its name."""
    named = {"input": 0, "self": 0, "tensors": 0, "other": 1, "source": 3, "src": 3, "values": 2, "value": 3}
    for position, argument in [*enumerate(node.args), *((named.get(k, k), v) for k, v in node.kwargs.items())]:
        given: list[fx.Node] = []
        fx.node.map_arg(argument, given.append)
        for one in given:
            yield position, one
