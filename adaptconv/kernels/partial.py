"""Partially dilated kernels: a dense island with dilated wings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from adaptconv.backends.weights import picked
from adaptconv.grids import Offset
from adaptconv.kernels.base import Family, Ints, Slot, bound_of_uniform, per_axis
from adaptconv.taps import TapPattern, aligned


@dataclass(frozen=True)
class PartiallyDilated(Family):
    """A dense island with dilated wings: near positions at full resolution, far ones at every ``dilation``-th.

    The taps are the union of two grids with one centre: ``island`` positions along each axis, and a grid of
    step ``dilation`` that goes on until ``wing`` of its taps on each side lie outside the island. With ``h =
    island // 2`` and ``r = h // dilation + wing``, an axis has the offsets ``{-h, ..., h}`` and
    ``{-r * dilation, ..., -dilation, 0, dilation, ..., r * dilation}``; several axes take the product of each
    set, then the union. ``PartiallyDilated(island=5, wing=4, dilation=2)`` is ``101010101111101010101``. The kernel
    equals the sum of a dense and a dilated convolution with aligned centres, computed as one.

    The compact form has one parameter ``weight [C_out, C_in/groups, T]``, a value a tap. The two-parameter form has
    ``weight [C_out, C_in/groups, *island]`` and ``wing_weight [C_out, C_in/groups, *(2 * r + 1)]``, which are added
    where the grids overlap, again before one convolution. It has more parameters than taps, computes the
    same functions, and trains otherwise: where both grids have a tap, a gradient step moves it twice as far.
    ``adaptconv.convert.to_compact`` turns it into the compact form.

    Args:
        island: odd width of the dense part, an int or one an axis.
        wing: dilated taps on each side outside the island, an int >= 0 or one an axis.
        dilation: step of the dilated grid, an int or one an axis.
        two_parameters: keep a dense and a dilated kernel instead of one value a tap.

    Raises:
        ConvArgumentError: when bound, on an even island, a wing below 0 or a dilation below 1.
    """

    island: Ints
    wing: Ints
    dilation: Ints
    two_parameters: bool = False
    _taps: TapPattern | None = field(default=None, init=False, repr=False, compare=False)
    _picks: tuple[tuple[int, ...], ...] = field(default=(), init=False, repr=False, compare=False)
    _grid: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", not self.two_parameters)

    def bound(self, axes: int) -> PartiallyDilated:
        """Island, wing and dilation an axis, and where the taps sit."""
        if self._taps is not None and self._taps.axes == axes:
            return self
        island = per_axis(self.island, axes, "island", odd=True)
        wing = per_axis(self.wing, axes, "wing", least=0)
        dilation = per_axis(self.dilation, axes, "dilation")
        family = PartiallyDilated(island, wing, dilation, bool(self.two_parameters))
        grid = tuple(2 * (width // 2 // step + w) + 1 for width, w, step in zip(island, wing, dilation, strict=True))
        taps = TapPattern.partial(island, wing, dilation)
        _, parts = aligned(TapPattern.grid(island), TapPattern.grid(grid, dilation))
        object.__setattr__(family, "_taps", taps)
        object.__setattr__(family, "_picks", tuple(columns(part, taps) for part in parts))
        object.__setattr__(family, "_grid", grid)
        return family

    @property
    def taps(self) -> TapPattern:
        """The union of the two grids."""
        return self._taps or TapPattern.partial(self.island, self.wing, self.dilation)

    def slots(self, c_out: int, c_in: int) -> tuple[Slot, ...]:
        """A compact weight, or a dense and a dilated one."""
        if not self.two_parameters:
            return (Slot("weight", (c_out, c_in, len(self.taps))),)
        assert isinstance(self.island, tuple)
        return (Slot("weight", (c_out, c_in, *self.island)), Slot("wing_weight", (c_out, c_in, *self._grid)))

    def compact(self, *tensors: Tensor) -> Tensor:
        """The weight, or both weights added on the taps of the union."""
        if not self.two_parameters:
            return tensors[0]
        weight, wings = tensors
        island, grid = self._picks
        return picked(weight.flatten(2), island) + picked(wings.flatten(2), grid)

    def reset(self, tensors: Mapping[str, Tensor]) -> None:
        """As torch does a kernel of as many taps.

        Where two parameters add up to one tap, each has half the variance, so that every tap of the sum has the
        variance it has in the compact form: ``1 / (3 * C_in/groups * T)``.
        """
        weight = tensors["weight"]
        bound_of_uniform(weight, self.fan_in(weight.shape[1]))
        if not self.two_parameters:
            return
        wings = tensors["wing_weight"]
        bound_of_uniform(wings, self.fan_in(wings.shape[1]))
        island, grid = self._picks
        shared = [(i, j) for i, j in zip(island, grid, strict=True) if i >= 0 and j >= 0]
        for tensor, indices in ((weight, [i for i, _ in shared]), (wings, [j for _, j in shared])):
            flat = tensor.flatten(2)
            flat[:, :, indices] *= 0.5**0.5
            tensor.copy_(flat.reshape(tensor.shape))

    def check_state(self, state: Mapping[str, Tensor]) -> list[str]:
        """A checkpoint of the other form."""
        if "weight" not in state or ("wing_weight" in state) == self.two_parameters:
            return []
        if self.two_parameters:
            return [
                "this checkpoint has one compact weight; build the layer with PartiallyDilated(two_parameters=False)"
            ]
        return [
            "this checkpoint has a wing_weight: build the layer with PartiallyDilated(two_parameters=True), load it, "
            "and call adaptconv.convert.to_compact(layer)"
        ]


def columns(part: list[Offset], taps: TapPattern) -> tuple[int, ...]:
    """For each tap, which of a part's offsets it is; -1 where it is none. Offsets are in the taps' window."""
    place = {offset: i for i, offset in enumerate(part)}
    return tuple(place.get(offset, -1) for offset in taps.offsets)
