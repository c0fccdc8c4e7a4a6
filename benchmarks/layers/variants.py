"""Every variant of a layer in one direction, torch's and ours, ready to be called.

Torch's: "eager"; "compile", ``torch.compile`` of the function, weights as arguments; "freezing", the same with
Inductor's freezing and the weights as parameters (forward only). The single direction of a backward pass is the call
that autograd makes (see ``by_hand``), compiled as such. "dcls", the layer of the dcls package, constructs a kernel of
learnt positions at each call: another function, which is timed beside the rest and counts as no rival.

Ours: "dispatch", what an eager call runs; and forward "optimized", ``adaptconv.optimize`` of torch's own layer, with
freezing and without. Taps that are no grid are not torch's to have: there a layer with ``taps=`` is compiled.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import adaptconv
from adaptconv import dispatch, trilinear
from adaptconv.backends.geometry import geometry
from adaptconv.backends.halves import never_returns
from adaptconv.problem import Direction, Problem
from adaptconv.taps import TapPattern
from benchmarks.layers.by_hand import Way, ways_of
from benchmarks.layers.tensors import Tensors, layouts_of, tensors_of
from benchmarks.suites import Layer

LEVELS = ("eager", "compile", "all")
TORCH = ("eager", "compile", "freezing")
OURS = ("dispatch", "optimized", "optimized freezing")
_LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_ADAPTIVE = {1: adaptconv.AdaptiveConv1d, 2: adaptconv.AdaptiveConv2d, 3: adaptconv.AdaptiveConv3d}


class NotCompiled(RuntimeError):
    """Dynamo compiled nothing where a variant was to be compiled."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute a layer in one direction and layout.

    Attributes:
        kind: of ``TORCH`` or ``OURS``, or "dcls".
        layout: of its operands.
        way: how torch writes it; empty for ours.
        call: runs it; a weight gradient is compact.
        plan: of "dispatch", the plan and its source.
    """

    kind: str
    layout: str
    way: str
    call: Callable[[], Tensor]
    plan: str = ""

    @property
    def name(self) -> str:
        """What it is called in tables and files."""
        return " ".join(part for part in (self.kind, self.layout, self.way) if part)

    @property
    def compiles(self) -> bool:
        """Whether Inductor is in it."""
        return self.kind not in ("eager", "dispatch", "dcls")

    def first(self) -> Tensor:
        """The first call, in which it is compiled.

        Raises:
            NotCompiled: it should have been, and was not.
            Exception: whatever the call raises.
        """
        before = counters["stats"]["unique_graphs"]
        with torch._inductor.config.patch(freezing=True) if "freezing" in self.kind else nullcontext():
            result = self.call()
        if self.compiles and counters["stats"]["unique_graphs"] == before:
            raise NotCompiled(f"{self.name}: dynamo compiled no graph")
        return result


def variants_of(layer: Layer, direction: Direction, device: torch.device, level: str) -> list[Variant]:
    """All variants of a layer in one direction.

    Args:
        layer: which.
        direction: which.
        device: where it runs.
        level: "eager": neither rivals nor ours are compiled; "compile": with ``torch.compile`` and ``optimize``;
            "all": with freezing and the dcls package as well.
    """
    found: list[Variant] = []
    for layout in layouts_of(layer):
        problem, tensors = layer.problem(direction, layout, device), tensors_of(layer, layout, device)
        found += _torchs(problem, tensors, level)
        found += _ours(problem, tensors, level)
    if level == "all" and layer.spacing and direction is Direction.FORWARD and importlib.util.find_spec("DCLS"):
        found.append(_dcls(layer, tensors_of(layer, "contiguous", device).x))
    return found


def fresh(function: Callable[..., Any]) -> Any:
    """The same function with code of its own: dynamo keeps what it compiles, and its limits, by code object."""
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=function.__code__.co_name)
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


# ---- torch's ------------------------------------------------------------------------------------


def _torchs(problem: Problem, tensors: Tensors, level: str) -> list[Variant]:
    hangs = _hangs(problem)
    here = _hangs(problem, problem.memory_format)
    x, dy = tensors.x, None if problem.direction is Direction.FORWARD else tensors.dy
    found = []
    for way in ways_of(problem, tensors.w):
        if not here:
            found.append(Variant("eager", problem.layout, way.name, partial(way.function, x, dy, *way.weights)))
        if hangs or level == "eager":
            continue  # Inductor may choose the format in which torch's call does not return
        if way.name != "dense" or problem.direction is not Direction.FORWARD:
            compiled = torch.compile(fresh(way.function), dynamic=False)
            found.append(Variant("compile", problem.layout, way.name, partial(compiled, x, dy, *way.weights)))
        if level == "all" and problem.direction is Direction.FORWARD and way.name != "constructed":
            frozen = torch.compile(_with_own_code(_Held(way)), dynamic=False)
            found.append(Variant("freezing", problem.layout, way.name, partial(frozen, x)))
    return found


def _hangs(problem: Problem, memory_format: torch.memory_format | None = None) -> bool:
    """Whether torch's call may not come back, on the taps or on the dense kernel of their window; by default in any
    memory format.
    """
    filled = replace(problem, taps=TapPattern.grid(problem.taps.window))
    return never_returns(problem, memory_format) or never_returns(filled, memory_format)


class _Held(nn.Module):
    """A way with its weights as parameters."""

    def __init__(self, way: Way) -> None:
        super().__init__()
        self.function = way.function
        self.names = [f"weight{i}" for i in range(len(way.weights))]  # torch 2.11 cannot trace a ParameterList here
        for name, weight in zip(self.names, way.weights, strict=True):
            self.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """``y`` of ``x``."""
        return self.function(x, None, *[getattr(self, name) for name in self.names])


def _with_own_code(module: nn.Module) -> nn.Module:
    """The module with a class, and code, of its own."""
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": fresh(type(module).forward)})
    return module


def _dcls(layer: Layer, x: Tensor) -> Variant:
    logging.disable(logging.WARNING)  # the package names its missing extensions for every layer
    from DCLS.construct import modules

    window = TapPattern.parse(layer.taps).window
    peer = modules.Dcls2d(
        layer.c_in, layer.c_out, layer.spacing, dilated_kernel_size=window[0], padding=window[0] // 2,
        groups=layer.groups, bias=False,
    ).to(x)  # fmt: skip
    logging.disable(logging.NOTSET)
    return Variant("dcls", "contiguous", "", partial(peer, x))


# ---- ours ---------------------------------------------------------------------------------------


def _ours(problem: Problem, tensors: Tensors, level: str) -> list[Variant]:
    plan = dispatch.plan(problem)
    run = partial(trilinear.execute, plan, *tensors.operands(problem.direction))
    found = [Variant("dispatch", problem.layout, "", run, f"{plan.choice} ({plan.source})")]
    if problem.direction is not Direction.FORWARD or level == "eager":
        return found
    found.append(Variant("optimized", problem.layout, "", _optimized(problem, tensors)))
    if level == "all":
        found.append(Variant("optimized freezing", problem.layout, "", _optimized(problem, tensors)))
    return found


def _optimized(problem: Problem, tensors: Tensors) -> Callable[[], Tensor]:
    module = _with_own_code(_Layer(problem, tensors.w))
    return partial(adaptconv.optimize(module, dynamic=False), tensors.x)


class _Layer(nn.Module):
    """A problem's forward as a model has it: padding that torch's layer cannot take, and the layer."""

    def __init__(self, problem: Problem, w: Tensor) -> None:
        super().__init__()
        grid = None if problem.taps.footprint is not None else geometry(problem)
        sides = problem.padding if grid is None else grid.padding
        even = all(before == after >= 0 for before, after in sides)
        self.pads = [] if even else [zeros for pair in reversed(sides) for zeros in pair]
        shared: dict[str, Any] = {
            "stride": problem.stride, "padding": tuple(pair[0] for pair in sides) if even else 0,
            "groups": problem.groups, "bias": False, "device": "meta",
        }  # fmt: skip
        if grid is None:
            shared["device"] = w.device
            layer: nn.Module = _ADAPTIVE[problem.axes](problem.c_in, problem.c_out, problem.taps, **shared)
            weight = w
        else:
            shared |= {"kernel_size": grid.size, "dilation": grid.dilation}
            layer = _LAYERS[problem.axes](problem.c_in, problem.c_out, **shared)
            weight = w.reshape(*w.shape[:2], *grid.size).contiguous(memory_format=problem.memory_format)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """``y`` of ``x``."""
        y: Tensor = self.layer(F.pad(x, self.pads) if self.pads else x)
        return y
