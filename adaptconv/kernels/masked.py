"""Masked kernels: a grid of weights of which some count, by a fixed mask, a density or a threshold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaptconv.backends.weights import constant, picked
from adaptconv.errors import AdaptConvError, ConvArgumentError
from adaptconv.kernels.base import Family, Ints, Slot, bound_of_uniform, per_axis
from adaptconv.taps import TapPattern

GRADIENTS = ("masked", "straight-through")


@dataclass(frozen=True)
class Mask:
    """Which weights count, as a plain value that can be compared and hashed.

    Attributes:
        shape: extents.
        bits: a byte 0 or 1 a position, row by row.
    """

    shape: tuple[int, ...]
    bits: bytes = field(repr=False)

    @staticmethod
    def of(mask: Any) -> Mask:
        """From nested sequences, an array or a tensor (live where not zero), a ``TapPattern`` or its text.

        Raises:
            ConvArgumentError: ragged, not numbers, or no position is live.
        """
        if isinstance(mask, Mask):
            return mask
        if isinstance(mask, str):
            mask = TapPattern.parse(mask)
        if isinstance(mask, TapPattern):
            live = set(mask.offsets)
            return Mask(mask.window, bytes(offset in live for offset in TapPattern.grid(mask.window).offsets)).checked()
        try:  # on the CPU whatever the default device is
            values = (mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device="cpu")).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConvArgumentError(
                f"a mask is a rectangular array of 0 and 1, got {type(mask).__name__}: {error}"
            ) from error
        if values.is_floating_point() and bool(values.isnan().any()):
            raise ConvArgumentError("a mask has NaN in it: it must say 0 or 1 at every position")
        return Mask(tuple(values.shape), bytes((values != 0).flatten().tolist())).checked()

    def checked(self) -> Mask:
        """Itself, if any position is live.

        Raises:
            ConvArgumentError: none is.
        """
        if not any(self.bits):
            raise ConvArgumentError(
                f"this mask of shape {self.shape} kills every weight: leave at least one position live"
            )
        return self

    def tensor(self) -> Tensor:
        """Bool, on the CPU, in its shape."""
        return torch.frombuffer(bytearray(self.bits), dtype=torch.bool).reshape(self.shape)

    @property
    def live(self) -> int:
        """How many positions count."""
        return sum(self.bits)


@dataclass(frozen=True, repr=False)
class Masked(Family):
    """A sparse kernel: the weight where it counts, zero elsewhere, ``k = weight * m``.

    What counts is settled by exactly one of three:

    - ``mask``: fixed; ``[*size]``, shared by all channels, or ``[C_out, C_in/groups, *size]``. The layer keeps it as a
      bool buffer ``mask``, and a checkpoint must hold the same mask: taps, and so compiled code and tuned plans,
      follow from it. Positions that are live in no channel are no taps at all.
    - ``density``: the fraction of the layer's weights of largest magnitude, ``m = |weight| >= v`` with ``v`` the k-th
      largest magnitude, ``k = max(1, round(density * weights))``, anew at each call. Weights that tie with ``v`` are
      kept, so at least k are. Magnitude pruning: Han et al., "Learning both Weights and Connections" (2015).
    - ``threshold``: ``m = |weight| >= min(threshold, max |weight|)``, anew at each call.

    So a layer is never silently without a weight: a mask without a live position is refused, and the largest
    magnitude of the layer always counts. A NaN among the weights counts too, and shows in the output.

    Gradients: ``"masked"`` is the exact gradient, zero where the mask is. ``"straight-through"`` is the gradient of a
    layer without a mask, after Bengio, Leonard & Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons" (2013): weights that do not count go on learning and may come back. With a fixed mask and masked
    gradients the live positions are the tap pattern, so that sparse backends apply; otherwise it is the full grid.
    The parameter itself is never written to.

    ``weight`` is ``[C_out, C_in/groups, *size]`` as torch's. It starts uniform, with the output's variance that of
    torch's dense layer: by the number of live weights an output has under a mask; for a density d, torch's bound
    divided by ``sqrt(1 - (1 - d)^3)``, the part of a uniform weight's second moment that the largest fraction d holds.

    Args:
        size: positions along each axis, an int or one an axis.
        mask: nested sequences, an array or a tensor, live where not zero; a ``TapPattern`` with window ``size``,
            or its text.
        density: in (0, 1].
        threshold: >= 0, finite, in the unit of the weights.
        dilation: step between positions, an int or one an axis.
        gradient: ``"masked"`` or ``"straight-through"``.

    Raises:
        ConvArgumentError: not exactly one of mask, density and threshold; a value out of range; a mask of another shape
            or without a live position.
    """

    size: Ints
    mask: Any = None
    density: float | None = None
    threshold: float | None = None
    dilation: Ints = 1
    gradient: str = "masked"
    _taps: TapPattern | None = field(default=None, init=False, compare=False)
    _live: tuple[int, ...] = field(default=(), init=False, compare=False)
    _is_shared: bool = field(default=True, init=False, compare=False)

    may_lack = ("mask",)

    def __post_init__(self) -> None:
        given = [name for name in ("mask", "density", "threshold") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConvArgumentError(f"Masked needs exactly one of mask, density and threshold; got {given or 'none'}")
        if self.gradient not in GRADIENTS:
            raise ConvArgumentError(f"gradient must be one of {', '.join(map(repr, GRADIENTS))}; got {self.gradient!r}")
        density, threshold = _number(self.density, "density"), _number(self.threshold, "threshold")
        if density is not None and not 0 < density <= 1:
            raise ConvArgumentError(f"density is the fraction of weights to keep, above 0 and at most 1; got {density}")
        if threshold is not None and not 0 <= threshold < math.inf:
            raise ConvArgumentError(f"threshold is a finite magnitude of at least 0; got {threshold}")
        if self.mask is not None:
            object.__setattr__(self, "mask", Mask.of(self.mask))
        # The mask of largest magnitudes is dear enough to be kept between calls without gradients.
        object.__setattr__(self, "constructed", density is not None)

    def bound(self, axes: int) -> Masked:
        """Size and dilation an axis, and which positions are taps."""
        if self._taps is not None and self._taps.axes == axes:
            return self
        size, dilation = per_axis(self.size, axes, "size"), per_axis(self.dilation, axes, "dilation")
        family = Masked(size, self.mask, self.density, self.threshold, dilation, self.gradient)
        taps, live, is_shared = TapPattern.grid(size, dilation), tuple(range(math.prod(size))), True
        if isinstance(self.mask, Mask):
            shape = self.mask.shape
            if shape != size and (len(shape) != axes + 2 or shape[2:] != size):
                raise _wrong_shape(shape, size, None)
            columns = [self.mask.bits[i :: len(live)] for i in live]  # each position in every channel
            if self.gradient == "masked":
                live = tuple(i for i, column in enumerate(columns) if any(column))
            is_shared = all(all(columns[i]) for i in live)
            share = sum(sum(columns[i]) for i in live) / sum(len(columns[i]) for i in live)
        else:
            share = self.density or 1.0  # what a threshold will leave is not known
        object.__setattr__(family, "_taps", taps.subset(live).with_density(share))
        object.__setattr__(family, "_live", live)
        object.__setattr__(family, "_is_shared", is_shared)
        return family

    @property
    def taps(self) -> TapPattern:
        """Positions that are live in any channel, or the full grid."""
        if self._taps is None:
            raise ConvArgumentError("this family is not bound: call bound(axes) first")
        return self._taps

    @property
    def _size(self) -> tuple[int, ...]:
        assert isinstance(self.size, tuple), "bound"
        return self.size

    def slots(self, c_out: int, c_in: int) -> tuple[Slot, ...]:
        """A weight of torch's shape, and the mask where it is fixed."""
        weight = Slot("weight", (c_out, c_in, *self._size))
        if self.mask is None:
            return (weight,)
        if self.mask.shape not in (self._size, weight.shape):
            raise _wrong_shape(self.mask.shape, self._size, weight.shape)
        return (weight, Slot("mask", self.mask.shape, learnable=False, dtype=torch.bool))

    def compact(self, *tensors: Tensor) -> Tensor:
        """The weight where it counts."""
        weight = tensors[0].flatten(2)
        if self.mask is None:
            dead = self._dead(weight)
            return weight if dead is None else self._without(weight, dead)
        pick = None
        if len(self._live) < weight.shape[2]:
            pick = constant(self._live, weight.device)
            weight = picked(weight, self._live)
        if self._is_shared:
            return weight
        mask = tensors[1].flatten(-len(self._size))
        return self._without(weight, ~(mask if pick is None else mask.index_select(-1, pick)))

    def _dead(self, weight: Tensor) -> Tensor | None:
        """Where magnitudes are too small; None where all count. A NaN is never smaller than a limit, nor greater."""
        magnitude = weight.detach().abs()
        if self.threshold is not None:
            return magnitude < magnitude.amax().clamp(max=self.threshold)
        kept = self._kept(weight.numel())
        if kept == weight.numel():
            return None
        return magnitude < magnitude.flatten().topk(kept, sorted=False).values.amin()

    def _kept(self, weights: int) -> int:
        assert self.density is not None
        return max(1, round(self.density * weights))

    def _without(self, weight: Tensor, dead: Tensor) -> Tensor:
        if self.gradient == "masked":
            return weight.masked_fill(dead, 0)
        # w - w is an exact zero and w - 0 exactly w; the gradient sees the first operand only.
        return weight - weight.detach().masked_fill(~dead, 0)

    def reset(self, tensors: Mapping[str, Tensor]) -> None:
        """The weight as the class says, and the buffer as the mask."""
        weight = tensors["weight"]
        if self.density is None:
            bound_of_uniform(weight, self.fan_in(weight.shape[1]))
        else:
            d = self._kept(weight.numel()) / weight.numel()
            bound_of_uniform(weight, weight[0].numel(), (d * (3 - 3 * d + d * d)) ** -0.5)
        self.settle(tensors)

    def fan_in(self, c_in: int) -> int:
        """Weights that count for one output, on average."""
        weights = c_in * math.prod(self._size)
        if isinstance(self.mask, Mask):
            return max(1, round(weights * self.mask.live / len(self.mask.bits)))
        return weights if self.density is None else self._kept(weights)

    def check_state(self, state: Mapping[str, Tensor]) -> list[str]:
        """A checkpoint's mask that is not the family's."""
        mask = state.get("mask")
        if mask is None or mask.is_meta:
            return []
        if self.mask is None:
            return ["this checkpoint has a fixed mask: build the layer with Masked(size, mask=checkpoint['mask'])"]
        try:
            came = Mask.of(mask)
        except AdaptConvError as error:
            return [f"the checkpoint's mask cannot be used: {error}"]
        if came == self.mask:
            return []
        return [
            f"the checkpoint's mask of shape {came.shape} with {came.live} live positions is not the layer's, of shape "
            f"{self.mask.shape} with {self.mask.live}: build the layer with Masked(size, mask=checkpoint['mask'])"
        ]

    def settle(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the family's mask into the buffer: a checkpoint of a plain convolution has none."""
        if self.mask is not None:
            tensors["mask"].copy_(self.mask.tensor())

    def __repr__(self) -> str:
        parts = [repr(self.size)]
        if self.mask is not None:
            parts.append(f"mask=<{'x'.join(map(str, self.mask.shape))}, {self.mask.live} live>")
        parts += [f"{n}={getattr(self, n)}" for n in ("density", "threshold") if getattr(self, n) is not None]
        return f"Masked({', '.join(parts)}, dilation={self.dilation}, gradient={self.gradient!r})"


def _number(value: Any, name: str) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value)):
        raise ConvArgumentError(f"{name} must be a number and not NaN, got {value!r}")
    return value


def _wrong_shape(shape: tuple[int, ...], size: tuple[int, ...], weight: tuple[int, ...] | None) -> ConvArgumentError:
    per_weight = ["C_out", "C_in/groups", *size] if weight is None else weight
    return ConvArgumentError(
        f"a mask has the shape [{_listed(size)}], shared by all channels, or [{_listed(per_weight)}], one value a "
        f"weight; got [{_listed(shape)}]"
    )


def _listed(shape: Sequence[object]) -> str:
    return ", ".join(map(str, shape))
