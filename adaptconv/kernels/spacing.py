"""Learnable spacings: a few elements at learned real-valued positions in a large window."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptconv.errors import ConvArgumentError
from adaptconv.kernel import Kernel
from adaptconv.kernels.base import Family, Ints, Slot, bound_of_uniform, per_axis, without_dead_taps
from adaptconv.kernels.construct import spread
from adaptconv.kernels.profiles import WITH_SIGMA, Rule
from adaptconv.kernels.shared_spacing import convolve_shared, expanded, spread_shared
from adaptconv.taps import TapPattern

_START_SIGMA = {"max": 0.0, "gauss": 0.23}


@dataclass(frozen=True)
class LearnableSpacing(Family):
    """``count`` weights a channel at learned positions: dilated convolution with learnable spacings (DCLS).

    ``K = sum_n w_n g_n``, where ``g_n`` spreads element n around its position (see ``construct.construct`` for the
    versions); then an ordinary convolution with K, dilation 1. Khalfaoui-Hassani et al., "Dilated convolution with
    learnable spacings" (ICLR 2023) and "Beyond bilinear interpolation" (2023).

    The layer keeps ``weight [C_out, C_in/groups, n]``; ``P [axes, C_out, C_in/groups, n]``, positions counted from the
    window's centre ``k // 2``, P[a] along axis a; and for max and gauss ``SIG`` like P, which widens elements (at
    exactly 0 its gradient is 0). Positions outside the window are read at its border, and their gradient passes
    through: call ``layer.clamp_parameters()`` after each optimizer step to bring them back. Round P and zero SIG in
    place at will. The version may change while the layer lives:
    ``layer.family = dataclasses.replace(layer.family, version="max")``; v0 and v1 leave a SIG that is there alone.

    Args:
        count: number of elements; at most the positions of the window.
        window: size of the constructed kernel, what a dilated kernel would span; with ``dense`` of its last axis.
        version: ``"v0"`` and ``"v1"`` interpolate linearly (they differ in the gradient at whole positions: the slope
            to the right, or 0), ``"max"`` spreads a triangle, ``"gauss"`` a Gaussian.
        dense: sizes of the leading axes, where positions are learned along the last axis only: every tap of the
            leading axes then has ``count`` elements of its own, ``weight [C_out, C_in/groups, *dense, n]`` and
            ``P [1, *weight.shape]``.
        shared: one set of positions for all output channels, ``P [axes, C_in/groups, n]``. The layer is then computed
            as a depthwise convolution of n outputs a channel and a 1x1 convolution wherever that is less work.

    Raises:
        ConvArgumentError: more elements than positions, an unknown version, or settings that do not fit together.
    """

    count: int
    window: Ints
    version: str = "gauss"
    dense: Ints | None = None
    shared: bool = False
    factorised: bool = field(init=False, repr=False, compare=False, default=False)
    _taps: TapPattern | None = field(init=False, repr=False, compare=False, default=None)
    _rule: Rule | None = field(init=False, repr=False, compare=False, default=None)

    constructed = True

    def __post_init__(self) -> None:
        Rule.of(self.version, (1,))  # refuses what is no version
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ConvArgumentError(f"count, the number of elements, must be an int of at least 1; got {self.count!r}")
        if self.shared and self.dense is not None:
            raise ConvArgumentError("shared positions are learned along every axis: leave dense out")
        object.__setattr__(self, "factorised", self.shared)

    def bound(self, axes: int) -> LearnableSpacing:
        """The window an axis, and the leading axes' sizes."""
        if self._taps is not None and self._taps.axes == axes:
            return self
        dense, window = self._sizes(axes)
        new = replace(self, window=window, dense=dense or None)
        new._check_count(math.prod(window))
        object.__setattr__(new, "_rule", new._rule_for(window))
        object.__setattr__(new, "_taps", new._taps_for((*dense, *window)).with_density(new._density(window)))
        return new

    def _sizes(self, axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes of the leading axes without positions, and of those with."""
        if self.dense is None:
            return (), per_axis(self.window, axes, "window")
        if axes < 2:
            raise ConvArgumentError(f"dense names the sizes of the leading axes, which {axes}-D kernels do not have")
        dense = per_axis(self.dense, axes - 1, "dense")
        return dense, per_axis(self.window, 1, "window (the last axis' alone, where dense is given)")

    def _check_count(self, positions: int) -> None:
        if self.count > positions:
            raise ConvArgumentError(
                f"count={self.count} elements do not fit the {positions} positions of window={self.window}: count is "
                f"the number of weights (what kernel_size**axes counts in an ordinary layer), window the size of the "
                f"kernel in which they move (what a dilated kernel spans, say 17); got them the wrong way round?"
            )

    def _rule_for(self, window: tuple[int, ...]) -> Rule:
        return Rule.of(self.version, window)

    def _taps_for(self, window: tuple[int, ...]) -> TapPattern:
        return TapPattern.grid(window)

    def _density(self, window: tuple[int, ...]) -> float:
        """Share of the window that the elements of a channel can touch: two places an axis each where it is linear."""
        if self.version in WITH_SIGMA:  # as wide as SIG says
            return 1.0
        return min(1.0, self.count * 2.0 ** len(window) / math.prod(window))

    @property
    def rule(self) -> Rule:
        """How a bound family spreads its elements."""
        assert self._rule is not None, "bound(axes) comes first"
        return self._rule

    @property
    def taps(self) -> TapPattern:
        """Every position of the window."""
        assert self._taps is not None, "bound(axes) comes first"
        return self._taps

    def slots(self, c_out: int, c_in: int) -> tuple[Slot, ...]:
        """Weight, P, and for max and gauss SIG."""
        dense = self.dense if isinstance(self.dense, tuple) else ()
        weight = (c_out, c_in, *dense, self.count)
        position = (len(self.rule.window), *(weight[1:] if self.shared else weight))
        sigma = (Slot("SIG", position),) if self.version in WITH_SIGMA else ()
        return (Slot("weight", weight), Slot("P", position), *sigma)

    def compact(self, *tensors: Tensor) -> Tensor:
        """The constructed window, flattened."""
        weight, position, sigma = _named(tensors)
        make = spread_shared if self.shared else spread
        return make(weight, position, sigma, self.rule).flatten(2)

    def convolve(
        self, x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], stride: tuple[int, ...], padding: Any,
        groups: int,
    ) -> Tensor:  # fmt: skip
        """With shared positions: in steps where that is less work, else on the constructed kernel."""
        weight, position, sigma = _named(tensors)
        return convolve_shared(
            x, weight, position, sigma, bias, self.rule, self.taps, stride, padding, groups
        )  # fmt: skip

    @property
    def spare(self) -> tuple[str, ...]:
        """Tensors a layer may hold from another version, unused: v0 and v1 leave SIG alone."""
        return () if self.version in WITH_SIGMA else ("SIG",)

    # ---- values -------------------------------------------------------------------------------

    def reset(self, tensors: Mapping[str, Tensor]) -> None:
        """Weights as torch's for as many taps; P normal with deviation 0.5 (with ``dense`` uniform over the window)."""
        weight = tensors["weight"]
        bound_of_uniform(weight, weight[0].numel())
        if self.dense is None:
            nn.init.normal_(tensors["P"], 0, 0.5)
        else:
            reach = self.rule.window[0] // 2
            nn.init.uniform_(tensors["P"], -reach, reach)
        self.clamp(tensors)
        if "SIG" in tensors:
            nn.init.constant_(tensors["SIG"], _START_SIGMA[self.version])

    def fan_in(self, c_in: int) -> int:
        """Elements that one output adds up."""
        return c_in * math.prod(self.dense if isinstance(self.dense, tuple) else ()) * self.count

    def _reach(self) -> list[tuple[int, int]]:
        """The least and greatest value of each row of P."""
        return [(-(k // 2), k - 1 - k // 2) for k in self.rule.window]

    def clamp(self, tensors: Mapping[str, Tensor]) -> None:
        """Bring positions back into the window."""
        for row, (least, most) in zip(tensors["P"], self._reach(), strict=True):
            row.clamp_(least, most)

    def frozen(self, *tensors: Tensor, positions: str = "touched", tolerance: float = 0.0, **how: Any) -> Kernel:
        """The kernel as a static pattern of taps.

        Args:
            tensors: weight, P and SIG.
            positions: ``"touched"`` keeps the constructed values on every tap that one channel's construction
                touches; ``"nearest"`` moves each element to the nearest whole position (halves to the even one) as
                one tap of its whole weight, and adds weights that meet.
            tolerance: with ``"touched"``, taps whose values are at most this in every channel are left out.
            how: nothing else.

        Raises:
            ConvArgumentError: no tap is left, or another way to freeze.
        """
        if how or positions not in ("touched", "nearest") or tolerance < 0 or (tolerance and positions == "nearest"):
            raise ConvArgumentError(
                f"learnable spacings freeze with positions='touched' (and a tolerance of at least 0) or with "
                f"positions='nearest'; got {dict(positions=positions, tolerance=tolerance, **how)!r}"
            )
        weight, position, sigma = _named(tensors)
        with torch.no_grad():
            if positions == "nearest":
                position = expanded(position, weight) if self.shared else position
                return without_dead_taps(Kernel(_nearest(weight, position, self.rule).flatten(2), self.taps))
            kernel = self.kernel(weight, position, *(() if sigma is None else (sigma,)))
            low = kernel.weight.abs().amax((0, 1)) <= tolerance
            return without_dead_taps(Kernel(kernel.weight.masked_fill(low, 0), kernel.taps))

    # ---- checkpoints --------------------------------------------------------------------------

    def check_state(self, state: Mapping[str, Tensor]) -> list[str]:
        """A SIG too many or too few, and positions that are no numbers."""
        wrong = []
        if "P" in state and ("SIG" in state) != (self.version in WITH_SIGMA):
            has = "a" if "SIG" in state else "no"
            wrong.append(
                f"wrong checkpoint version: the checkpoint has {has} SIG, the layer's version is {self.version!r}; "
                f"checkpoints of max and gauss have SIG, those of v0 and v1 have none. Make the layer with the version "
                f"the checkpoint was trained with"
            )
        for name in ("P", "SIG"):
            value = state.get(name)
            if value is not None and not value.is_meta and not bool(value.isfinite().all()):
                wrong.append(f"{name} has values that are not finite: this checkpoint's training had diverged")
        return wrong

    def settle(self, tensors: Mapping[str, Tensor]) -> None:
        """Clamp positions outside the window, with a warning."""
        position = tensors["P"]
        if position.is_meta:
            return
        before = position.clone()
        self.clamp(tensors)
        moved = int(((before - position).abs() > 0).sum())
        if moved:
            warnings.warn(
                f"{moved} of {before.numel()} positions of the checkpoint lie outside window={self.window} and were "
                f"clamped to its border; was the checkpoint trained with a larger window?",
                stacklevel=2,
            )


def _named(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    return tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None


def _nearest(weight: Tensor, position: Tensor, rule: Rule) -> Tensor:
    """Each element's weight at the whole position nearest to its own: ``[*lead, prod(window)]``."""
    place = torch.zeros(weight.shape, dtype=torch.long, device=weight.device)
    for axis, extent in enumerate(rule.window):
        at = (position[rule.order[axis]].double() + rule.centre[axis]).round().long()
        if not rule.clamped:  # what lies outside is lost
            weight = weight.masked_fill((at < 0) | (at >= extent), 0)
        place = place * extent + at.clamp(0, extent - 1)
    return weight.new_zeros((*weight.shape[:-1], math.prod(rule.window))).scatter_add(-1, place, weight)
