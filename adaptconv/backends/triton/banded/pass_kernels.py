"""The kernels before and after the banded products: rows laid, bands laid, sums collected. Words as in ``kernels``."""

import triton
import triton.language as tl

from adaptconv.backends.triton.banded.kernels import within


@triton.jit(do_not_specialize=("stride_plane", "height"))
def lay_rows(x, out, stride_plane, stride_y, stride_x, height, width, pitch, BY: tl.constexpr, BX: tl.constexpr):
    """Rows zero-padded to a pitch, and axes exchanged where the strides say so: ``out [planes, height, pitch]``."""
    across = tl.cdiv(pitch, BX)
    down = tl.cdiv(height, BY)
    tile = tl.program_id(0)
    plane = (tile // (across * down)).to(tl.int64)
    row = tile // across % down * BY + tl.arange(0, BY)
    column = tile % across * BX + tl.arange(0, BX)
    rows = row.to(tl.int64)[:, None]
    inside = (row < height)[:, None] & (column < width)[None, :]
    source = x + plane * stride_plane + rows * stride_y + column.to(tl.int64)[None, :] * stride_x
    target = out + plane * height * pitch + rows * pitch + column[None, :]
    tl.store(target, tl.load(source, mask=inside, other=0.0), mask=(row < height)[:, None] & (column < pitch)[None, :])


@triton.jit(do_not_specialize=range(3, 12))
def lay_bands(
    w, places, table, stride_channel, stride_tap, depth_taps, height, width, table_rows, table_columns, lead_rows,
    lead_columns, GRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights in their window, zeros around, once for each misalignment to a grain.

    ``table[c, s, z, row, column] = weight[c, z, row - lead_rows, column - s - lead_columns]``, so that the run
    of a band above any output column starts at a whole grain of one of the GRAIN copies. ``places [z, row, column]`` is
    the tap of the compact weight that stands at a place of the window, -1 for none.
    """
    size = GRAIN * depth_taps * table_rows * table_columns
    blocks = tl.cdiv(size, BLOCK)
    c = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    line = at // table_columns
    z = line // table_rows
    row = line % table_rows - lead_rows
    column = at % table_columns - z // depth_taps - lead_columns
    z = z % depth_taps
    inside = (at < size) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    tap = tl.load(places + (z * height + row) * width + column, mask=inside, other=-1)
    value = tl.load(w + c * stride_channel + tap.to(tl.int64) * stride_tap, mask=tap >= 0, other=0.0)
    tl.store(table + c * size + at, value, mask=at < size)


@triton.jit(do_not_specialize=range(3, 14))
def collect(
    partial, places, dw, splits, channels, depth_taps, tiles_u, turns, area, taps, rows, stride_h, columns,
    tile_columns, BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums up BLOCK taps of dW of one channel: over splits, in order, and over the rows i of a block.

    ``places [3, taps]``: depth, row and column of a tap in the window; depth -1 for a tap that reads nothing.
    """
    blocks = tl.cdiv(taps, BLOCK)
    c = (tl.program_id(0) // blocks).to(tl.int64)
    t = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    known = t < taps
    z = tl.load(places + t, mask=known, other=-1)
    r = tl.load(places + taps + t, mask=known, other=0)
    j = tl.load(places + 2 * taps + t, mask=known, other=0)
    tile, j = j // tile_columns, j % tile_columns
    i = tl.arange(0, BH)
    row = r[:, None] + i[None, :] * stride_h
    live = (z >= 0)[:, None] & within(row, rows)
    at = ((z * tiles_u + tile) * turns + j // columns) * BH
    at = (at[:, None] + i[None, :]).to(tl.int64) * area + row * columns + (j % columns)[:, None]
    total = tl.zeros((BLOCK,), tl.float32)
    for s in range(splits):
        base = partial + (s * channels + c) * (depth_taps * tiles_u * turns * BH).to(tl.int64) * area
        total += tl.sum(tl.load(base + at, mask=live, other=0.0), axis=1)
    tl.store(dw + c * taps + t, total.to(dw.dtype.element_ty), mask=known)
