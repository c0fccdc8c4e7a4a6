"""What one writes with torch alone: a convolution, and for taps that are no grid a dense kernel or a sum.

Every way is plain torch operations with all that can be settled settled, so that it is the same code whether it runs
eager or compiled. The gradients are the calls that torch's autograd makes: ``aten.convolution_backward`` with the mask
of one gradient, on the kernel that the forward pass has constructed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.backends.geometry import geometry
from adaptconv.backends.weights import spread_weight
from adaptconv.problem import Direction, Problem
from adaptconv.taps import TapPattern

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_GRIDS = 4  # a sum of more convolutions nobody writes
Function = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Way:
    """One way to write a problem.

    Attributes:
        name: "conv", "constructed" (a dense kernel made of the compact weight in the call), "dense" (made before) or
            "sum" (of convolutions, each with a weight of its own).
        weights: what it holds as parameters, in the operands' layout.
        function: ``(x, dy, *weights) -> y``, ``dx`` or the compact ``dw [C_out, C_in/groups, T]``, as the direction
            is; ``dy`` is None in the forward direction.
    """

    name: str
    weights: tuple[Tensor, ...]
    function: Function


def ways_of(problem: Problem, w: Tensor) -> list[Way]:
    """The ways to write a problem whose compact weight is ``w [C_out, C_in/groups, T]``."""
    if problem.taps.footprint is None and problem.taps.single_grid() is not None:
        return [Way("conv", (_window(problem, w),), _one(problem))]
    places = _places(problem.taps)
    filled = replace(problem, taps=TapPattern.grid(problem.taps.window))
    made = _constructor(problem, w)
    kernel = _window(filled, made(w).flatten(2))
    if problem.direction is Direction.FORWARD:
        conv = _one(filled)
        ways = [
            Way("constructed", (w,), lambda x, dy, weight: conv(x, dy, made(weight))),
            Way("dense", (kernel,), conv),
        ]
    elif problem.direction is Direction.GRAD_INPUT:
        ways = [Way("dense", (kernel,), _one(filled))]
    else:
        whole = _one(filled)
        spreading = _spreading(problem.taps, w)
        if spreading is None:
            index = torch.tensor(places, device=w.device)
            ways = [Way("dense", (kernel,), lambda x, dy, weight: whole(x, dy, weight).index_select(2, index))]
        else:
            ways = [Way("dense", (kernel,), lambda x, dy, weight: whole(x, dy, weight) @ spreading.t())]
    return ways + _sum(problem, w)


def _one(problem: Problem) -> Function:
    """One convolution of a single grid in the problem's direction; padding torch cannot take is padded before."""
    grid = geometry(problem)
    assert grid is not None, "one convolution needs one grid"
    conv, axes, groups = _CONV[problem.axes], problem.axes, problem.groups
    stride, dilation = list(problem.stride), list(grid.dilation)
    pads = [] if grid.symmetric is not None else grid.pads
    crop = [-zeros for zeros in pads]
    padding = list(grid.symmetric or (0,) * axes)

    def forward(x: Tensor, dy: Tensor | None, weight: Tensor) -> Tensor:
        return conv(F.pad(x, pads) if pads else x, weight, None, stride, padding, dilation, groups)

    def backward(x: Tensor, dy: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, ...]:
        x = F.pad(x, pads) if pads else x
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, dilation, False, [0] * axes, groups, mask
        )
        return found

    def grad_input(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        dx = backward(x, dy, weight, [True, False, False])[0]
        return F.pad(dx, crop) if pads else dx

    def grad_weight(x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        return backward(x, dy, weight, [False, True, False])[1].flatten(2)

    found: dict[Direction, Function] = {
        Direction.FORWARD: forward, Direction.GRAD_INPUT: grad_input, Direction.GRAD_WEIGHT: grad_weight
    }  # fmt: skip
    return found[problem.direction]


def _window(problem: Problem, w: Tensor) -> Tensor:
    """A compact weight on one grid as torch wants it, in the problem's layout."""
    grid = geometry(problem)
    assert grid is not None
    weight = w.reshape(*w.shape[:2], *grid.size)
    return weight.contiguous(memory_format=problem.memory_format)


def _places(taps: TapPattern) -> list[int]:
    """Each tap's row-major place in the window."""
    place = {p: i for i, p in enumerate(itertools.product(*map(range, taps.window)))}
    return [place[offset] for offset in taps.offsets]


def _spreading(taps: TapPattern, like: Tensor) -> Tensor | None:
    """What spreads a compact weight over its window, ``[T, window]``; None for taps without a footprint."""
    if taps.footprint is None:
        return None
    unit, plain = spread_weight(torch.eye(len(taps), dtype=torch.float64).reshape(len(taps), 1, -1), taps)
    spread = torch.zeros(len(taps), taps.window_taps, dtype=torch.float64)
    spread[:, _places(plain)] = unit[:, 0]
    return spread.to(like)


def _constructor(problem: Problem, like: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes the dense kernel ``[C_out, C_in/groups, *window]`` of a compact weight."""
    window, count = problem.taps.window, problem.taps.window_taps
    spreading = _spreading(problem.taps, like)
    if spreading is not None:
        return lambda w: (w @ spreading).reshape(*w.shape[:2], *window)
    index = torch.tensor(_places(problem.taps), device=like.device)

    def made(w: Tensor) -> Tensor:
        kernel = w.new_zeros(*w.shape[:2], count).index_copy(2, index, w)
        return kernel.reshape(*w.shape[:2], *window)

    return made


def _sum(problem: Problem, w: Tensor) -> list[Way]:
    """The sum of a few convolutions, if the taps are that: one grid each, as many layers in a model by hand."""
    grids = None if problem.taps.footprint is not None else problem.taps.grids(_MAX_GRIDS)
    if grids is None or len(grids) < 2:
        return []
    padded = F.pad(w, (0, 1))  # a grid's tap that another grid owns has weight zero
    functions, weights, owned = [], [], []
    for grid in grids:
        axes = zip(grid.origin, grid.size, grid.dilation, strict=True)
        lattice = tuple(itertools.product(*(range(o, o + s * d, d) for o, s, d in axes)))
        part = replace(problem, taps=TapPattern(lattice, problem.taps.window))
        functions.append(_one(part))
        weights.append(_window(part, padded[:, :, [t if t >= 0 else len(problem.taps) for t in grid.taps]]))
        owned += list(grid.taps)

    def total(x: Tensor, dy: Tensor | None, *parts: Tensor) -> Tensor:
        result = functions[0](x, dy, parts[0])
        for function, part in zip(functions[1:], parts[1:], strict=True):
            result = result + function(x, dy, part)
        return result

    column = {t: i for i, t in enumerate(owned) if t >= 0}
    index = torch.tensor([column[t] for t in range(len(problem.taps))], device=w.device)

    def columns(x: Tensor, dy: Tensor, *parts: Tensor) -> Tensor:
        found = [function(x, dy, part) for function, part in zip(functions, parts, strict=True)]
        return torch.cat(found, 2).index_select(2, index)

    gradient = problem.direction is Direction.GRAD_WEIGHT
    return [Way("sum", tuple(weights), columns if gradient else total)]
