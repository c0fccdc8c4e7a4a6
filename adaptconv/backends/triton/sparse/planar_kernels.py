"""The kernels for channels outermost: along one axis, where the taps' offsets keep rows of places on whole vectors.

No operand is copied into another layout. Counts of places arrive divided by ``VEC``, which divides them all, and are
multiplied here: a vector of places is inside or outside as a whole, whatever the tap.
"""

import triton
import triton.language as tl

from adaptconv.backends.triton.sparse.kernels import job_of, part_of

_PRODUCT_COUNTS = (
    "job_count", "source", "target", "image_in", "image_out", "tap_w", "ins", "row_w", "outs", "groups",
    "channel_parts", "part_y",
)  # fmt: skip
_WEIGHT_COUNTS = ("batch", "source", "target", "image_in", "image_out", "ins", "wide", "outs", "groups", "parts_pitch")


@triton.jit(do_not_specialize=_PRODUCT_COUNTS)
def planar_product(
    x, w, bias, y, jobs, taps, job_count, source, target, image_in, image_out, tap_w, ins, row_w, outs, groups,
    channel_parts, part_y,
    JOBS: tl.constexpr, VEC: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``y[n, c, l] = bias[c] + sum_t sum_k w[t, c, k] x[n, k, l + offset_t]``.

    ``x [N, groups * ins, source]``, ``y [N, groups * outs, target]``, ``w [T, groups * outs, row_w]`` with zeros
    behind. A job is a range of l with one list of taps; a program computes BM channels of one group at BN places of
    one image. Axis 1 of the grid cuts the sum, as in ``kernels.tap_product``.

    ``jobs [J, 8]``: first tile, first place, count of places, first tap, end of taps; ``taps [R, 2]``: offset, index
    in w. Places and offsets are divided by VEC.
    """
    source = source * VEC
    target = target * VEC
    row_w = row_w * BK

    across = tl.cdiv(outs, BM)
    pid = tl.program_id(0)
    tile = pid // (across * groups)
    column = pid % (across * groups)
    group = column // across
    c = (column % across) * BM + tl.arange(0, BM)

    job = jobs + job_of(jobs, tile, job_count, JOBS) * 8
    base = tl.load(job + 1) * VEC
    stop = base + tl.load(job + 2) * VEC
    along = tl.cdiv(stop - base, BN)
    tile -= tl.load(job)
    image = tile // along
    place = base + (tile % along) * BN + tl.arange(0, BN)
    begin, end, k_begin, k_end = part_of(tl.load(job + 3), tl.load(job + 4), row_w, channel_parts, PARTIAL, BK)

    k = tl.arange(0, BK)
    columns = x + (image.to(tl.int64) * image_in * VEC + group * ins * source) + (k[:, None] * source + place[None, :])
    # Rows past the end repeat the last one and are never stored.
    w_rows = w + (group * outs + tl.minimum(c, outs - 1)).to(tl.int64)[:, None] * row_w + k[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for t in tl.range(begin, end, flatten=True):
        offset = tl.load(taps + 2 * t) * VEC
        ok = ((place + offset).to(tl.uint32, bitcast=True) < source.to(tl.uint32))[None, :]
        xs = columns + offset
        ws = w_rows + tl.load(taps + 2 * t + 1).to(tl.int64) * (tap_w * BK)
        for k0 in tl.range(k_begin, k_end, BK):
            a = tl.load(ws + k0)
            if EVEN:
                b = tl.load(xs + k0 * source, mask=ok, other=0.0)
            else:
                b = tl.load(xs + k0 * source, mask=ok & (k0 + k < ins)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    channel = group * outs + c
    if BIAS:
        acc += tl.load(bias + channel, mask=c < outs, other=0.0).to(tl.float32)[:, None]
    out = y + image.to(tl.int64) * image_out * VEC + (channel[:, None] * target + place[None, :])
    if PARTIAL:
        out += tl.program_id(1).to(tl.int64) * (part_y * VEC)
    tl.store(out, acc.to(y.dtype.element_ty), mask=(c < outs)[:, None] & (place < stop)[None, :])


@triton.jit(do_not_specialize=_WEIGHT_COUNTS)
def planar_weight(
    x, dy, parts, boxes, batch, source, target, image_in, image_out, ins, wide, outs, groups, parts_pitch,
    VEC: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``parts[s, t, o, i] = sum_n sum_l dy[n, o, l] x[n, i, l + offset_t]``, l over the places where the tap reads x.

    Layouts as in ``planar_product``; ``parts [S, T, groups * outs, wide]`` float32, where ``wide``
    and ``parts_pitch``, between parts, arrive divided by WIDTH. Axis 1 of the grid cuts the sum.
    ``boxes [T, 4]``: first place, count of places, offset, index in parts; the first three divided by VEC.
    """
    source = source * VEC
    target = target * VEC
    across_i = tl.cdiv(ins, BN)
    across_o = tl.cdiv(outs, BM)
    pid = tl.program_id(0)
    i = (pid % across_i) * BN + tl.arange(0, BN)
    pid = pid // across_i
    o = (pid % across_o) * BM + tl.arange(0, BM)
    pid = pid // across_o
    group = pid % groups
    box = boxes + (pid // groups) * 4
    base = tl.load(box) * VEC
    stop = base + tl.load(box + 1) * VEC
    along = tl.cdiv(stop - base, BK)
    steps = (batch * along).to(tl.int64)
    begin = (steps * tl.program_id(1) // tl.num_programs(1)).to(tl.int32)
    end = (steps * (tl.program_id(1) + 1) // tl.num_programs(1)).to(tl.int32)

    # Channels past the end repeat the last one and are never stored.
    k = base + tl.arange(0, BK)
    ys = dy + (group * outs + tl.minimum(o, outs - 1))[:, None] * target + k[None, :]
    xs = x + (group * ins + tl.minimum(i, ins - 1))[:, None] * source + (k + tl.load(box + 2) * VEC)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(begin, end):
        image = step // along
        skipped = (step - image * along) * BK
        ok = (k + skipped < stop)[None, :]
        a = tl.load(ys + (image.to(tl.int64) * image_out * VEC + skipped), mask=ok, other=0.0)
        b = tl.load(xs + (image.to(tl.int64) * image_in * VEC + skipped), mask=ok, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    wide = wide * WIDTH
    rows = parts + tl.program_id(1).to(tl.int64) * parts_pitch * WIDTH
    rows += tl.load(box + 3) * ((groups * outs).to(tl.int64) * wide)
    rows += (group * outs + o).to(tl.int64)[:, None] * wide + i[None, :]
    tl.store(rows, acc, mask=(o < outs)[:, None] & (i < wide)[None, :])
