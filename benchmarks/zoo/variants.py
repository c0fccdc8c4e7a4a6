"""The ways to run a network, what each answers, and what is to be learned from a run besides its time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import adaptconv
from benchmarks.zoo import Network

TORCH = ("eager", "channels_last", "compile", "freezing")
OURS = ("adapt", "adapt channels_last", "optimize", "optimize freezing")
_RATE = 1e-9  # of SGD: a full step's work, on weights that stay what they were
_ONLY_MOVES = {
    "clone", "contiguous", "convolution", "copy", "to", "view", "permute", "transpose", "reshape", "expand", "slice",
    "select", "unsqueeze", "squeeze", "split", "unbind", "t", "as", "strided", "backward", "addmm", "mm", "bmm",
    "linear", "direction", "pointwise", "unary", "binary", "prepacked", "mkl", "mkldnn", "detach", "alias",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Precision:
    """What a network computes in.

    Attributes:
        dtype: of parameters and inputs; under autocast of what it narrows, and those are float32.
        autocast: whether forwards run under ``torch.autocast``.
    """

    dtype: torch.dtype = torch.float32
    autocast: bool = False

    @property
    def rounding(self) -> float:
        """The largest relative error of rounding one number."""
        return torch.finfo(self.dtype).eps / 2

    def build(self, network: Network) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model in evaluation mode, and its inputs."""
        model, inputs = network.build()
        return (model, inputs) if self.autocast else (model.to(self.dtype), tuple(x.to(self.dtype) for x in inputs))

    def context(self) -> AbstractContextManager[object]:
        """What forwards run in."""
        return torch.autocast("cpu", dtype=self.dtype) if self.autocast else nullcontext()


FLOAT32 = Precision()


def names_for(network: Network, what: str) -> list[str]:
    """The variants that a network has, forward or in training."""
    names = [*TORCH, *OURS]
    if what != "forward":
        names = [name for name in names if "freezing" not in name]
    if network.memory_format is None:
        names = [name for name in names if "channels_last" not in name]
    return names


def made(
    name: str, network: Network, *, train: bool, compiled: bool = True, precision: Precision = FLOAT32
) -> tuple[Any, tuple[Tensor, ...], nn.Module]:
    """A variant from scratch: what to call, its inputs, and the module that has the parameters.

    Args:
        name: one of ``names_for``.
        network: which network.
        train: in training mode.
        compiled: whether to compile what the variant compiles, or leave the module that would be.
        precision: to build it in.
    """
    model, inputs = precision.build(network)
    model.train(train)
    if "channels_last" in name and network.memory_format is not None:
        for parameter in model.parameters():  # not model.to(): it asks the same of 4-D and 5-D parameters
            if parameter.ndim == inputs[0].ndim:
                parameter.data = parameter.data.contiguous(memory_format=network.memory_format)
        inputs = (inputs[0].contiguous(memory_format=network.memory_format),)
    if "adapt" in name or ("optimize" in name and network.needs == "DCLS"):
        adaptconv.adapt(model)
    call: Any = model
    # An option, or dynamo would let the two ways to compile a network share their code; freezing itself is asked for
    # while the first call is traced, see Run.results.
    options: dict[str, Any] = {"options": {"freezing": True}} if "freezing" in name else {}
    if compiled and name in ("compile", "freezing"):
        call = torch.compile(model, **options)
    elif compiled and "optimize" in name:
        call = adaptconv.optimize(model, **options)
    return call, inputs, model


class Run:
    """A variant, ready to be called: a forward pass, or a training step (forward, backward, SGD).

    Attributes:
        name: of the variant.
        compiled: whether Inductor is in it.
    """

    def __init__(self, name: str, network: Network, *, train: bool, precision: Precision = FLOAT32) -> None:
        self.name, self.precision = name, precision
        self.compiled = name in ("compile", "freezing") or "optimize" in name
        self.call, self.inputs, self.model = made(name, network, train=train, precision=precision)
        self.step = _Step(self.model) if train else None

    def __call__(self) -> Tensor:
        """Run once; the output."""
        if self.step is None:
            return self._forward()
        return self.step(self._forward)

    def _forward(self) -> Tensor:
        with self.precision.context():
            output: Tensor = self.call(*self.inputs)
        return output

    def results(self) -> list[Tensor]:
        """Run once; the output and, in training, every gradient."""
        frozen = self.compiled and "freezing" in self.name
        with torch._inductor.config.patch(freezing=True) if frozen else nullcontext():
            output = self().detach()
        return [output, *(self.step.gradients() if self.step else ())]


