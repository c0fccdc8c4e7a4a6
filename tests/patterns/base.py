"""What a pattern is, and the decorator that lists one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptconv.problem import Padding
from adaptconv.taps import TapPattern
from tests.compared import Written

Forward = Callable[[Any, Tensor], Any]
SHAPES = {1: ((2, 4, 20), (3, 4, 23)), 2: ((2, 4, 9, 10), (3, 4, 11, 8)), 3: ((2, 4, 6, 7, 5), (3, 4, 5, 6, 8))}


@dataclass(frozen=True, slots=True)
class Pattern:
    """One way to write a convolution, and what it is.

    Attributes:
        name: unique.
        make: builds the model; it is fed one tensor.
        taps, padding: of the site that must be found, padding folded in; None where no site is a convolution of ours.
        shapes: of the input, and of another for dynamic shapes.
        kind: the site's, as in reports.
        made: whether the site must say that its weight is constructed; None where either will do.
        note: words that a note or reason must hold.
        pin: the backend that every site is forced to.
    """

    name: str
    make: Callable[[], nn.Module]
    taps: TapPattern | None
    padding: Padding
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    kind: str
    made: bool | None
    note: str
    pin: str

    @property
    def axes(self) -> int:
        """Spatial axes."""
        return len(self.shapes[0]) - 2

    def inputs(self, shape: Sequence[int]) -> list[Tensor]:
        """Two inputs of this shape, the same every time."""
        generator = torch.Generator().manual_seed(7)
        return [torch.randn(tuple(shape), generator=generator, dtype=torch.float32) for _ in range(2)]


PATTERNS: list[Pattern] = []


def padded(axes: int, padding: int | Sequence[int | tuple[int, int]]) -> Padding:
    """Padding as (before, after) an axis, from one number, or a number or pair an axis."""
    given = [padding] * axes if isinstance(padding, int) else list(padding)
    return tuple((p, p) if isinstance(p, int) else p for p in given)


def same(taps: TapPattern) -> Padding:
    """Padding that keeps extents at stride 1, the odd zero after, as torch's ``padding="same"``."""
    return tuple(((extent - 1) // 2, extent // 2) for extent in taps.window)


def pattern(
    taps: TapPattern | None, padding: int | Sequence[int | tuple[int, int]] | None = None, *, axes: int = 0,
    channels: int = 4, kind: str = "conv", made: bool | None = False, note: str = "", pin: str = "gather",
    eval: bool = False, **tensors: Any,
) -> Callable[[Forward], Forward]:  # fmt: skip
    """List a function ``(module, x) -> outputs`` as a pattern; its name is the pattern's.

    Args:
        taps: see ``Pattern``; its axes say which inputs are fed.
        padding: one number, or a number or pair an axis; None keeps extents.
        axes: spatial axes, where there are no taps to tell.
        channels: of the input.
        kind, made, note, pin: see ``Pattern``.
        eval: whether the model is in eval mode.
        tensors: what the module holds, see ``tests.compared.Written``.
    """
    rank = taps.axes if taps is not None else axes
    sides = () if taps is None else same(taps) if padding is None else padded(rank, padding)
    first, second = ((n, channels, *spatial) for n, _, *spatial in SHAPES[rank])

    def keep(call: Forward) -> Forward:
        name = call.__name__.strip("_").replace("_", " ")
        assert name not in {known.name for known in PATTERNS}, name
        make = partial(_in_eval_mode, partial(Written, call, **tensors)) if eval else partial(Written, call, **tensors)
        PATTERNS.append(Pattern(name, make, taps, sides, (first, second), kind, made, note, pin))
        return call

    return keep


def _in_eval_mode(make: Callable[[], nn.Module]) -> nn.Module:
    return make().eval()


def layer(
    conv: Callable[[], nn.Module], taps: TapPattern | None, padding: Any = None, *, name: str, **more: Any
) -> None:
    """List a module that is one convolution."""

    def call(m: Any, x: Tensor) -> Any:
        return m.conv(x)

    call.__name__ = name
    pattern(taps, padding, conv=conv, **more)(call)


grid = TapPattern.grid
