"""Kernel: compact weights on a tap pattern, with an optional footprint that spreads every tap."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.taps import TapPattern

Footprint = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A convolution kernel as weights on taps.

    Attributes:
        weight: ``[C_out, C_in / groups, T]``, one column a tap in the order of ``taps.offsets``.
        taps: where the T taps sit.
        footprint: None, or one small fixed filter an axis; every tap is spread by their outer
            product, and the window grows by the filter's length less one.

    Raises:
        ConvArgumentError: the weight's last axis does not match the taps, or the footprint's rank
            does not match the window.
        ConvTypeError: the weight is no tensor, or the taps are no pattern.
    """

    weight: Tensor
    taps: TapPattern
    footprint: Footprint | None = None

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
        if self.footprint is not None and len(self.footprint) != self.taps.axes:
            raise ConvArgumentError(
                f"a footprint has one filter an axis: expected {self.taps.axes}, got {len(self.footprint)}"
            )
        if self.footprint is not None and not all(self.footprint):
            raise ConvArgumentError(f"a footprint's filters have at least one value each, got {self.footprint!r}")

    @staticmethod
    def from_dense(weight: Tensor, taps: TapPattern) -> Kernel:
        """Keep the taps of a dense weight ``[C_out, C_in/groups, *window]``; the rest is dropped.

        Raises:
            ConvArgumentError: the weight's window is not the pattern's.
        """
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
        if self.footprint is None:
            return self
        window = tuple(w + len(f) - 1 for w, f in zip(self.taps.window, self.footprint, strict=True))
        sums: dict[tuple[int, ...], list[tuple[int, float]]] = {}
        for t, offset in enumerate(self.taps.offsets):
            for step in itertools.product(*(range(len(f)) for f in self.footprint)):
                value = 1.0
                for axis_filter, i in zip(self.footprint, step, strict=True):
                    value *= axis_filter[i]
                sums.setdefault(tuple(o + i for o, i in zip(offset, step, strict=True)), []).append((t, value))
        taps = TapPattern(tuple(sums), window)
        matrix = torch.zeros(len(self.taps), len(taps), dtype=torch.float64)
        for column, offset in enumerate(taps.offsets):
            for t, value in sums[offset]:
                matrix[t, column] += value
        return Kernel(self.weight @ matrix.to(self.weight), taps)


def _positions(taps: TapPattern, device: torch.device) -> Tensor:
    """Row-major position in the window of every tap, in the taps' order: ``[T]``."""
    strides = [math.prod(taps.window[axis + 1 :]) for axis in range(taps.axes)]
    positions = [sum(i * step for i, step in zip(offset, strides, strict=True)) for offset in taps.offsets]
    return torch.tensor(positions, dtype=torch.long, device=device)
