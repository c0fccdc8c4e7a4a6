"""The kernels of FORWARD and GRAD_INPUT: products over a list of taps with channels innermost; sums of their parts.

Every pointer is to a contiguous tensor, or to a table of int32. Counts of elements arrive divided by ``VEC``, the
elements of 16 bytes, and are multiplied here: only so does the compiler know that rows begin on 16 bytes, without
which there are neither vector loads nor asynchronous copies.
"""

import triton
import triton.language as tl

# One compiled kernel serves all shapes: no count is a case of its own, not even 1.
_PRODUCT_COUNTS = (
    "job_count", "batch", "size_z", "size_y", "size_x", "step_z", "step_y", "step_x", "pitch_z", "pitch_y", "pitch_x",
    "image_in", "image_out", "tap_w", "channels", "depth", "row_w", "width", "groups", "channel_parts", "part_y",
)  # fmt: skip
_FAR = tl.constexpr(-(1 << 30))  # a place outside of any map, whatever is added


@triton.jit
def job_of(jobs, tile, count, JOBS: tl.constexpr):
    """The job that a tile belongs to: jobs are sorted by their first tile, which is their first column."""
    if JOBS == 1:
        return 0
    ids = tl.arange(0, JOBS)
    firsts = tl.load(jobs + ids * 8, mask=ids < count, other=1 << 30)
    return tl.sum((firsts <= tile).to(tl.int32), 0) - 1


@triton.jit
def part_of(begin, end, row_w, channel_parts, PARTIAL: tl.constexpr, BK: tl.constexpr):
    """What this program sums: first tap, end of taps, first channel, end of channels."""
    k_begin = 0
    k_end = row_w
    if PARTIAL:
        part = tl.program_id(1)
        tap_parts = tl.num_programs(1) // channel_parts
        tap_part = part // channel_parts
        count = end - begin
        end = begin + count * (tap_part + 1) // tap_parts
        begin += count * tap_part // tap_parts
        blocks = row_w // BK
        k_part = part % channel_parts
        k_begin = blocks * k_part // channel_parts * BK
        k_end = blocks * (k_part + 1) // channel_parts * BK
    return begin, end, k_begin, k_end


@triton.jit(do_not_specialize=_PRODUCT_COUNTS)
def tap_product(
    x, w, bias, y, jobs, taps, job_count, batch, size_z, size_y, size_x, step_z, step_y, step_x, pitch_z, pitch_y,
    pitch_x, image_in, image_out, tap_w, channels, depth, row_w, width, groups, channel_parts, part_y,
    AXES: tl.constexpr, JOBS: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr,
    BIAS: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of a result: ``y[n, base + pitch . q, c] = bias[c] + sum_t sum_k x[n, step . q + offset_t, k] w[t, c, k]``.

    ``x [N, places, channels]`` with ``channels = groups * depth``, ``w [T, groups * width, row_w]`` with zeros from
    ``depth`` to ``row_w``, a multiple of BK; ``y [N, places, groups * width]``, or float32 parts, ``part_y`` elements
    apart. A job is a box of counters q with one list of taps; a program computes BM of its rows (image outermost)
    by BN columns of one group. Axis 1 of the grid cuts the sum: over channels into ``channel_parts``, over taps into
    the rest.

    ``jobs [J, 8]``: first tile, extents z y x, base, first tap, end of taps. ``taps [R, 8]``: offsets z y x, their
    sum in places, index in w.
    """
    channels = channels * VEC
    depth = depth * VEC
    row_w = row_w * BK
    image_in = image_in * VEC
    width = width * VEC
    image_out = image_out * VEC

    across = tl.cdiv(width, BN)
    pid = tl.program_id(0)
    tile = pid // (across * groups)
    column = pid % (across * groups)
    group = column // across
    n0 = (column % across) * BN

    job = jobs + job_of(jobs, tile, job_count, JOBS) * 8
    first = tl.load(job)
    extent_x = tl.load(job + 3)
    m = (tile - first) * BM + tl.arange(0, BM)
    qx = m % extent_x
    r = m // extent_x
    if AXES >= 2:
        extent_y = tl.load(job + 2)
        qy = r % extent_y
        r = r // extent_y
    if AXES == 3:
        extent_z = tl.load(job + 1)
        qz = r % extent_z
        r = r // extent_z
    inside = r < batch

    # A row past the end is put outside of the map: the test of every tap then covers it.
    ix = tl.where(inside, qx * step_x, _FAR)
    place = qx * step_x
    target = tl.load(job + 4) + qx * pitch_x
    if AXES >= 2:
        iy = qy * step_y
        place += iy * size_x
        target += qy * pitch_y
    if AXES == 3:
        iz = qz * step_z
        place += iz * (size_y * size_x)
        target += qz * pitch_z
    rows = x + (r.to(tl.int64) * image_in + group * depth)
    rows += place * channels

    begin, end, k_begin, k_end = part_of(tl.load(job + 5), tl.load(job + 6), row_w, channel_parts, PARTIAL, BK)
    k = tl.arange(0, BK)
    n = n0 + tl.arange(0, BN)
    # Columns past the end repeat the last one and are never stored: their loads need no mask.
    w_rows = w + (group * width + tl.minimum(n, width - 1)).to(tl.int64)[:, None] * row_w + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    # Flattened into one loop with the inner one: the pipeline of loads does not drain at each tap.
    for t in tl.range(begin, end, flatten=True):
        tap = taps + t * 8
        dx = tl.load(tap + 2)
        ok = (ix + dx).to(tl.uint32, bitcast=True) < size_x.to(tl.uint32)
        if AXES >= 2:
            dy = tl.load(tap + 1)
            ok &= (iy + dy).to(tl.uint32, bitcast=True) < size_y.to(tl.uint32)
        if AXES == 3:
            dz = tl.load(tap)
            ok &= (iz + dz).to(tl.uint32, bitcast=True) < size_z.to(tl.uint32)
        xs = rows[:, None] + tl.load(tap + 3) * channels + k[None, :]
        ws = w_rows + tl.load(tap + 4).to(tl.int64) * (tap_w * BK)
        for k0 in tl.range(k_begin, k_end, BK):
            if EVEN:
                a = tl.load(xs + k0, mask=ok[:, None], other=0.0)
            else:
                a = tl.load(xs + k0, mask=ok[:, None] & (k0 + k < depth)[None, :], other=0.0)
            b = tl.load(ws + k0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    kept = inside[:, None] & (n < width)[None, :]
    column_y = group * width + n
    if BIAS:
        acc += tl.load(bias + column_y, mask=n < width, other=0.0).to(tl.float32)[None, :]
    out = y + (r.to(tl.int64) * image_out)[:, None] + (target * (groups * width))[:, None] + column_y[None, :]
    if PARTIAL:
        out += tl.program_id(1).to(tl.int64) * (part_y * VEC)
    tl.store(out, acc.to(y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=("total", "parts_count", "columns", "places"))
def sum_parts(parts, bias, y, total, parts_count, columns, places, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """``y[i] = bias[i // places % columns] + sum_s parts[s, i]``, in the order of s: the same sum at every run.

    ``parts [S, total]`` float32; a program sums BLOCK elements.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    kept = i < total
    acc = tl.zeros((BLOCK,), tl.float32)
    at = parts + i
    for _ in range(parts_count):
        acc += tl.load(at, mask=kept, other=0.0)
        at += total
    if BIAS:
        acc += tl.load(bias + i // places % columns, mask=kept, other=0.0).to(tl.float32)
    tl.store(y + i, acc.to(y.dtype.element_ty), mask=kept)
