"""The kernel of bands along the rows that leaves the input as it lies: no axis is exchanged before or after.

Of one channel, with a band B_s for each column s of the weights, an output column is a sum of products over the rows r

    Y[i, w] = sum over s, r of B_s[i, r] * X[r, w + s]

and a tile takes BN *positions* of all images' columns at once, contiguous in memory. Copies into shared memory take two
elements, aligned, so ``w + s`` must be even where ``w`` is. Weight columns of one parity therefore make one sum, those
of the other a second one, of X one column to the left; its columns move by one before the two are added.

Words as in ``kernels``; *halves* are pairs of columns, 4 bytes.
"""

import triton
import triton.language as tl

from adaptconv.backends.triton.banded.kernels import within

_FAR = tl.constexpr(1 << 28)  # a pair of columns that is outside any input


@triton.jit
def _columns(
    acc, x_at, half, bands, band_of, top, height, width_halves, table_width, first_half, step_half, first_column,
    step_column, count, low, high, WHOLE: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the products of ``count`` weight columns, whose input columns are whole pairs away.

    Rows of a block's window from low to high, whole units, BK a step; no step has two columns, which keeps its bounds
    short. A window that has rows outside the input has them in whole units if the input does, and then it is enough
    that its bands have zeros there.
    """
    k = tl.arange(0, BK)
    width = width_halves * 2
    chunks = tl.cdiv(high - low, BK)
    row, away, column = low, first_half, first_column
    for _ in range(count * chunks):
        line = top + row
        inside = within(half + away, width_halves)[None, :]
        if WHOLE:
            x_row = tl.minimum(k, height - 1 - line)
        else:
            x_row = k
            inside = inside & (k < height - line)[:, None]
        x_from = x_at + (line * width + away * 2)
        x = tl.load(x_from[None, :] + (x_row * width)[:, None], mask=inside, other=0.0)
        band_at = bands + (column * table_width + row)
        band = tl.load(band_at + (band_of[:, None] + k[None, :]), mask=(k < high - row)[None, :], other=0.0)
        acc = tl.dot(band, x, acc, input_precision=PRECISION)
        row += BK
        over = row >= high
        row = tl.where(over, low, row)
        away += tl.where(over, step_half, 0)
        column += tl.where(over, step_column, 0)
    return acc


@triton.jit(do_not_specialize=range(4, 27))
def multiply_upright(
    x, table, y, bias, halves, image_halves, channels, height, width_halves, out_height, out_width, tiles, blocks, high,
    step_units, before_units, units, table_rows, table_grains, stride_h, shift, late, first_half, step_half,
    even_columns, odd_half, odd_columns, UNIT: tl.constexpr, BI: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ODD: tl.constexpr, WHOLE: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """High output rows, at most BI, by BN positions of one channel.

    ``x [batch, channels, height, width_halves * 2]``; ``table`` as ``lay_bands`` writes it, axes exchanged, for blocks
    of one column; ``y [batch, channels, out_height, out_width]``. A position is a column of an output plane, ``late``
    further to the right, so that the even weight columns are whole pairs away.
    """
    pid = tl.program_id(0)
    tile, b = pid % tiles, pid // tiles % blocks
    c = (pid // tiles // blocks).to(tl.int64)

    # Rows of this block's window that the input has, in whole units.
    top = (b * step_units - before_units) * UNIT
    low = tl.maximum(before_units - b * step_units, 0) * UNIT
    most = tl.minimum(tl.cdiv(height, UNIT) + before_units - b * step_units, units) * UNIT

    # What each position reads.
    KEPT: tl.constexpr = BN // 2 - 1 if ODD else BN // 2  # the last pair lends the one before it a column
    n = tl.arange(0, BN)
    at = tile * KEPT + n // 2
    image, half = at // image_halves, at % image_halves
    plane = height.to(tl.int64) * (width_halves * 2)
    x_at = x + (image.to(tl.int64) * channels + c) * plane + half * 2 + n % 2
    known = tl.where(at < halves, half, _FAR)

    # What each output row multiplies with.
    i = tl.arange(0, BI)
    off = i * stride_h + shift
    GRAIN: tl.constexpr = UNIT // 2
    ahead = ((high - 1) * stride_h + shift) // GRAIN
    table_width = table_grains * GRAIN
    table_plane = table_rows * table_width
    bands = table + c * (GRAIN * table_plane)
    band_of = (off % GRAIN) * table_plane + tl.maximum(ahead - off // GRAIN, 0) * GRAIN

    acc = tl.zeros((BI, BN), tl.float32)
    acc = _columns(
        acc, x_at, known, bands, band_of, top, height, width_halves, table_width, first_half, step_half, 0,
        2 if ODD else 1, even_columns, low, most, WHOLE, BK, PRECISION,
    )  # fmt: skip
    if ODD:
        moved = tl.zeros((BI, BN), tl.float32)
        moved = _columns(
            moved, x_at, known, bands, band_of, top, height, width_halves, table_width, odd_half, step_half, 1, 2,
            odd_columns, low, most, WHOLE, BK, PRECISION,
        )  # fmt: skip
        next_to = tl.broadcast_to(tl.minimum(n + 1, BN - 1)[None, :], (BI, BN))
        acc += tl.gather(moved, next_to, 1)
    if HAS_BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    column = half * 2 + n % 2 - late
    oy = b * high + i
    y_plane = out_height.to(tl.int64) * out_width
    y_at = y + (image.to(tl.int64) * channels + c) * y_plane + column
    keep = (i < high) & (oy < out_height)
    real = (at < halves) & within(column, out_width) & (n // 2 < KEPT)
    tl.store(y_at[None, :] + (oy * out_width)[:, None], acc.to(y.dtype.element_ty), mask=keep[:, None] & real[None, :])
