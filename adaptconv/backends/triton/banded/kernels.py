"""The kernels of banded convolution: products with bands of weights, and the sums along the diagonals of others.

Words: a *unit* is 16 bytes of a row of the input (8 half-precision elements or 4 of float32). Rows of ``x`` are whole
units, zero-padded. A *block* is BH x BW outputs of one image plane; *images* are pairs of an output depth and a sample.
One channel's convolution is then one matrix product

    Y[(block, image), (i, w)] = sum over (r, u) of X[(block, image), (r, u)] * B[(r, u), (i, w)]

where X[.., (r, u)] is the input element r rows and u columns from the block's corner, and
B[(r, u), (i, w)] = weight[r - i * stride_h, u - w * stride_w - shift], zero outside the window: Toeplitz in both axes.
Where taps are ``pace_h`` rows apart, rows are counted in paces: an image is parted into *phases*, each of outputs
``phases`` rows apart, that share the input rows they read, ``pace_h`` apart, with each other and with no other phase.
Integers, which differ from layer to layer, are not specialised: each of their values would be a kernel of its own.
"""

import triton
import triton.language as tl

_FAR = tl.constexpr(1 << 29)  # a row that is outside any input, also twice


@triton.jit
def divided(n, divisor, magic, shift):
    """``n // divisor`` for 0 <= n < 2**31, by one multiplication; magic and shift are made by the host."""
    high = tl.umulhi(n.to(tl.uint32), magic.to(tl.uint32, bitcast=True)) >> shift.to(tl.uint32)
    return tl.where(divisor == 1, n, high.to(tl.int32))


@triton.jit
def within(place, extent):
    """Whether 0 <= place < extent, in one comparison."""
    return place.to(tl.uint32, bitcast=True) < extent.to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=range(4, 41))
