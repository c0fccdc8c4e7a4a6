"""The kernels of GRAD_WEIGHT: sums over pixels for each tap and pair of channels; sums of their parts.

Pointers and counts as in ``kernels``: ``depth_in`` and ``depth_out`` arrive divided by ``VEC``.
"""

import triton
import triton.language as tl

_WEIGHT_COUNTS = (
    "batch", "size_z", "size_y", "size_x", "out_y", "out_x", "step_z", "step_y", "step_x", "image_in", "image_out",
    "depth_in", "depth_out", "ins", "outs", "groups", "parts_pitch",
)  # fmt: skip


@triton.jit
def _reads(
    offsets, qx, qy, qz, step_x, step_y, step_z, size_x, size_y, size_z, AXES: tl.constexpr
):  # fmt: skip
    """Whether the places that a tap reads are inside, by one unsigned comparison an axis."""
    ok = (qx * step_x + tl.load(offsets + 2)).to(tl.uint32, bitcast=True) < size_x.to(tl.uint32)
    if AXES >= 2:
        ok &= (qy * step_y + tl.load(offsets + 1)).to(tl.uint32, bitcast=True) < size_y.to(tl.uint32)
    if AXES == 3:
        ok &= (qz * step_z + tl.load(offsets)).to(tl.uint32, bitcast=True) < size_z.to(tl.uint32)
    return ok


