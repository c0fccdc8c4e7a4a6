"""What the kernels are asked to do: passes over places at a fixed step, and taps in chunks on packed rows."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from adaptconv.backends.triton.geometry import Triple, geometry
from adaptconv.problem import Direction, Problem

SECTIONS = 2 + 8  # ends of sections before the offsets in a table
STRIP = 8  # neighbours along a row that one thread computes together; packed rows are aligned to it
_CROWD = 3  # taps in an aligned group of eight from which computing the whole group is cheaper
_SLOTS = (172.0, 94.0, 22.0, 34.0)  # of wide and narrow groups, taps at shift 0 and others: issue slots a strip
_PHASES = 512  # interleaved phases of a row that packing tells apart, at most


@dataclass(frozen=True, eq=False, slots=True)  # known by identity: a key that costs nothing to look up
class Pass:
    """One convolution at a fixed step, which fills a regular subset of the result.

    Place ``q`` reads, through tap t, place ``q * step + offsets[t]`` of the operand, zeros where that lies outside,
    and is the result's place ``first + q * skip``. The gradient of the input under a stride is one pass a phase.

    Attributes:
        size: extents of the operand that is read.
        count: places an axis.
        step: operand places from one place to the next.
        taps: indices into the compact weight.
        offsets: of these taps.
        first: result place of place 0.
        skip: result places from one place to the next.
    """

    size: Triple
    count: Triple
    step: Triple
    taps: tuple[int, ...]
    offsets: tuple[Triple, ...]
    first: Triple = (0, 0, 0)
    skip: Triple = (1, 1, 1)


@lru_cache(maxsize=1024)
def passes(problem: Problem) -> tuple[Pass, ...]:
    """The passes that compute a problem; GRAD_WEIGHT's one pass says what is multiplied with what."""
    shape = geometry(problem)
    if problem.direction is not Direction.GRAD_INPUT:
        return (Pass(shape.size, shape.out, shape.stride, shape.live, shape.offsets),)
    found = []
    for phase in itertools.product(*(range(min(s, n)) for s, n in zip(shape.stride, shape.size, strict=True))):
        z, y, x = ((n - r + s - 1) // s for n, r, s in zip(shape.size, phase, shape.stride, strict=True))
        count = (z, y, x)
        reads = []
        for t, offset in zip(shape.live, shape.offsets, strict=True):
            distance = [r - o for r, o in zip(phase, offset, strict=True)]
            back = tuple(d // s for d, s in zip(distance, shape.stride, strict=True))
            whole = all(d % s == 0 for d, s in zip(distance, shape.stride, strict=True))
            if whole and all(b < n and b + c > 0 for b, n, c in zip(back, shape.out, count, strict=True)):
                reads.append((t, (back[0], back[1], back[2])))
        first = (phase[0], phase[1], phase[2])
        taps, offsets = tuple(t for t, _ in reads), tuple(o for _, o in reads)
        found.append(Pass(shape.out, count, (1, 1, 1), taps, offsets, first, shape.stride))
    return tuple(found)


@dataclass(frozen=True, eq=False)  # as Pass; and it keeps what is derived from it
class Packing:
    """A pass on an operand that was copied with its zeros, in strips of eight values that are loaded together.

    A strip is eight neighbours of a row, phase by phase: packed place ``(z, y, r, j)`` holds the operand's
    ``(z + origin_z, y + origin_y, j * phases + r + origin_x)``. Or it is one place of eight images: then no tap is at
    a shift, and the packed operand has one strip a place, in one phase.

    Attributes:
        extent: planes, rows, phases, strips a phase of the packed operand.
        origin: operand place of the first packed one.
        spread: phases of the places computed: ``extent``'s phases if a place stays in its phase, else 1.
        strips: strips a row and phase that are computed.
        wide: strip offset and 16 tap indices (-1: none) of groups of sixteen neighbouring taps.
        narrow: the same of groups of eight.
        lone: strip offset, shift in the strip and tap index of the other taps, by shift.
        images: whether a strip is one place of eight images.
    """

    extent: tuple[int, int, int, int]
    origin: Triple
    spread: int
    strips: int
    wide: tuple[tuple[int, tuple[int, ...]], ...]
    narrow: tuple[tuple[int, tuple[int, ...]], ...]
    lone: tuple[tuple[int, int, int], ...]
    images: bool = False

    @cached_property
    def volume(self) -> int:
        """Packed strips of a channel of one image, or of eight."""
        return math.prod(self.extent)

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """Columns of the compact weight in the order the kernel reads them, -1 for zeros."""
        grouped = [t for group in (*self.wide, *self.narrow) for t in group[1]]
        return (*grouped, *(t for _, _, t in self.lone))

    @cached_property
    def table(self) -> tuple[int, ...]:
        """Ends of the sections (wide, narrow, eight shifts of lone taps), then every entry's strip offset."""
        ends = [len(self.wide), len(self.wide) + len(self.narrow)]
        for shift in range(STRIP):
            ends.append(ends[1] + sum(own <= shift for _, own, _ in self.lone))
        groups = [offset for offset, _ in (*self.wide, *self.narrow)]
        return (*ends, *groups, *(offset for offset, _, _ in self.lone))

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """How many: groups of sixteen, of eight, lone taps at shift 0, at other shifts."""
        aligned = sum(shift == 0 for _, shift, _ in self.lone)
        return len(self.wide), len(self.narrow), aligned, len(self.lone) - aligned

    @property
    def slots(self) -> float:
        """Issue slots a strip takes in half precision, or as many as its loads keep the first-level cache busy."""
        return sum(count * each for count, each in zip(self.sections, _SLOTS, strict=True))

    @property
    def lanes(self) -> int:
        """Strips a computed row takes in all its phases."""
        return self.spread * self.strips


@lru_cache(maxsize=1024)
def packing(here: Pass, *, reach: int = 16, lone: bool = True) -> Packing:
    """Lay the rows of a pass out, at the phases and the alignment that cost least.

    Args:
        here: a pass with at least one tap.
        reach: the longest group of taps, 8 or 16.
        lone: whether taps may stand alone; if not every tap is in a group of exactly ``reach``.
    """
    if here.step[2] > 1:
        steps = {here.step[2]}
    else:
        columns = sorted({x for _, _, x in here.offsets})
        steps = {1, min(math.gcd(*(b - a for a, b in itertools.pairwise(columns))) or 1, _PHASES)}
        if len(columns) > 1 and max(steps) == _PHASES:
            steps = {1}  # a common step was cut down: neighbours in a phase would not be taps
    options = [_packed(here, q, shift, reach, lone) for q in sorted(steps) for shift in range(STRIP)]
    outer = math.prod(here.count[:2])
    return min(options, key=lambda p: p.lanes * (p.slots + 30 * (p.spread > 1)) + 64 * p.volume / outer)


@lru_cache(maxsize=1024)
def images(here: Pass) -> Packing:
    """Lay a pass out in strips of one place of eight images."""
    low = tuple(min(o[axis] for o in here.offsets) for axis in range(3))
    last = tuple(max(o[axis] for o in here.offsets) for axis in range(3))
    planes, rows, length = ((here.count[a] - 1) * here.step[a] + last[a] - low[a] + 1 for a in range(3))
    lone = tuple(
        (((z - low[0]) * rows + y - low[1]) * length + x - low[2], 0, t)
        for t, (z, y, x) in zip(here.taps, here.offsets, strict=True)
    )
    return Packing(
        (planes, rows, 1, length), (low[0], low[1], low[2]), 1, here.count[2], (), (), lone, images=True
    )  # fmt: skip


def _packed(here: Pass, phases: int, shift: int, reach: int, lone: bool) -> Packing:
    origin = tuple(min(o[axis] for o in here.offsets) for axis in range(3))
    last = tuple(max(o[axis] for o in here.offsets) for axis in range(3))
    spread = phases if here.step[2] == 1 else 1
    strips = math.ceil(math.ceil(here.count[2] / spread) / STRIP)
    planes, rows = ((here.count[a] - 1) * here.step[a] + last[a] - origin[a] + 1 for a in range(2))
    places: dict[tuple[int, int, int], dict[int, dict[int, int]]] = {}
    for t, (z, y, x) in zip(here.taps, here.offsets, strict=True):
        along, phase = divmod(x - origin[2], phases)
        group, place = divmod(along + shift, STRIP)
        row = places.setdefault((z - origin[0], y - origin[1], phase), {})
        row.setdefault(group, {})[place] = t
    sections = [_sections(row, reach, lone) for row in places.values()]
    furthest = max(group + span for wide, narrow, singles in sections for group, span in (
        *((g, reach // STRIP) for g, _ in wide), *((g, 1) for g, _ in narrow), *((g, 1) for g, _, _ in singles)
    ))  # fmt: skip
    length = strips + furthest
    starts = [((z * rows + y) * phases + r) * length for z, y, r in places]
    wide = [(start + g, taps) for start, (found, _, _) in zip(starts, sections, strict=True) for g, taps in found]
    narrow = [(start + g, taps) for start, (_, found, _) in zip(starts, sections, strict=True) for g, taps in found]
    single = [(start + g, m, t) for start, (_, _, found) in zip(starts, sections, strict=True) for g, m, t in found]
    return Packing(
        (planes, rows, phases, length), (origin[0], origin[1], origin[2] - shift * phases), spread, strips,
        tuple(wide), tuple(narrow), tuple(sorted(single, key=lambda entry: (entry[1], entry[0]))),
    )  # fmt: skip


_Groups = list[tuple[int, tuple[int, ...]]]


def _sections(row: dict[int, dict[int, int]], reach: int, lone: bool) -> tuple[_Groups, _Groups, list[Triple]]:
    """Groups of sixteen, groups of eight, and lone taps of one row whose taps are given by group and place."""
    crowded = [g for g in sorted(row) if not lone or len(row[g]) >= _CROWD]
    wide: _Groups = []
    narrow: _Groups = []
    while crowded:
        g = crowded.pop(0)
        taps = tuple(row[g].get(m, -1) for m in range(STRIP))
        if reach == STRIP or (lone and (not crowded or crowded[0] != g + 1)):
            narrow.append((g, taps))
            continue
        if crowded and crowded[0] == g + 1:
            crowded.pop(0)
        following = row.get(g + 1, {})
        wide.append((g, (*taps, *(following.get(m, -1) for m in range(STRIP)))))
    taken = {g for g, _ in narrow} | {g + i for g, _ in wide for i in range(2)}
    return wide, narrow, [(g, m, t) for g in row if g not in taken for m, t in sorted(row[g].items())]