def multiply(
    x, table, y, bias, images, batch, channels, depth, height, width_parts, out_depth, out_height, out_width,
    row_units, plane_units, block_units, blocks_h, blocks_w, tiles, step_h, step_units, first_z, first_row, low_h,
    high_h, before_units, depth_taps, rows, units, table_rows, table_grains, stride_z, stride_h, stride_w, pace_z,
    pace_h, phases, phase_rows, shift, high, wide, UNIT: tl.constexpr, PART: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr, BK: tl.constexpr, Y_UNIT: tl.constexpr, FULL: tl.constexpr, DEEP: tl.constexpr,
    PHASED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BM pairs (block, image) of one channel by the high x wide outputs of a block, at most BN.

    ``x [batch, channels, depth, height, width_parts * PART]``, read in parts of a unit where its rows are no whole
    units; ``table`` as ``lay_bands`` writes it; ``y [batch, channels, out_depth, out_height, out_width]``, rows of
    row_units * Y_UNIT. Blocks are high x BW; or, if FULL, as wide as the output, whose rows then follow each other
    without a gap, in the columns of the product as in memory. K runs over units in bounds for some block of the tile,
    row by row; a step takes BK // UNIT of them, from as many rows as they span: no row is filled to a power of two.
    """
    c = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BM
    count = blocks_h * blocks_w * images
    last = tl.minimum(first + BM, count) - 1

    # Rows and units of the window that any block of this tile has inside the input.
    PARTS: tl.constexpr = UNIT // PART
    line = blocks_w * images
    h_first, h_last = first // line, last // line
    one_line = h_first == h_last
    w_first = tl.where(one_line, first % line // images, 0)
    w_last = tl.where(one_line, last % line // images, blocks_w - 1)
    r_low = tl.maximum(low_h - h_last * step_h, 0)
    r_high = tl.minimum(high_h - h_first * step_h, rows)
    u_low = tl.maximum(before_units - w_last * step_units, 0)
    u_high = tl.minimum(tl.cdiv(width_parts, PARTS) + before_units - w_first * step_units, units)
    across = tl.maximum(u_high - u_low, 1)
    wanted = tl.where(u_high > u_low, tl.maximum(r_high - r_low, 0) * across, 0)
    steps = tl.cdiv(wanted, BK // UNIT)

    # What each row of the tile reads.
    m = first + tl.arange(0, BM)
    image = m % images
    block = m // images
    bw, bh = block % blocks_w, block // blocks_w
    real = m < count
    top = bh * (step_h * pace_h) + first_row
    if PHASED:
        inner = images // phases
        phase = image // inner
        image = image % inner
        top += phase * phase_rows
    if DEEP:
        n, oz = (image % batch).to(tl.int64), image // batch
        iz = oz * stride_z + first_z
    else:
        n, oz, iz = image.to(tl.int64), 0, 0
    iy = tl.where(real, top, _FAR)
    iu = bw * step_units - before_units
    ip = iu * PARTS
    width = width_parts * PART
    plane = height.to(tl.int64) * width
    x_row = x + ((n * channels + c) * depth + iz) * plane + top * width + iu * UNIT
    line_width = width * pace_h

    # What each column of the tile multiplies with.
    column = tl.arange(0, BN)
    if FULL:
        i, w = column // wide, column % wide
    else:
        i, w = column // BW, column % BW
    off = w * stride_w + shift
    GRAIN: tl.constexpr = UNIT // 2  # copies of half a unit go through the first-level cache, which holds the table
    ahead = ((wide - 1) * stride_w + shift) // GRAIN
    table_width = table_grains * GRAIN
    table_plane = table_rows * table_width
    line_of = (off % GRAIN) * depth_taps * table_rows + tl.maximum(high - 1 - i, 0) * stride_h
    t_row = table + c * (GRAIN * depth_taps * table_plane) + line_of * table_width + (ahead - off // GRAIN) * GRAIN

    k = tl.arange(0, BK)
    r_start, u_start = k // UNIT // across, k // UNIT % across
    r_step, u_step = BK // UNIT // across, BK // UNIT % across
    part_start = k // PART % PARTS
    acc = tl.zeros((BM, BN), tl.float32)
    deep = depth_taps if DEEP else 1
    for z in range(deep):
        y_of = tl.where(within(iz + z * pace_z, depth), iy, _FAR) if DEEP else iy
        r, u = r_low + r_start, u_low + u_start
        for _ in range(steps):
            at = u * UNIT + k % UNIT
            part = u * PARTS + part_start
            inside = within(y_of[:, None] + (r * pace_h)[None, :], height)
            inside &= within(ip[:, None] + part[None, :], width_parts)
            a = tl.load(x_row[:, None] + (r * line_width + at)[None, :], mask=inside, other=0.0)
            b = tl.load(t_row[:, None] + (r * table_width + at)[None, :], mask=(r < r_high)[None, :], other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
            u += u_step
            over = u >= u_high
            u = tl.where(over, u - across, u)
            r += tl.where(over, r_step + 1, r_step)
        x_row += plane * pace_z
        t_row += table_plane

    if HAS_BIAS:
        acc += tl.load(bias + c).to(tl.float32)
    row = row_units * Y_UNIT
    oy, ox, apart = bh * high, bw * BW, 1
    if PHASED:
        oy, apart = oy * phases + phase, phases
    if FULL:
        y_plane = (plane_units * Y_UNIT).to(tl.int64)
        y_at = bh * (block_units * Y_UNIT)
        y_column = column
        keep = (y_at[:, None] + column[None, :] < plane_units * Y_UNIT) & (column < block_units * Y_UNIT)[None, :]
    else:
        y_plane = out_height.to(tl.int64) * row
        y_at = oy * row + ox
        y_column = i * apart * row + w
        keep = (oy[:, None] + (i * apart)[None, :] < out_height) & (ox[:, None] + w[None, :] < out_width)
        keep &= (i < high)[None, :]
    y_row = y + ((n * channels + c) * out_depth + oz) * y_plane + y_at
    tl.store(y_row[:, None] + y_column[None, :], acc.to(y.dtype.element_ty), mask=keep & real[:, None])


@triton.jit(do_not_specialize=range(3, 42))
def correlate(
    x, dy, partial, images, batch, channels, depth, height, width_units, out_depth, out_height, out_units, blocks_h,
    blocks_w, step_h, step_units, first_z, first_row, low_h, high_h, before_units, depth_taps, rows, tiles_r, tiles_u,
    tile_columns, splits, stride_z, stride_w, pace_z, pace_h, phases, phase_rows, shift, images_magic, images_shift,
    blocks_magic, blocks_shift, inner_magic, inner_shift, batch_magic, batch_shift, UNIT: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNS: tl.constexpr,
    BK: tl.constexpr, DEEP: tl.constexpr, PHASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dY^T X of one channel for ROWS x COLUMNS places of the window, then the sums along the diagonals of its columns.

    The product P[(i, w), (r, u)] runs over pairs (block, image); weight column j of output column w is
    u = j + w * stride_w + shift, so sum over w of P[(i, w), (r, j + w * stride_w + shift)] is what is stored, as
    ``partial [splits, channels, depth_taps, tiles_u, TURNS, BH, tiles_r * ROWS, COLUMNS]`` in float32, j being
    tile_columns * tile + COLUMNS * turn + column. ``dy [batch, channels, out_depth, out_height, out_units * UNIT]``.
    """
    pid = tl.program_id(0)
    split, tile_r = pid % splits, pid // splits % tiles_r
    rest = pid // splits // tiles_r
    tile_u, z = rest % tiles_u, rest // tiles_u % depth_taps
    c = (rest // tiles_u // depth_taps).to(tl.int64)

    # Block rows that have some row of this tile inside the input.
    r_first = tile_r * ROWS
    low = (tl.maximum(low_h - r_first - ROWS + 1, 0) + step_h - 1) // step_h
    reach = high_h - 1 - r_first
    high = tl.where(reach < 0, 0, tl.minimum(tl.maximum(reach, 0) // step_h + 1, blocks_h))
    line = blocks_w * images
    start, end = low * line, high * line
    steps = tl.cdiv(tl.maximum(end - start, 0), BK)
    share = tl.cdiv(steps, splits)
    start += split * share * BK
    end = tl.minimum(end, start + share * BK)

    column = tl.arange(0, ROWS * COLUMNS)
    r = r_first + column // COLUMNS
    u = (tile_u * tile_columns) // UNIT + column // UNIT % (COLUMNS // UNIT)  # in this order the runs of a unit show
    width = width_units * UNIT
    plane = height.to(tl.int64) * width
    x_column = tl.max_contiguous(tl.multiple_of(r * pace_h * width + u * UNIT + column % UNIT, UNIT), UNIT)
    known = tl.where(r < rows, r * pace_h, _FAR)
    place = tl.arange(0, BH * BW)
    i, w, ou = place // BW, place % BW, place // UNIT % (BW // UNIT)
    out_row = out_units * UNIT
    out_plane = out_height.to(tl.int64) * out_row
    y_rows = i * phases if PHASED else i
    y_column = y_rows * out_row + w

    acc = tl.zeros((BH * BW, ROWS * COLUMNS), tl.float32)
    x_channel = x + (c * depth + z * pace_z + first_z) * plane + first_row * width - before_units * UNIT
    y_channel = dy + c * out_depth * out_plane
    x_sample, y_sample = channels * depth * plane, channels * out_depth * out_plane
    for first in range(start, end, BK):
        m = first + tl.arange(0, BK)
        block = divided(m, images, images_magic, images_shift)
        image = m - block * images
        bh = divided(block, blocks_w, blocks_magic, blocks_shift)
        bw = block - bh * blocks_w
        real = m < end
        x_row, y_row = bh * (step_h * pace_h), bh * BH
        if PHASED:
            phase = divided(image, images // phases, inner_magic, inner_shift)
            image = image - phase * (images // phases)
            x_row += phase * phase_rows
            y_row = y_row * phases + phase
        x_at = (x_row * width + bw * (step_units * UNIT)).to(tl.int64)
        y_at = (y_row * out_row + bw * BW).to(tl.int64)
        if DEEP:
            oz = divided(image, batch, batch_magic, batch_shift)
            image = image - oz * batch
            iz = oz * stride_z + first_z + z * pace_z
            real = real & within(iz, depth)
            x_at += (oz * stride_z) * plane
            y_at += oz * out_plane
        x_at += image * x_sample
        y_at += image * y_sample
        iy = tl.where(real, x_row + first_row, _FAR)
        oy = tl.where(real, y_row, _FAR)
        y_inside = (oy[:, None] + y_rows[None, :] < out_height) & (
            (bw * (BW // UNIT))[:, None] + ou[None, :] < out_units
        )
        iu = bw * step_units - before_units
        x_inside = within(iy[:, None] + known[None, :], height) & within(iu[:, None] + u[None, :], width_units)
        left = tl.load((y_channel + y_at)[:, None] + y_column[None, :], mask=y_inside, other=0.0)
        right = tl.load((x_channel + x_at)[:, None] + x_column[None, :], mask=x_inside, other=0.0)
        acc = tl.dot(tl.trans(left), right, acc, input_precision=PRECISION)

    # Along the diagonals: entry j of row (i, w) is its own entry j + w * stride_w + shift.
    area = tiles_r * ROWS * COLUMNS
    out = partial + ((((split * channels + c) * depth_taps + z) * tiles_u + tile_u) * TURNS * BH) * area
    where = tl.arange(0, BH)[:, None] * area + (r_first * COLUMNS + column)[None, :]
    for turn in tl.static_range(TURNS):
        aim = (column % COLUMNS + turn * COLUMNS)[None, :] + (w * stride_w + shift)[:, None]
        hit = aim.to(tl.uint32, bitcast=True) < COLUMNS
        index = tl.where(hit, (column // COLUMNS * COLUMNS)[None, :] + aim, 0)
        skewed = tl.where(hit, tl.gather(acc, index, 1), 0.0)
        sums = tl.sum(tl.reshape(skewed, (BH, BW, ROWS * COLUMNS)), axis=1)
        tl.store(out + turn * BH * area + where, sums)
