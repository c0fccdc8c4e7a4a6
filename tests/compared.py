"""Two answers of one model, compiled and plain: outputs, gradients and what the calls left behind, compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import adaptconv
from adaptconv.compile.judging import SiteReport
from adaptconv.compile.optimize import forget_compiled, log_of

Call = Callable[..., Any]


class Written(nn.Module):
    """A forward function with parameters and buffers of its own: ``forward(self, x)`` is ``call(self, x)``.

    Attributes:
        seen: where hooks put what they are shown; compared with the rest.
    """

    def __init__(self, call: Callable[[Any, Tensor], Any], **tensors: Any) -> None:
        """Keep the function and make its tensors.

        Args:
            call: what the module computes.
            tensors: a shape for a parameter of random values, a tensor for a buffer, what makes a module or
                parameter, or None for nothing.
        """
        super().__init__()
        self.call = call
        self.seen: list[Tensor] = []
        for name, made in tensors.items():
            if made is None:
                continue
            if callable(made) and not isinstance(made, Tensor):
                setattr(self, name, made())
            elif isinstance(made, Tensor):
                self.register_buffer(name, made.clone())
            else:
                setattr(self, name, nn.Parameter(torch.randn(made)))

    def forward(self, x: Tensor) -> Any:
        """Compute."""
        return self.call(self, x)


@dataclass(frozen=True, slots=True)
class Answer:
    """What calls of a model gave.

    Attributes:
        outputs: every tensor returned, call by call.
        gradients: of the inputs and parameters, call by call; None where nothing reaches one.
        state: parameters and buffers after the calls, and what hooks saw.
    """

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    state: tuple[Tensor, ...]


def answer(model: nn.Module, call: Call, xs: Sequence[Tensor], *, train: bool) -> Answer:
    """Call a model on each input, its parameters and buffers changed between the calls.

    The change is what shows a value read while compiling and kept. Gradients are of random cotangents, always the same.
    """
    outputs: list[Tensor] = []
    gradients: list[Tensor | None] = []
    for i, x in enumerate(xs):
        if i:
            _change(model)
        torch.manual_seed(i)
        wants = train and (x.is_floating_point() or x.is_complex())
        fed = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(wants)
        with torch.set_grad_enabled(train):
            returned = call(fed)
        flat = [returned] if isinstance(returned, Tensor) else list(returned)
        outputs += [t.detach().clone() for t in flat]
        if train:
            ends = [t for t in flat if t.requires_grad]
            leaves = [t for t in (fed, *model.parameters()) if t.requires_grad]
            torch.manual_seed(100 + i)
            cotangents = [torch.randn(t.shape, dtype=torch.float32).to(t.dtype) for t in ends]  # at any precision alike
            gradients += torch.autograd.grad(ends, leaves, cotangents, allow_unused=True)
    state = [*model.parameters(), *model.buffers(), *getattr(model, "seen", ())]
    return Answer(tuple(outputs), tuple(gradients), tuple(t.detach().clone() for t in state))


def _change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            steps = torch.linspace(-0.3, 0.4, parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
            parameter.add_(steps.to(parameter.dtype))
        for buffer in model.buffers():
            buffer.copy_(buffer.roll(1, -1) if buffer.dim() else buffer)


def difference(ours: Answer, theirs: Answer, tolerance: float = 1e-5, *, strict: bool = True) -> str:
    """What differs first, in words, or "".

    Args:
        ours: to judge.
        theirs: what is right.
        tolerance: largest error, relative to the largest magnitude of each tensor (at least 1).
        strict: whether strides, and no gradient instead of one of zeros, must agree too.
    """
    for what in ("outputs", "gradients", "state"):
        left, right = getattr(ours, what), getattr(theirs, what)
        if len(left) != len(right):
            return f"{len(left)} {what} instead of {len(right)}"
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            wrong = _wrong(a, b, tolerance, strict, what)
            if wrong:
                return f"{what}[{i}]: {wrong}"
    return ""


def _wrong(a: Tensor | None, b: Tensor | None, tolerance: float, strict: bool, what: str) -> str:
    if a is None or b is None:
        if a is b or (not strict and not any(t.any() for t in (a, b) if t is not None)):
            return ""
        return f"{'none' if a is None else 'a tensor'} instead of {'none' if b is None else 'a tensor'}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{tuple(a.shape)} {a.dtype} instead of {tuple(b.shape)} {b.dtype}"
    if strict and what == "outputs" and a.stride() != b.stride():
        return f"strides {a.stride()} instead of {b.stride()}"
    a, b = (t if t.is_complex() else t.double() for t in (a, b))
    if not torch.equal(a.isfinite(), b.isfinite()):
        return "not finite in other places"
    a, b = (torch.where(t.isfinite(), t, 0) for t in (a, b))
    error = float((a - b).abs().max()) if a.numel() else 0.0
    scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
    return "" if error <= tolerance * scale else f"off by {error:.2g} where the largest is {scale:.2g}"


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run rewritten graphs as they are: Inductor takes seconds, and the rewriting is what is in question.

    A site that was given up with a warning is an error in here.
    """
    with ExitStack() as stack:
        missing = "adaptconv.compile.inductor._missing_toolchain"
        stack.enter_context(mock.patch(missing, return_value="a test asked for it"))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*runs uncompiled")
        warnings.filterwarnings("error", message="adaptconv left")
        yield


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A model, with the same random parameters every time; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return make()


def optimized(
    make: Callable[[], nn.Module], xs: Sequence[Tensor], pin: str | None, *, train: bool, **options: Any
) -> tuple[Answer, list[SiteReport], int]:
    """The answer of a model, optimized with a backend pinned; its sites and the number of its graphs."""
    forget_compiled()
    model = built(make)
    with ExitStack() as stack:
        if pin is not None:
            stack.enter_context(adaptconv.pinned(pin))
        fast = adaptconv.optimize(model, **options)
        given = answer(model, fast, xs, train=train)
    log = log_of(fast)
    assert log is not None
    found = given, log.sites, log.graphs
    forget_compiled()
    return found
