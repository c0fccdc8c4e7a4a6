"""What a kernel family is: frozen settings that know their tensors and how these become weights on taps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptconv.errors import ConvArgumentError
from adaptconv.kernel import Kernel
from adaptconv.taps import TapPattern

Ints = int | Sequence[int]
_Self = TypeVar("_Self", bound="Family")


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that a layer keeps for its kernel, under its own name in the layer and in its state_dict.

    Attributes:
        name: attribute of the layer.
        shape: its shape.
        learnable: a Parameter, or else a buffer.
        dtype: its dtype; None for the layer's.
    """

    name: str
    shape: tuple[int, ...]
    learnable: bool = True
    dtype: torch.dtype | None = None


class Family(ABC):
    """A kind of kernel. Subclasses are frozen dataclasses of settings; they hold no tensors.

    One instance may be given to many layers: each layer keeps tensors of its own, in the slots the
    family names, the first of which is ``weight``. ``bound(axes)`` comes before everything else.

    Attributes:
        identity: whether ``compact`` is the weight itself, flattened: nothing is computed for a call.
        constructed: whether ``compact`` is dear enough to be kept between calls without gradients.
        may_lack: slots that a checkpoint may lack: torch's own layer has none, and the family knows the value.
        factorised: whether ``convolve`` computes the layer in steps instead of on one compact weight.
    """

    identity: bool = False
    constructed: bool = False
    factorised: bool = False
    may_lack: tuple[str, ...] = ()

    @property
    def spare(self) -> tuple[str, ...]:
        """Tensors a layer may still hold from another setting of the family, unused."""
        return ()

    @abstractmethod
    def bound(self: _Self, axes: int) -> _Self:
        """The family with every setting spelled out for so many axes; a bound one returns itself.

        Raises:
            ConvArgumentError: the settings do not fit, or not that many axes.
        """

    @property
    @abstractmethod
    def taps(self) -> TapPattern:
        """Where the taps of the compact weight sit. A plain value on a bound family."""

    @abstractmethod
    def slots(self, c_out: int, c_in: int) -> tuple[Slot, ...]:
        """The tensors of a layer of ``c_out`` channels with ``c_in`` input channels a group."""

    @abstractmethod
    def compact(self, *tensors: Tensor) -> Tensor:
        """The weight ``[C_out, C_in/groups, T]`` on ``taps`` from the slots' tensors; differentiable."""

    def kernel(self, *tensors: Tensor) -> Kernel:
        """The kernel itself, as weights on taps."""
        return Kernel(self.compact(*tensors), self.taps)

    def reset(self, tensors: Mapping[str, Tensor]) -> None:
        """Initialise the slots' tensors in place; by default the weight, as torch does a kernel of as many taps."""
        weight = tensors["weight"]
        bound_of_uniform(weight, weight[0].numel())

    def fan_in(self, c_in: int) -> int:
        """Weights that one output adds up, as an initialisation counts them."""
        return c_in * len(self.taps)

    def convolve(
        self,
        x: Tensor,
        bias: Tensor | None,
        tensors: Sequence[Tensor],
        stride: tuple[int, ...],
        padding: Any,
        groups: int,
    ) -> Tensor:
        """Convolve in steps, where ``factorised``: exactly the convolution with ``kernel(*tensors)``.

        Args:
            x: ``[N, C_in, *spatial]`` or ``[C_in, *spatial]``.
            bias: ``[C_out]`` or None.
            tensors: the slots' tensors.
            stride: output step an axis.
            padding: as a layer has it: ints, ``'same'`` or ``'valid'``.
            groups: channel groups.
        """
        raise NotImplementedError(f"{type(self).__name__} is computed on one compact weight")

    def clamp(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have nothing to do
        """Bring tensors back into their range, in place; called under ``no_grad``. By default nothing to do."""

    def frozen(self, *tensors: Tensor, **how: Any) -> Kernel:
        """The kernel as it stands, on plain taps, taps without any weight left out; detached.

        Raises:
            ConvArgumentError: no tap is left, or a way to freeze this family does not know.
        """
        if how:
            raise ConvArgumentError(f"{type(self).__name__} knows no way to freeze by {', '.join(map(repr, how))}")
        with torch.no_grad():
            return without_dead_taps(self.kernel(*tensors).spread())

    def check_state(self, state: Mapping[str, Tensor]) -> list[str]:
        """What is wrong with a checkpoint's tensors for this family, in words; empty if nothing is.

        Args:
            state: the tensors under the layer's prefix, by their names in the layer; maybe too few or too many.
        """
        return []

    def settle(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Mend what a checkpoint brought, in place and with a warning, where a documented clamp says so."""

    def plot(self, ax: Any = None, *, axes: int | None = None, title: str | None = None) -> Any:
        """Draw where the taps sit; by default in 2-D, or in as many axes as the settings are spelled for.

        Args:
            ax: matplotlib axes to draw on; by default those of a new figure.
            axes: number of axes of the kernel.
            title: a title; by default the family itself.

        Returns:
            The matplotlib axes.

        Raises:
            ImportError: matplotlib is missing.
            ConvArgumentError: the settings do not fit that many axes.
        """
        from adaptconv.plots import plot

        refused: ConvArgumentError | None = None
        for rank in (2, 1, 3) if axes is None else (axes,):
            try:
                return plot(self.bound(rank), ax, title=repr(self) if title is None else title)
            except ConvArgumentError as error:
                refused = refused or error
        assert refused is not None
        raise refused


def full_precision(device: torch.device) -> Any:
    """Autocast off: kernels are made in the precision of their parameters, and narrowed for the call."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def bound_of_uniform(weight: Tensor, fan_in: int, gain: float = 1.0) -> None:
    """Torch's initialisation of a convolution, in place: uniform within ``gain / sqrt(fan_in)``."""
    bound = gain * max(fan_in, 1) ** -0.5
    nn.init.uniform_(weight, -bound, bound)


def per_axis(value: Ints, axes: int, name: str, *, least: int = 1, odd: bool = False) -> tuple[int, ...]:
    """A setting given as an int or as one int an axis, spelled out.

    Raises:
        ConvArgumentError: another number of ints, a value below ``least``, or an even one where it must be odd.
    """
    values: tuple[Any, ...] = tuple(value) if isinstance(value, (list, tuple)) else (value,) * axes
    if len(values) != axes or any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ConvArgumentError(f"{name} must be an int or {axes} ints, one an axis; got {value!r}")
    if any(v < least for v in values):
        raise ConvArgumentError(f"{name} must be at least {least}; got {value!r}")
    if odd and any(v % 2 == 0 for v in values):
        raise ConvArgumentError(f"{name} must be odd on every axis, so that there is a centre; got {value!r}")
    return values


def without_dead_taps(kernel: Kernel) -> Kernel:
    """A kernel less the taps whose weight is zero in every channel.

    Raises:
        ConvArgumentError: no tap is left.
    """
    used = kernel.weight != 0
    live = used.any(0).any(0).nonzero().flatten().tolist()
    if not live:
        raise ConvArgumentError("every tap of this kernel is zero: nothing is left to convolve with")
    share = float(used[:, :, live].float().mean())  # channels may have holes of their own
    return Kernel(kernel.weight[:, :, live].clone(), kernel.taps.subset(live).with_density(share))
