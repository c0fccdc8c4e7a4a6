"""Slices: the part of a problem that the oracle can afford.

The oracle works in float64 and tap by tap, so on large problems it would cost more than all the timing. It is then
computed on a slice that is *exactly* what the whole result holds there, spread over first to last:

- FORWARD and GRAD_INPUT are independent across images, groups, and the channels of their result in a group;
- GRAD_WEIGHT is independent across groups and across both channels of a weight; all images enter it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from adaptconv.problem import Direction, Problem

ORACLE_S = 0.15  # roughly what the oracle of one problem may take on two CPU cores

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slice:
    """Part of a problem that can be computed on its own. Channels are counted within a group.

    Attributes:
        images, groups, outs, ins: indices kept along each, ascending.
    """

    images: Index
    groups: Index
    outs: Index
    ins: Index

    def of(self, problem: Problem) -> Problem:
        """The problem of the slice alone."""
        count = len(self.groups)
        return replace(
            problem, batch=len(self.images), groups=count, c_in=count * len(self.ins), c_out=count * len(self.outs)
        )

    def activation(self, problem: Problem, t: Tensor, channels: Index) -> Tensor:
        """The part of ``[N, C, *spatial]`` it keeps, ``channels`` of every kept group."""
        t = taken(t, 0, self.images)
        t = t.reshape(t.shape[0], problem.groups, -1, *t.shape[2:])
        return taken(taken(t, 1, self.groups), 2, channels).flatten(1, 2)

    def weight(self, problem: Problem, w: Tensor) -> Tensor:
        """The part of ``[C_out, C_in/groups, T]`` it keeps."""
        w = taken(w.reshape(problem.groups, -1, *w.shape[1:]), 0, self.groups)
        return taken(taken(w, 1, self.outs), 2, self.ins).flatten(0, 1)

    def operands(self, problem: Problem, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The part of both operands it needs."""
        x, dy = partial(self.activation, channels=self.ins), partial(self.activation, channels=self.outs)
        if problem.direction is Direction.FORWARD:
            return x(problem, a), self.weight(problem, b)
        if problem.direction is Direction.GRAD_INPUT:
            return dy(problem, a), self.weight(problem, b)
        return x(problem, a), dy(problem, b)

    def result(self, problem: Problem, t: Tensor) -> Tensor:
        """The part of the problem's result that is the slice's result."""
        if problem.direction is Direction.FORWARD:
            return self.activation(problem, t, self.outs)
        if problem.direction is Direction.GRAD_INPUT:
            return self.activation(problem, t, self.ins)
        return self.weight(problem, t)


def affordable_slice(problem: Problem, seconds: float = ORACLE_S) -> Slice:
    """The largest slice, by halving, whose oracle is expected to take no longer than this."""
    counts = {
        "images": problem.batch,
        "groups": problem.groups,
        "outs": problem.c_out // problem.groups,
        "ins": problem.c_in // problem.groups,
    }
    whole = dict(counts)
    free = {
        Direction.FORWARD: ("groups", "images", "outs"),
        Direction.GRAD_INPUT: ("groups", "images", "ins"),
        Direction.GRAD_WEIGHT: ("groups", "outs", "ins"),
    }[problem.direction]
    while _oracle_s(problem, counts) > seconds and any(counts[name] > 1 for name in free):
        widest = max(free, key=lambda name: counts[name])
        counts[widest] = (counts[widest] + 1) // 2
    return Slice(**{name: spread(whole[name], count) for name, count in counts.items()})


def spread(size: int, count: int) -> Index:
    """``count`` indices spread evenly over ``range(size)``, first and last included; one alone is the last."""
    if count == 1:
        return (size - 1,)
    return tuple(i * (size - 1) // (count - 1) for i in range(count))


def _oracle_s(problem: Problem, counts: dict[str, int]) -> float:
    """Expected seconds of the oracle: arithmetic, traffic and fixed cost of every tap (two CPU cores)."""
    pixels = counts["images"] * counts["groups"] * math.prod(problem.out_spatial)
    flops = 2 * pixels * counts["outs"] * counts["ins"]
    moved = pixels * (counts["outs"] + counts["ins"])
    return len(problem.taps) * (flops / 8e9 + 8e-9 * moved + 4e-5)


def taken(t: Tensor, dim: int, index: Index) -> Tensor:
    """The places of one axis that an index names; the tensor itself where that is all of them."""
    if len(index) == t.shape[dim]:
        return t
    return t.index_select(dim, torch.tensor(index, device=t.device))
