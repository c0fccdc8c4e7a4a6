"""Neighbours: what follows a convolution in a graph and is worth telling people about."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

from adaptconv.compile.nodes import CONV_AXES, named, value

_NORM_ARGS = ("input", "running_mean", "running_var", "weight", "bias", "training")


def followed_by(node: fx.Node) -> str:
    """A note on the one node that reads a convolution's result: batch norm that can fold, a pointwise convolution."""
    if len(node.users) != 1:
        return ""
    (reader,) = node.users
    if reader.op != "call_function":
        return ""
    if is_settled_norm(reader):
        return "batch norm in evaluation mode follows: it folds into the weights under Inductor's freezing"
    axes = CONV_AXES.get(reader.target)
    if axes is None or CONV_AXES.get(node.target) != axes:
        return ""
    try:
        ours, theirs = named(node, ("input", "weight")), named(reader, ("input", "weight"))
        inner, outer = value(ours["weight"]), value(theirs["weight"])
    except (KeyError, AttributeError):
        return ""
    depthwise = inner.shape[1] == 1 and inner.shape[0] > 1
    pointwise = theirs["input"] is node and all(extent == 1 for extent in outer.shape[2:])
    mixes = outer.shape[1] == inner.shape[0]
    return "depthwise, a pointwise convolution follows: the two are planned apart" * (depthwise and pointwise and mixes)


def is_settled_norm(node: fx.Node) -> bool:
    """Whether a node is a batch norm with running statistics: an affine map of each channel."""
    if node.op != "call_function" or node.target not in (F.batch_norm, torch.batch_norm):
        return False
    return named(node, _NORM_ARGS).get("training", False) is False
