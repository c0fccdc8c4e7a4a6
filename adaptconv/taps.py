"""TapPattern: where the taps of a convolution kernel sit inside its window, and the algebra on it.

A pattern is a set of integer offsets in a dense window of 1 to 3 axes. It knows nothing of weights,
tensors or devices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from adaptconv.errors import ConvArgumentError
from adaptconv.grids import Grid, Offset, cover, single_grid
from adaptconv.tap_shapes import grid_offsets, mask_offsets, partial_offsets, per_axis, rounded_density
from adaptconv.tap_text import MAX_AXES, Footprint, read_density, read_footprint, read_grid, read_mask, written


@dataclass(frozen=True, slots=True, eq=False)
class TapPattern:
    """A set of taps in a window, each maybe spread by one small fixed filter.

    Attributes:
        offsets: unique, sorted integer tuples, each inside ``window``: where a tap sits, or where the
            first value of its footprint does.
        window: dense extent along each axis (1 to 3 axes), footprints included, so that padding means
            what torch means.
        footprint: None, or one filter an axis; every tap is spread by their outer product.
        density: what share of a channel's taps is expected to carry a weight that is not zero, where each channel has
            holes of its own in the window they share. A hint, rounded up to two significant bits: it steers which way
            is chosen and what the tuner measures, never a result. Always 1 with a footprint.
        text: canonical text: equal patterns have equal text, and ``parse`` reads it back. A plain
            attribute, so that a tracer finds a constant.

    Raises:
        ConvArgumentError: an offset outside the window, repeated, or of the wrong rank; a window
            that is empty or has no or more than three axes; a footprint of another rank, or empty; a density
            that is not above 0 and at most 1.
    """

    offsets: tuple[Offset, ...]
    window: Offset
    footprint: Footprint | None = None
    density: float = 1.0
    text: str = field(init=False, repr=False, default="")
    _hash: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        window = tuple(int(extent) for extent in self.window)
        if not 1 <= len(window) <= MAX_AXES or any(extent < 1 for extent in window):
            raise ConvArgumentError(
                f"a tap window needs 1 to {MAX_AXES} axes of at least one position each, got {self.window!r}"
            )
        footprint = _checked_footprint(self.footprint, window)
        offsets = tuple(sorted(tuple(int(i) for i in offset) for offset in self.offsets))
        room = _shrunk(window, footprint)
        for offset in offsets:
            if len(offset) != len(window):
                raise ConvArgumentError(
                    f"tap {offset} has {len(offset)} coordinates but the window {window} has {len(window)} axes"
                )
            if not all(0 <= i < extent for i, extent in zip(offset, room, strict=True)):
                raise ConvArgumentError(
                    f"tap {offset} lies outside its window {room}: coordinates must be in [0, extent)"
                )
        if len(set(offsets)) != len(offsets):
            repeated = next(a for a, b in itertools.pairwise(offsets) if a == b)
            raise ConvArgumentError(f"tap {repeated} appears more than once; taps must be unique")
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "window", window)
        object.__setattr__(self, "footprint", footprint)
        density = rounded_density(self.density) if footprint is None else 1.0
        object.__setattr__(self, "density", density)
        object.__setattr__(self, "_hash", hash((offsets, window, footprint, density)))
        object.__setattr__(self, "text", written(offsets, window, footprint, density))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, TapPattern):
            return NotImplemented
        return self._hash == other._hash and (self.window, self.footprint, self.density, self.offsets) == (
            other.window, other.footprint, other.density, other.offsets
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.offsets)

    # ---- constructors -------------------------------------------------------------------------

    @staticmethod
    def grid(size: int | Sequence[int], dilation: int | Sequence[int] = 1, *, axes: int | None = None) -> TapPattern:
        """One regular grid: the taps of an ordinary or dilated kernel.

        Args:
            size: taps along each axis; an int needs ``axes``.
            dilation: step between taps, an int or one an axis.
            axes: number of axes when ``size`` is an int (default 1).
        """
        sizes = per_axis(size, (axes or 1) if isinstance(size, int) else len(size), "size")
        dilations = per_axis(dilation, len(sizes), "dilation")
        return _grid(sizes, dilations)

    @staticmethod
    def partial(
        island: int | Sequence[int],
        wing: int | Sequence[int],
        dilation: int | Sequence[int],
        *,
        axes: int | None = None,
    ) -> TapPattern:
        """A dense island with dilated wings: the union of two centred grids.

        Args:
            island: odd width of the dense part along each axis.
            wing: dilated taps on each side of the centre that lie outside the island, each axis.
            dilation: step between the taps of the dilated grid, each axis.
            axes: number of axes when every setting is an int (default 1).

        Example: ``partial(island=3, wing=4, dilation=2)`` is ``101010111010101`` with its ends:
        the dilated grid through the centre continues until ``wing`` taps stand outside the island.
        """
        return TapPattern(*partial_offsets(island, wing, dilation, axes))

    @staticmethod
    def from_mask(mask: Any) -> TapPattern:
        """The non-zero positions of a mask (nested sequences, a NumPy array or a tensor, 1 to 3 axes)."""
        return TapPattern(*mask_offsets(mask))

    @staticmethod
    def parse(text: str) -> TapPattern:
        """Read a pattern from text: the inverse of ``str(pattern)``.

        Two forms: a grid, ``"3x3"`` or ``"3x3d2x2"``; or a mask of 0 and 1, rows joined by ``/`` and planes by
        ``//``, e.g. ``"101010101111101010101"`` or ``"010/111/010"``; a 2-D mask of one row ends in ``/``, a 3-D
        mask of one plane in ``//``. A lone run of 0 and 1 is always a mask: write a 1-D grid of ten taps as
        ``"10d1"``. Either may be followed by a footprint, one filter an axis: ``"3x3d2x2*0.5,1,0.5x0.5,1,0.5"``,
        or by a density: ``"17x17~0.125"``.
        """
        return _parse(text.strip())

    # ---- algebra ------------------------------------------------------------------------------

    @property
    def axes(self) -> int:
        """Number of spatial axes: 1, 2 or 3."""
        return len(self.window)

    @property
    def window_taps(self) -> int:
        """Positions in the dense window: what dense-construct multiplies."""
        return math.prod(self.window)

    def union(self, other: TapPattern) -> TapPattern:
        """Taps of either pattern, the smaller window centred in the larger.

        Raises:
            ConvArgumentError: different ranks or footprints, or windows whose centres do not align.
        """
        if self.footprint != other.footprint:
            raise ConvArgumentError("the union of two patterns needs one footprint: spread them to plain taps first")
        window, (mine, theirs) = aligned(self, other)
        density = max(self.density, other.density)
        return TapPattern(tuple(set(mine) | set(theirs)), window, self.footprint, density)

    def flipped(self) -> TapPattern:
        """The pattern mirrored along every axis: the taps of the input gradient at stride 1."""
        room = _shrunk(self.window, self.footprint)
        footprint = None if self.footprint is None else tuple(values[::-1] for values in self.footprint)
        offsets = tuple(tuple(w - 1 - i for i, w in zip(o, room, strict=True)) for o in self.offsets)
        return TapPattern(offsets, self.window, footprint, self.density)

    @property
    def core(self) -> TapPattern:
        """The taps before they are spread: the same offsets, in a window smaller by the footprint."""
        return self if self.footprint is None else TapPattern(self.offsets, _shrunk(self.window, self.footprint))

    def spread_by(self, footprint: Sequence[Sequence[float]]) -> TapPattern:
        """Spread every tap by one filter an axis; the window grows by a filter's length less one.

        Raises:
            ConvArgumentError: filters of another rank, empty or not finite; a pattern that has a footprint.
        """
        if self.footprint is not None:
            raise ConvArgumentError("this pattern already has a footprint: convolve the two filters instead")
        if len(footprint) != self.axes or not all(footprint):
            raise ConvArgumentError(
                f"a footprint has one filter an axis, of at least one value: expected {self.axes}, got {footprint!r}"
            )
        window = tuple(w + len(values) - 1 for w, values in zip(self.window, footprint, strict=True))
        return TapPattern(self.offsets, window, tuple(map(tuple, footprint)))

    def spread(self) -> tuple[TapPattern, tuple[tuple[int, int, float], ...]]:
        """The plain pattern that the footprint makes of this one, and the linear map between their weights.

        Returns:
            Plain taps, and entries ``(own tap, plain tap, value)``: a plain tap's weight is the sum of
            its entries' own weights times their values.
        """
        return _spread(self)

    def is_dense(self) -> bool:
        """Whether every position of the window is a tap."""
        return self.footprint is None and len(self.offsets) == self.window_taps

    def single_grid(self) -> Grid | None:
        """The pattern as one regular grid, or None (a spread one never is). The window may extend past the grid."""
        return _single_grid(self)

    def grids(self, limit: int = 8) -> tuple[Grid, ...] | None:
        """Cover the pattern with few regular grids (greedy, largest gain first).

        Returns:
            The grids, every tap owned by exactly one of them; None if more than ``limit`` would be
            needed, or the taps are spread. No grid touches a position that is not a tap.
        """
        return _cover(self, limit)

    def live(
        self, spatial: Sequence[int], padding: Sequence[tuple[int, int]], stride: Sequence[int]
    ) -> tuple[int, ...]:
        """Indices of the taps that land inside the input for at least one output.

        Args:
            spatial: input extents.
            padding: (before, after) zeros an axis.
            stride: output step an axis.
        """
        alive: list[list[bool]] = []
        lengths = [1] * self.axes if self.footprint is None else [len(values) for values in self.footprint]
        for extent, window, (before, after), step, length in zip(
            spatial, self.window, padding, stride, lengths, strict=True
        ):
            outputs = (extent + before + after - window) // step + 1
            row = []
            for i in range(window):
                first = max(0, -((i - before) // step))  # first output at or right of the input's edge
                row.append(first < outputs and first * step + i - before < extent)
            alive.append([any(row[i : i + length]) for i in range(window - length + 1)])
        return tuple(t for t, offset in enumerate(self.offsets) if all(alive[axis][i] for axis, i in enumerate(offset)))

    def subset(self, indices: Iterable[int]) -> TapPattern:
        """The taps with these indices, in the same window."""
        return TapPattern(tuple(self.offsets[i] for i in indices), self.window, self.footprint, self.density)

    def with_density(self, share: float) -> TapPattern:
        """The same taps, of which a channel is expected to use this share."""
        return self if share == self.density else TapPattern(self.offsets, self.window, self.footprint, share)

    def __str__(self) -> str:
        return self.text


def aligned(*patterns: TapPattern) -> tuple[Offset, list[list[Offset]]]:
    """Put patterns in one window, centres aligned: the window, and each pattern's moved offsets.

    Raises:
        ConvArgumentError: ranks differ, or two windows differ by an odd number on some axis.
    """
    if len({p.axes for p in patterns}) != 1:
        raise ConvArgumentError(f"patterns of different ranks cannot be aligned: {[p.window for p in patterns]}")
    window = tuple(max(extents) for extents in zip(*(p.window for p in patterns), strict=True))
    moved: list[list[Offset]] = []
    for p in patterns:
        slack = [w - mine for w, mine in zip(window, p.window, strict=True)]
        if any(s % 2 for s in slack):
            raise ConvArgumentError(
                f"windows {p.window} and {window} have no common centre: extents must differ by an even number"
            )
        moved.append([tuple(i + s // 2 for i, s in zip(o, slack, strict=True)) for o in p.offsets])
    return window, moved


@lru_cache(maxsize=4096)
def _grid(size: Offset, dilation: Offset) -> TapPattern:
    return TapPattern(*grid_offsets(size, dilation))


@lru_cache(maxsize=4096)
def _parse(text: str) -> TapPattern:
    text, tilde, density = text.partition("~")
    if tilde:
        return _parse(text).with_density(read_density(density))
    text, star, footprint = text.partition("*")
    if text and set(text) <= {"0", "1", "/"}:
        planes = read_mask(text)
        mask: Any = planes if "//" in text else planes[0] if "/" in text else planes[0][0]
        pattern = TapPattern.from_mask(mask)
    else:
        pattern = TapPattern.grid(*read_grid(text))
    return pattern.spread_by(read_footprint(footprint, pattern.axes)) if star else pattern


def _checked_footprint(footprint: Footprint | None, window: Offset) -> Footprint | None:
    if footprint is None:
        return None
    if len(footprint) != len(window) or not all(footprint):
        raise ConvArgumentError(
            f"a footprint has one filter an axis, of at least one value: expected {len(window)}, got {footprint!r}"
        )
    filters = tuple(tuple(float(value) for value in values) for values in footprint)
    if not all(math.isfinite(value) for values in filters for value in values):
        raise ConvArgumentError(f"a footprint's values must be finite, got {footprint!r}")
    return None if all(values == (1.0,) for values in filters) else filters


def _shrunk(window: Offset, footprint: Footprint | None) -> Offset:
    """The window of the taps before they are spread."""
    if footprint is None:
        return window
    return tuple(extent - len(values) + 1 for extent, values in zip(window, footprint, strict=True))


@lru_cache(maxsize=1024)
def _spread(pattern: TapPattern) -> tuple[TapPattern, tuple[tuple[int, int, float], ...]]:
    filters = pattern.footprint or ((1.0,),) * pattern.axes
    sums: dict[Offset, dict[int, float]] = {}
    for t, offset in enumerate(pattern.offsets):
        for step in itertools.product(*(range(len(values)) for values in filters)):
            value = math.prod(values[i] for values, i in zip(filters, step, strict=True))
            place = tuple(o + i for o, i in zip(offset, step, strict=True))
            own = sums.setdefault(place, {})
            own[t] = own.get(t, 0.0) + value
    plain = TapPattern(tuple(sums), pattern.window)
    entries = [(t, i, value) for i, place in enumerate(plain.offsets) for t, value in sums[place].items()]
    return plain, tuple(sorted(entries))


@lru_cache(maxsize=4096)
def _single_grid(pattern: TapPattern) -> Grid | None:
    return None if pattern.footprint is not None else single_grid(pattern.offsets)


@lru_cache(maxsize=1024)
def _cover(pattern: TapPattern, limit: int) -> tuple[Grid, ...] | None:
    return None if pattern.footprint is not None else cover(pattern.offsets, limit)
