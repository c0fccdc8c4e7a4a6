"""Kernel: compact weights on a tap pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.taps import TapPattern


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A convolution kernel as weights on taps.

    Attributes:
        weight: ``[C_out, C_in / groups, T]``, one column a tap in the order of ``taps.offsets``.
        taps: where the T taps sit, and by what footprint each is spread.

    Raises:
        ConvArgumentError: the weight's last axis does not match the taps.
        ConvTypeError: the weight is no tensor, or the taps are no pattern.
    """

    weight: Tensor
    taps: TapPattern

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor):
            raise ConvTypeError(f"a Kernel's weight must be a tensor, got {type(self.weight).__name__}")
        if not isinstance(self.taps, TapPattern):
            raise ConvTypeError(
                f"a Kernel's taps must be a TapPattern, got {type(self.taps).__name__}; TapPattern.parse reads text"
            )
        if self.weight.dim() != 3 or self.weight.shape[2] != len(self.taps):
            raise ConvArgumentError(
                f"a Kernel's weight is [C_out, C_in/groups, T] with T = {len(self.taps)} taps, "
                f"got shape {tuple(self.weight.shape)}"
            )

    @staticmethod
    def from_dense(weight: Tensor, taps: TapPattern) -> Kernel:
        """Keep the taps of a dense weight ``[C_out, C_in/groups, *window]``; the rest is dropped.

        Raises:
            ConvArgumentError: the weight's window is not the pattern's, or its taps are spread.
        """
        if taps.footprint is not None:
            raise ConvArgumentError("a dense weight's taps cannot be told apart once they are spread by a footprint")
        if tuple(weight.shape[2:]) != taps.window:
            raise ConvArgumentError(f"weight window {tuple(weight.shape[2:])} is not the taps' window {taps.window}")
        return Kernel(weight.flatten(2).index_select(2, _positions(taps, weight.device)), taps)

    def dense(self) -> Tensor:
        """The weight written into its dense window, ``[C_out, C_in/groups, *window]``; differentiable."""
        plain = self.spread()
        positions = _positions(plain.taps, plain.weight.device)
        flat = plain.weight.new_zeros((*plain.weight.shape[:2], plain.taps.window_taps))
        return flat.index_copy(2, positions, plain.weight).reshape(*plain.weight.shape[:2], *plain.taps.window)

    def spread(self) -> Kernel:
        """The same function without a footprint: its taps and weights written out."""
        if self.taps.footprint is None:
            return self
        plain, _ = self.taps.spread()
        matrix = torch.tensor(spreading_values(self.taps), dtype=torch.float64).reshape(len(self.taps), len(plain))
        return Kernel(self.weight @ matrix.to(self.weight), plain)

    def plot(self, ax: Any = None, *, title: str | None = None) -> Any:
        """Draw the root mean square of the weights over channels at every position; needs matplotlib."""
        from adaptconv.plots import plot

        return plot(self, ax, title=title)


@lru_cache(maxsize=1024)
def spreading_values(taps: TapPattern) -> tuple[float, ...]:
    """The linear map from a pattern's own weights to those of its plain taps, ``[T, T_plain]`` row by row."""
    plain, entries = taps.spread()
    matrix = [0.0] * (len(taps) * len(plain))
    for own, place, value in entries:
        matrix[own * len(plain) + place] = value
    return tuple(matrix)


def _positions(taps: TapPattern, device: torch.device) -> Tensor:
    """Row-major position in the window of every tap, in the taps' order: ``[T]``."""
    strides = [math.prod(taps.window[axis + 1 :]) for axis in range(taps.axes)]
    positions = [sum(i * step for i, step in zip(offset, strides, strict=True)) for offset in taps.offsets]
    return torch.tensor(positions, dtype=torch.long, device=device)
