"""Convolutions that hooks look into, or change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.lookalikes.base import lookalike

FIVE: dict[str, Any] = {"v": (6, 4, 5, 5)}


CONV = partial(nn.Conv2d, 4, 6, 3, padding=1)


def hooked(register: str, hook: Any, of: Callable[[], nn.Module] = CONV) -> Any:
    """What makes a module with a hook."""

    def make() -> nn.Module:
        module = of()
        getattr(module, register)(hook)
        return module

    return make


class Seeing(nn.Module):
    """A convolution of which a hook keeps what it is shown, in a buffer."""

    shown: Tensor

    def __init__(self, register: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.register_buffer("shown", torch.zeros(()))
        getattr(self.conv, register)(self._see)

    def _see(self, module: nn.Module, first: Any, second: Any = None) -> None:
        shown = first[0] if second is None or isinstance(second, Tensor) else second[0]
        shown = second if isinstance(second, Tensor) else shown
        with torch.no_grad():
            self.shown.add_(shown.detach().abs().sum())

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        y: Tensor = self.conv(x)
        return y


@lookalike("sum", a=hooked("register_forward_hook", lambda module, args, out: out * 2), b=lambda: nn.Conv2d(4, 6, 1))
def a_forward_hook_changes_one(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@lookalike(
    "sum", a=hooked("register_forward_pre_hook", lambda module, args: (args[0] + 1,)), b=lambda: nn.Conv2d(4, 6, 1)
)
def a_pre_hook_changes_the_input_of_one(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@lookalike("sum", a=lambda: Seeing("register_forward_hook"), b=lambda: nn.Conv2d(4, 6, 1))
def a_forward_hook_reads_one(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@lookalike("", a=lambda: Seeing("register_forward_pre_hook"), b=lambda: nn.Conv2d(4, 6, 1))
def a_pre_hook_reads_one(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@lookalike("", a=lambda: Seeing("register_full_backward_hook"), b=lambda: nn.Conv2d(4, 6, 1))
def a_backward_hook_reads_one(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@lookalike(
    "",
    a=hooked("register_full_backward_hook", lambda module, dx, dy: tuple(None if g is None else 2 * g for g in dx)),
    b=lambda: nn.Conv2d(4, 6, 1),
)
def a_backward_hook_changes_one(m: Any, x: Tensor) -> Any:
    return m.a(x) + m.b(x)


@lookalike("")
def a_gradient_hook_on_the_weight_made(m: Any, x: Tensor) -> Any:
    dense = torch.kron(m.w, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))[..., :-1, :-1]  # torch 2.11 minds writing in place
    dense.register_hook(lambda g: g * 3)
    return F.conv2d(x, dense, padding=2)


@lookalike("", **FIVE)
def a_gradient_hook_on_one_output(m: Any, x: Tensor) -> Any:
    y = F.conv2d(x, m.w, padding=1)
    y.register_hook(lambda g: g * 3)
    return y + F.conv2d(x, m.v, padding=2)


@lookalike("")
def a_gradient_hook_on_the_padded_input(m: Any, x: Tensor) -> Any:
    p = F.pad(x, (1, 1, 1, 1))
    p.register_hook(lambda g: g * 3)
    return F.conv2d(p, m.w)


@lookalike("padding", pad=hooked("register_forward_hook", lambda module, args, out: out + 1, lambda: nn.ZeroPad2d(1)))
def a_hook_changes_what_was_padded(m: Any, x: Tensor) -> Any:
    return F.conv2d(m.pad(x), m.w)


class Tagged(Tensor):
    """A tensor that knows it is one of ours, and does nothing else."""


@lookalike("", w=lambda: nn.Parameter(torch.randn(6, 4, 3, 3).as_subclass(Tagged)))
def a_subclass_of_tensor_for_a_weight(m: Any, x: Tensor) -> Any:
    dense = torch.zeros(6, 4, 5, 5).as_subclass(Tagged)
    dense[:, :, ::2, ::2] = m.w
    return F.conv2d(x, dense, padding=2).as_subclass(Tensor)