class _Step:
    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=_RATE)
        self.cotangent: Tensor | None = None

    def __call__(self, forward: Callable[[], Tensor]) -> Tensor:
        self.optimizer.zero_grad()
        output = forward()
        if self.cotangent is None:
            random = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
            self.cotangent = random.to(output.dtype) / random.numel() ** 0.5
        output.backward(self.cotangent)
        self.optimizer.step()
        return output

    def gradients(self) -> list[Tensor]:
        """A copy of each parameter's gradient, zeros where it has none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]


def exact(network: Network, *, train: bool, precision: Precision = FLOAT32) -> list[Tensor]:
    """What every variant should answer: the eager network in float64, of parameters and inputs as they are."""
    model, inputs = precision.build(network)
    model.train(train).double()
    wide = tuple(x.double() for x in inputs)
    if not train:
        with torch.no_grad():
            return [model(*wide)]
    step = _Step(model)
    output = step(lambda: model(*wide)).detach()
    return [output, *step.gradients()]


def error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The larger of two relative L2 errors: of the output, and of all gradients together; infinite if not finite."""
    parts = [(results[:1], truth[:1])] + ([(results[1:], truth[1:])] if len(truth) > 1 else [])
    found = []
    for ours, exact_ones in parts:
        pairs = list(zip(ours, exact_ones, strict=True))
        off = sum(float((a.double() - b).square().sum()) for a, b in pairs)
        found.append((off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5)
    return max(found) if all(f == f for f in found) else float("inf")


def conditioning(
    network: Network, truth: Sequence[Tensor], *, train: bool, precision: Precision = FLOAT32, draws: int = 4
) -> list[float]:
    """Errors of eager torch on inputs that are off by a rounding, in several draws: what any result may owe to the
    network.

    An activation with a kink is the usual cause: one value on the other side of zero changes every gradient below it.
    """
    found = []
    for seed in range(draws):
        run = Run("eager", network, train=train, precision=precision)
        noise, size = torch.Generator().manual_seed(seed), precision.rounding
        run.inputs = tuple((x * (1 + size * torch.randn(x.shape, generator=noise))).to(x.dtype) for x in run.inputs)
        with nullcontext() if train else torch.no_grad():
            found.append(error(run.results(), truth))
    return found


def copies_in(run: Run) -> tuple[list[Tensor], int]:
    """The results of a compiled variant's first call, and how many kernels of its code only move data."""
    from torch._inductor.graph import GraphLowering

    # Not by Inductor's own helper, which resets dynamo and with it what earlier variants compiled.
    sources: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", sources.append):
        results = run.results()
    return results, sum(_copies(source) for source in sources)


def _copies(source: str) -> int:
    """Kernels named after nothing but moves; Inductor names each after the operations in it.

    A kernel named after a convolution or a product alone changes the layout of an operand: the arithmetic itself
    is a call to a library.
    """
    kernels = re.findall(r"^cpp_fused_(\w+) = async_compile", source, flags=re.MULTILINE)
    return sum(all(word in _ONLY_MOVES or word.isdigit() for word in name.split("_") if word) for name in kernels)


def grouped_share(run: Run) -> float:
    """Share of a run's processor time in convolutions of more than one group, forward and backward, 0 to 1."""
    groups_at = {"aten::convolution": 8, "aten::convolution_backward": 9}
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        run()
    events = profile.events() or []
    total = sum(event.self_cpu_time_total for event in events)
    grouped = 0.0
    for event in events:
        at = groups_at.get(event.name)
        if at is not None and int(event.concrete_inputs[at]) > 1:
            grouped += event.cpu_time_total
    return grouped / total if total else 0.0
