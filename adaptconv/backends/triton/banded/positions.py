"""The columns of all images in one line, as ``multiply_upright`` takes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from adaptconv.backends.triton.banded.tiling import Cut, Window

HALF = 2  # columns that are read at a time: 4 bytes


@dataclass(frozen=True, slots=True)
class Positions:
    """The columns of all images in a line, and the weight columns by parity.

    Attributes:
        late: columns from an output column to its position, 0 or 1.
        image_halves: pairs of positions of an image.
        even_columns, odd_columns: weight columns whose input columns are whole pairs away, and the others.
        first_half, odd_half: pairs from a position to the first input columns of either.
        step_half: pairs from one weight column to the next of its parity.
    """

    late: int
    image_halves: int
    even_columns: int
    odd_columns: int
    first_half: int
    odd_half: int
    step_half: int

    def kept(self, positions: int) -> int:
        """Pairs of positions that a tile of so many answers for."""
        return positions // HALF - (self.odd_columns > 0)


@lru_cache(maxsize=4096)
def positions(win: Window, made: Cut) -> Positions:
    """For a window with its last two axes exchanged, cut into blocks of one column."""
    late, pace = made.first_row % HALF, win.pace[1]
    odd = made.rows // 2 if pace % HALF else 0
    first = (made.first_row - late) // HALF
    image_halves = math.ceil((win.out[1] + late + (odd > 0)) / HALF)
    step = pace if odd else max(pace // HALF, 1)
    return Positions(late, image_halves, made.rows - odd, odd, first, first + (pace - 1) // HALF, step)


def steps(made: Cut, line: Positions, height: int, unit: int, step_rows: int) -> int:
    """Steps over K of one tile of positions in all blocks of rows, of ``step_rows`` input rows each."""
    total = 0
    for block in range(made.blocks_w):
        low = max(made.before_units - block * made.step_units, 0)
        high = min(math.ceil(height / unit) + made.before_units - block * made.step_units, made.units)
        total += math.ceil(max(high - low, 0) * unit / step_rows)
    return total * (line.even_columns + line.odd_columns)
