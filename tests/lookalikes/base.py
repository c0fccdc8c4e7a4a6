"""What a look-alike is, and the decorators that list one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.compared import Written

Forward = Callable[[Any, Tensor], Any]


@dataclass(frozen=True, slots=True)
class Lookalike:
    """One model that must keep its value, its gradients and what it does on the side.

    Attributes:
        name: unique.
        make: builds the model; it is fed one tensor.
        seems: what it must not be taken for: "holes", "padding", "sum" or "unfold"; "" where anything may be done
            that stays right.
        shape: of the input.
        train: whether gradients are asked for.
        dtype: of the input.
        tolerance: relative to the largest magnitude of each tensor.
    """

    name: str
    make: Callable[[], nn.Module]
    seems: str
    shape: tuple[int, ...]
    train: bool
    dtype: torch.dtype
    tolerance: float

    def inputs(self) -> list[Tensor]:
        """Two inputs of one shape, the same every time."""
        generator = torch.Generator().manual_seed(7)
        kind = self.dtype if self.dtype.is_complex else torch.float32
        return [(2 * torch.randn(self.shape, generator=generator, dtype=kind)).to(self.dtype) for _ in range(2)]


LOOKALIKES: list[Lookalike] = []


def lookalike(
    seems: str = "", *, shape: tuple[int, ...] = (2, 4, 9, 9), train: bool = True,
    dtype: torch.dtype = torch.float32, tolerance: float = 1e-5, **tensors: Any,
) -> Callable[[Forward], Forward]:  # fmt: skip
    """List a function ``(module, x) -> outputs`` as a look-alike; its name is the look-alike's.

    Args:
        seems: see ``Lookalike``.
        shape: of ``x``.
        train: see ``Lookalike``.
        dtype: of ``x``.
        tolerance: see ``Lookalike``; for those that compute in half precision.
        tensors: what the module holds, see ``tests.compared.Written``; always a parameter ``w [6, 4, 3, 3]`` too.
    """

    def keep(call: Forward) -> Forward:
        name = call.__name__.strip("_").replace("_", " ")
        assert name not in {known.name for known in LOOKALIKES}, name
        held = {"w": (6, 4, 3, 3), **tensors}
        LOOKALIKES.append(Lookalike(name, partial(Written, call, **held), seems, shape, train, dtype, tolerance))
        return call

    return keep


def of_holes(**more: Any) -> Callable[[Forward], Forward]:
    """List a function ``(module) -> weight [6, 4, 5, 5]`` whose convolution must not be taken for one with holes."""

    def keep(weight: Forward) -> Forward:
        def call(m: Any, x: Tensor) -> Any:
            return torch.nn.functional.conv2d(x, weight(m, x), padding=2)

        call.__name__ = weight.__name__
        lookalike(**{"seems": "holes", **more})(call)
        return weight

    return keep


def spread(w: Tensor) -> Tensor:
    """A 3x3 kernel with its holes written as zeros: 5x5."""
    holes = w.new_zeros(*w.shape[:2], 5, 5)
    holes[:, :, ::2, ::2] = w
    return holes