@triton.jit(do_not_specialize=_WEIGHT_COUNTS)
def weight_product(
    x, dy, parts, boxes, batch, size_z, size_y, size_x, out_y, out_x, step_z, step_y, step_x, image_in, image_out,
    depth_in, depth_out, ins, outs, groups, parts_pitch,
    AXES: tl.constexpr, SHARE: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr, TURNED: tl.constexpr,
    VEC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``parts[s, t, o, i] = sum_m dy[m, o] x[m + offset_t, i]`` over the share s of the places m where tap t is alive.

    ``x [N, places, groups * depth_in]``, ``dy [N, places, groups * depth_out]``, of which the first ``ins`` and
    ``outs`` channels of a group count; ``parts [S, T, groups * outs, depth_in]`` float32. A program computes BM
    outputs by BN inputs of one group, for SHARE taps that use one load of dy, over its share of the sum: axis 1 of
    the grid.

    ``boxes [T / SHARE, 20]``: extents z y x, first place of dy, then for each tap its offsets z y x from the box's
    first place, their sum in places, its index in parts (-1: none). The places of one tap's box are all inside: only
    shared boxes, which hold those of several, are masked. No division in the loop: the counters of a row advance by
    BK in the box's mixed radix, with carries.
    """
    channels_in = groups * depth_in * VEC
    channels_out = groups * depth_out * VEC
    depth_in = depth_in * VEC
    depth_out = depth_out * VEC

    across_i = tl.cdiv(ins, BN)
    across_o = tl.cdiv(outs, BM)
    pid = tl.program_id(0)
    i = (pid % across_i) * BN + tl.arange(0, BN)
    pid = pid // across_i
    o = (pid % across_o) * BM + tl.arange(0, BM)
    pid = pid // across_o
    group = pid % groups
    box = boxes + (pid // groups) * 20
    extent_x = tl.load(box + 2)
    extent_y = 1
    extent_z = 1
    if AXES >= 2:
        extent_y = tl.load(box + 1)
    if AXES == 3:
        extent_z = tl.load(box)
    total = batch * extent_z * extent_y * extent_x
    blocks = tl.cdiv(total, BK)
    begin = (blocks.to(tl.int64) * tl.program_id(1) // tl.num_programs(1)).to(tl.int32) * BK
    end = (blocks.to(tl.int64) * (tl.program_id(1) + 1) // tl.num_programs(1)).to(tl.int32) * BK
    end = tl.minimum(end, total)

    qx = begin + tl.arange(0, BK)
    r = qx // extent_x
    qx = qx % extent_x
    qy = qx
    qz = qx
    plus_x = BK % extent_x
    rest = BK // extent_x
    out = qx
    out_next = plus_x
    if AXES >= 2:
        qy = r % extent_y
        r = r // extent_y
        plus_y = rest % extent_y
        rest = rest // extent_y
        out += qy * out_x
        out_next += plus_y * out_x
    if AXES == 3:
        qz = r % extent_z
        r = r // extent_z
        plus_z = rest % extent_z
        rest = rest // extent_z
        out += qz * (out_y * out_x)
        out_next += plus_z * (out_y * out_x)
    out += r * image_out
    out_next += rest * image_out
    if not SAME:
        at = qx * step_x
        at_next = plus_x * step_x
        at_row = size_x * step_y
        if AXES >= 2:
            at += qy * at_row
            at_next += plus_y * at_row
        if AXES == 3:
            at += qz * (size_y * size_x * step_z)
            at_next += plus_z * (size_y * size_x * step_z)
        at += r * image_in
        at_next += rest * image_in

    ys = dy + tl.load(box + 3).to(tl.int64) * channels_out + group * depth_out
    xs = x + group * depth_in + i[None, :]
    kept_o = o < depth_out
    kept_i = (i < depth_in)[None, :]
    xs_0 = xs + tl.load(box + 7).to(tl.int64) * channels_in
    acc_0 = tl.zeros((BM, BN), tl.float32)
    if SHARE >= 2:
        xs_1 = xs + tl.load(box + 12).to(tl.int64) * channels_in
        acc_1 = tl.zeros((BM, BN), tl.float32)
    if SHARE >= 3:
        xs_2 = xs + tl.load(box + 17).to(tl.int64) * channels_in
        acc_2 = tl.zeros((BM, BN), tl.float32)
    for m in tl.range(begin, end, BK):
        alive = tl.arange(0, BK) < end - m
        far = out.to(tl.int64) if WIDE else out
        if TURNED:
            b = tl.load(
                ys + o[:, None] + (far * channels_out)[None, :], mask=kept_o[:, None] & alive[None, :], other=0.0
            )
        else:
            b = tl.load(
                ys + (far * channels_out)[:, None] + o[None, :], mask=alive[:, None] & kept_o[None, :], other=0.0
            )
            b = b.T
        if not SAME:
            far = at.to(tl.int64) if WIDE else at
        at_c = (far * channels_in)[:, None]
        if SHARE == 1:
            a = tl.load(xs_0 + at_c, mask=alive[:, None] & kept_i, other=0.0)
            acc_0 = tl.dot(b, a, acc_0, input_precision=PRECISION)
        else:
            ok = alive & _reads(box + 4, qx, qy, qz, step_x, step_y, step_z, size_x, size_y, size_z, AXES)
            a = tl.load(xs_0 + at_c, mask=ok[:, None] & kept_i, other=0.0)
            acc_0 = tl.dot(b, a, acc_0, input_precision=PRECISION)
            ok = alive & _reads(box + 9, qx, qy, qz, step_x, step_y, step_z, size_x, size_y, size_z, AXES)
            a = tl.load(xs_1 + at_c, mask=ok[:, None] & kept_i, other=0.0)
            acc_1 = tl.dot(b, a, acc_1, input_precision=PRECISION)
        if SHARE >= 3:
            ok = alive & _reads(box + 14, qx, qy, qz, step_x, step_y, step_z, size_x, size_y, size_z, AXES)
            a = tl.load(xs_2 + at_c, mask=ok[:, None] & kept_i, other=0.0)
            acc_2 = tl.dot(b, a, acc_2, input_precision=PRECISION)

        out += out_next
        qx += plus_x
        carry = qx >= extent_x
        qx = tl.where(carry, qx - extent_x, qx)
        if not SAME:
            at += at_next
        if AXES == 1:
            out += tl.where(carry, image_out - extent_x, 0)
            if not SAME:
                at += tl.where(carry, image_in - extent_x * step_x, 0)
        if AXES >= 2:
            out += tl.where(carry, out_x - extent_x, 0)
            if not SAME:
                at += tl.where(carry, at_row - extent_x * step_x, 0)
            qy += plus_y + carry.to(tl.int32)
            carry = qy >= extent_y
            qy = tl.where(carry, qy - extent_y, qy)
        if AXES == 2:
            out += tl.where(carry, image_out - extent_y * out_x, 0)
            if not SAME:
                at += tl.where(carry, image_in - extent_y * at_row, 0)
        if AXES == 3:
            out += tl.where(carry, (out_y - extent_y) * out_x, 0)
            if not SAME:
                at += tl.where(carry, size_y * size_x * step_z - extent_y * at_row, 0)
            qz += plus_z + carry.to(tl.int32)
            carry = qz >= extent_z
            qz = tl.where(carry, qz - extent_z, qz)
            out += tl.where(carry, image_out - extent_z * (out_y * out_x), 0)
            if not SAME:
                at += tl.where(carry, image_in - extent_z * (size_y * size_x * step_z), 0)

    rows = parts + tl.program_id(1).to(tl.int64) * parts_pitch * VEC
    rows += (group * outs + o).to(tl.int64)[:, None] * depth_in + i[None, :]
    slot_pitch = (groups * outs).to(tl.int64) * depth_in
    kept = (o < outs)[:, None] & (i < depth_in)[None, :]
    tl.store(rows + tl.load(box + 8) * slot_pitch, acc_0, mask=kept)
    if SHARE >= 2:
        slot = tl.load(box + 13)
        tl.store(rows + slot * slot_pitch, acc_1, mask=kept & (slot >= 0))
    if SHARE >= 3:
        slot = tl.load(box + 18)
        tl.store(rows + slot * slot_pitch, acc_2, mask=kept & (slot >= 0))


@triton.jit(do_not_specialize=("rows", "ins", "wide", "tap_count", "alive", "parts_count"))
def sum_weights(
    parts, dw, slots, rows, ins, wide, tap_count, alive, parts_count, BR: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """``dw[o, i, t] = sum_s parts[s, slots[t], o, i]``, in the order of s; taps without a slot are zero.

    ``parts [S, alive, C_out, wide]`` float32 with the first ``ins`` of a row in use, ``rows = C_out * wide``;
    ``dw [C_out, ins, T]``. Read along i, written along t: BR pairs of channels by BT taps a program.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    i = r % wide
    kept = ((r < rows) & (i < ins))[:, None] & (t < tap_count)[None, :]
    slot = tl.load(slots + t, mask=t < tap_count, other=-1)
    at = parts + slot.to(tl.int64)[None, :] * rows + r[:, None]
    acc = tl.zeros((BR, BT), tl.float32)
    for _ in range(parts_count):
        acc += tl.load(at, mask=kept & (slot >= 0)[None, :], other=0.0)
        at += rows.to(tl.int64) * alive
    pair = (r // wide) * ins + i
    tl.store(dw + pair.to(tl.int64)[:, None] * tap_count + t[None, :], acc.to(dw.dtype.element_ty), mask=kept)
