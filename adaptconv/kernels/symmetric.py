"""Symmetric kernels: taps that a rotation, a mirror or an equal distance relates share one weight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from adaptconv.backends.weights import picked
from adaptconv.errors import ConvArgumentError
from adaptconv.grids import Offset
from adaptconv.kernels.base import Family, Ints, Slot, bound_of_uniform
from adaptconv.kernels.grid import Grid
from adaptconv.taps import TapPattern

GROUPS = ("mirror", "point", "rotation90", "dihedral", "radial")


@dataclass(frozen=True)
class Symmetric(Family):
    """A kernel that a group of rotations or mirrors leaves as it is: one weight an orbit of taps.

    ``k[t] = weight[orbit(t)]``, where two taps are in one orbit if an element of the group, applied about the
    window's centre, takes one to the other. The convolution then commutes with the group: at stride 1 and with
    even padding, ``conv(g x) = g conv(x)``. Cohen & Welling, "Group Equivariant Convolutional Networks" (2016),
    get equivariance from a filter of any shape by applying all its transformed copies, an output channel each; here
    there is one filter, which is itself invariant, and no more channels: fewer functions, at no cost.

    The groups:

    - ``"mirror"``: the mirror images along each of ``axes`` (default: all).
    - ``"point"``: the point reflection ``t -> -t`` in ``axes`` (default: all); in 1-D the mirror image.
    - ``"rotation90"``: rotations by 90 degrees in every plane of two of ``axes`` (default: all): C4 in 2-D, the
      24 rotations of the cube in 3-D; ``axes=(1, 2)`` in 3-D are the four rotations about the first axis.
    - ``"dihedral"``: those rotations and the mirror images: D4 in 2-D, the 48 symmetries of the cube in 3-D.
    - ``"radial"``: taps at equal (Euclidean) distance from the centre share a weight, at any rank; the pattern
      must be its own mirror image along every axis, and under exchange of two axes of equal extent.

    The parameter is ``weight [C_out, C_in/groups, orbits]``, orbits in the order of their first taps. It starts as
    torch starts a kernel of as many taps: an orbit's weight is counted once for each of its taps.

    Args:
        base: where taps sit: a size (an int or one an axis), a ``Grid(size, dilation)``, a ``TapPattern`` or its text.
        group: one of the above.
        axes: axes that the group acts on, an index or several from 0, None for all; not with ``"radial"``.

    Raises:
        ConvArgumentError: an unknown group or axis, rotations of fewer than two axes or of axes with different
            extents, a pattern with a footprint or without taps, or one that the group does not leave as it is.
    """

    base: Ints | Grid | TapPattern | str
    group: str = "dihedral"
    axes: Ints | None = None
    _taps: TapPattern | None = field(default=None, init=False, repr=False, compare=False)
    _orbits: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ConvArgumentError(f"group must be one of {', '.join(map(repr, GROUPS))}; got {self.group!r}")
        if self.axes is not None and self.group == "radial":
            raise ConvArgumentError(f"a radial kernel is so in every axis: leave axes at None, got {self.axes!r}")
        if isinstance(self.base, list):
            object.__setattr__(self, "base", tuple(self.base))
        if isinstance(self.axes, (int, list)):
            object.__setattr__(self, "axes", (self.axes,) if isinstance(self.axes, int) else tuple(self.axes))

    def bound(self, axes: int) -> Symmetric:
        """The taps, and the orbit of each."""
        if self._taps is not None and self._taps.axes == axes:
            return self
        taps = _pattern(self.base, axes)
        if taps.axes != axes:
            raise ConvArgumentError(f"AdaptiveConv{axes}d needs taps with {axes} axes, got a window {taps.window}")
        if not len(taps):
            raise ConvArgumentError("a layer needs at least one tap; this pattern has none")
        if taps.footprint is not None:
            raise ConvArgumentError(
                "a symmetric kernel needs plain taps, this pattern has a footprint: spread them first"
            )
        images = [_images(taps, *generator) for generator in self._generators(taps)]
        family = Symmetric(self.base, self.group, self.axes)
        object.__setattr__(family, "_taps", taps)
        object.__setattr__(family, "_orbits", _rings(taps) if self.group == "radial" else _orbits(len(taps), images))
        return family

    def _generators(self, taps: TapPattern) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """What generates the group: in words, which axis each coordinate comes from, and its sign."""
        rank, window = taps.axes, taps.window
        acted = tuple(range(rank)) if self.axes is None else self.axes
        if not isinstance(acted, tuple) or not acted or not all(type(a) is int and 0 <= a < rank for a in acted):
            raise ConvArgumentError(f"axes must be ints from 0 to {rank - 1}, or None for all; got {self.axes!r}")
        if len(set(acted)) != len(acted):
            raise ConvArgumentError(f"axes must differ from each other; got {self.axes!r}")
        same = tuple(range(rank))
        if self.group in ("mirror", "dihedral", "radial"):
            for a in acted:
                yield f"the mirror image along axis {a}", same, tuple(-1 if i == a else 1 for i in same)
        if self.group == "point":
            yield f"the point reflection in axes {acted}", same, tuple(-1 if i in acted else 1 for i in same)
        if self.group in ("rotation90", "dihedral") and len(acted) < 2:
            raise ConvArgumentError(f"{self.group!r} needs at least two axes to rotate in, got {acted}: use 'mirror'")
        if self.group in ("mirror", "point"):
            return
        for a, b in itertools.combinations(acted, 2):
            exchanged = tuple(b if i == a else a if i == b else i for i in same)
            if self.group == "radial":
                if window[a] == window[b]:
                    yield f"the exchange of axes {a} and {b}", exchanged, (1,) * rank
                continue
            if window[a] != window[b]:
                raise ConvArgumentError(
                    f"a rotation by 90 degrees in axes {a} and {b} needs equal extents there, got window {window}; "
                    f"choose other axes=, or the group 'mirror', 'point' or 'radial'"
                )
            signs = tuple(-1 if i == b else 1 for i in same)
            yield f"a rotation by 90 degrees in axes {a} and {b}", exchanged, signs

    @property
    def taps(self) -> TapPattern:
        """Every tap, tied or not."""
        if self._taps is None:
            raise ConvArgumentError("this family is not bound: call bound(axes) first")
        return self._taps

    @property
    def orbits(self) -> tuple[int, ...]:
        """Which value of the parameter each tap has, in the order of ``taps.offsets``."""
        return self._orbits

    def slots(self, c_out: int, c_in: int) -> tuple[Slot, ...]:
        """A weight an orbit."""
        return (Slot("weight", (c_out, c_in, max(self._orbits) + 1)),)

    def compact(self, *tensors: Tensor) -> Tensor:
        """Each tap's weight: its orbit's."""
        return picked(tensors[0], self._orbits)

    def reset(self, tensors: Mapping[str, Tensor]) -> None:
        """As torch does a kernel of as many taps."""
        bound_of_uniform(tensors["weight"], self.fan_in(tensors["weight"].shape[1]))


def _pattern(base: Ints | Grid | TapPattern | str, axes: int) -> TapPattern:
    if isinstance(base, TapPattern):
        return base
    if isinstance(base, str):
        return TapPattern.parse(base)
    return (base if isinstance(base, Grid) else Grid(base)).bound(axes).taps


def _images(taps: TapPattern, what: str, source: Sequence[int], signs: Sequence[int]) -> tuple[int, ...]:
    """The index of every tap's image.

    Coordinates are doubled and counted from the window's centre, which lies between two positions where an extent
    is even.
    """
    place: dict[Offset, int] = {offset: i for i, offset in enumerate(taps.offsets)}
    images = []
    for offset in taps.offsets:
        centred = [2 * i - (extent - 1) for i, extent in zip(offset, taps.window, strict=True)]
        moved = [sign * centred[axis] for axis, sign in zip(source, signs, strict=True)]
        image = tuple((c + extent - 1) // 2 for c, extent in zip(moved, taps.window, strict=True))
        if image not in place:
            raise ConvArgumentError(
                f"the taps are not symmetric: {what} takes tap {offset} to {image}, where the pattern {str(taps)!r} "
                f"has no tap; add it, or choose another group"
            )
        images.append(place[image])
    return tuple(images)


def _orbits(count: int, images: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The orbit of each of ``count`` taps under the group that these permutations generate."""
    orbit = [-1] * count
    orbits = 0
    for first in range(count):
        if orbit[first] >= 0:
            continue
        reached = [first]
        orbit[first] = orbits
        for tap in reached:  # grows while it is read
            for image in images:
                if orbit[image[tap]] < 0:
                    orbit[image[tap]] = orbits
                    reached.append(image[tap])
        orbits += 1
    return tuple(orbit)


def _rings(taps: TapPattern) -> tuple[int, ...]:
    """The ring of each tap: equal distances from the window's centre, exactly, in doubled coordinates."""
    squares = [
        sum((2 * i - (extent - 1)) ** 2 for i, extent in zip(offset, taps.window, strict=True))
        for offset in taps.offsets
    ]
    number = {square: i for i, square in enumerate(dict.fromkeys(squares))}
    return tuple(number[square] for square in squares)
