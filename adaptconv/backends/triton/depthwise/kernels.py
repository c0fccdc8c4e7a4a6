"""Kernels straight from the operands: nothing is copied and every load is checked.

For few taps, where a copy would cost more than it saves, and for channels_last, where eight channels share one load
and its check. Half precision channels_last comes as words of two channels, which widen by one instruction each. Sums
are in float32 and in a fixed order; extents are run-time values, so that one compiled kernel serves many shapes.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_of(p, nz, ny, nx, AXES: tl.constexpr):
    """The image and the place on three axes of flat places."""
    x = p % nx
    rest = p // nx
    y = p * 0
    z = p * 0
    if AXES > 1:
        y = rest % ny
        rest = rest // ny
    if AXES > 2:
        z = rest % nz
        rest = rest // nz
    return rest, z, y, x


@triton.jit
def inside(tap, z, y, x, D, H, W, AXES: tl.constexpr):
    """Whether places lie in the operand once moved by a tap: one unsigned comparison an axis."""
    ok = (x + tl.load(tap + 2)).to(tl.uint32, bitcast=True) < W.to(tl.uint32)
    if AXES > 1:
        ok = ok & ((y + tl.load(tap + 1)).to(tl.uint32, bitcast=True) < H.to(tl.uint32))
    if AXES > 2:
        ok = ok & ((z + tl.load(tap)).to(tl.uint32, bitcast=True) < D.to(tl.uint32))
    return ok


@triton.jit
def start_of(n, z, y, x, sn, sz, sy, sx, AXES: tl.constexpr, LONG: tl.constexpr):
    """Where places are, in 64 bits only for tensors that need them."""
    if LONG:
        at = n.to(tl.int64) * sn + x * sx
    else:
        at = n * sn + x * sx
    if AXES > 1:
        at += y * sy
    if AXES > 2:
        at += z * sz
    return at


@triton.jit
def first_of(word, KIND: tl.constexpr):
    """The first half-precision value of a word, in float32."""
    if KIND == "bf16":
        return (word << 16).to(tl.float32, bitcast=True)
    else:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def second_of(word, KIND: tl.constexpr):
    """The second one."""
    if KIND == "bf16":
        return (word & -65536).to(tl.float32, bitcast=True)
    else:
        return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=[
    "P", "C", "T", "M", "D", "H", "W", "nz", "ny", "nx", "sz", "sy", "sx", "xsn", "xsc", "xsz", "xsy", "xsx", "ysn",
    "ysc", "ysz", "ysy", "ysx"])  # fmt: skip
def convolve_direct(
    x, w, bias, y, taps, P, C, T, M, D, H, W, nz, ny, nx, sz, sy, sx, xsn, xsc, xsz, xsy, xsx, ysn, ysc, ysz, ysy,
    ysx, AXES: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr, PLAIN: tl.constexpr, ADJOINT: tl.constexpr,
    HAS_BIAS: tl.constexpr, LONG: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A pass straight from the operand: a program sums all taps for BP places of BC channels.

    P places over all images, C * V channels of the result, M results an input channel (PLAIN: one); taps [T, 4] int32:
    three offsets and their distance. LAST: channels are neighbours, and distances, strides and C count vectors of V;
    w is float32 [T, channels], else [channels, T].
    """
    pid = tl.program_id(0)
    C = C * V
    if LAST:
        across = tl.cdiv(C, BC)
        block = pid // across
        c = (pid % across) * BC + tl.arange(0, BC)
    else:
        along = tl.cdiv(P, BP)
        block = pid % along
        c = (pid // along) * BC + tl.arange(0, BC)
    n, oz, oy, ox = place_of(block * BP + tl.arange(0, BP), nz, ny, nx, AXES)
    z = oz * sz
    y_ = oy * sy
    x_ = ox * sx
    real = (block * BP + tl.arange(0, BP) < P)[:, None] & (c < C)[None, :]
    acc = tl.zeros((BP, BC), tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    start = (start_of(n, z, y_, x_, xsn, xsz, xsy, xsx, AXES, LONG) * V)[:, None]
    weights = C
    reads = 1
    if ADJOINT:
        reads = M
        weights = C * M
    for j in range(reads):
        read = c
        of = c
        if not PLAIN:
            if ADJOINT:
                read = c * M + j
                of = read
            else:
                read = c // M
        if LAST:
            at = start + read[None, :]
        elif LONG:
            at = start + (read.to(tl.int64) * xsc)[None, :]
        else:
            at = start + (read * xsc)[None, :]
        for t in range(T):
            tap = taps + 4 * t
            ok = real & inside(tap, z, y_, x_, D, H, W, AXES)[:, None]
            v = tl.load(x + tl.load(tap + 3) * V + at, mask=ok, other=0.0).to(tl.float32)
            if LAST:
                wt = tl.load(w + t * (weights // V).to(tl.int64) * V + of, mask=c < C, other=0.0)
            else:
                wt = tl.load(w + of.to(tl.int64) * T + t, mask=c < C, other=0.0)
            acc += wt[None, :] * v
    to = (start_of(n, oz, oy, ox, ysn, ysz, ysy, ysx, AXES, LONG) * V)[:, None]
    if LAST:
        to = to + c[None, :]
    elif LONG:
        to = to + (c.to(tl.int64) * ysc)[None, :]
    else:
        to = to + (c * ysc)[None, :]
    tl.store(y + to, acc.to(y.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=[
    "P", "C", "T", "D", "H", "W", "nz", "ny", "nx", "sz", "sy", "sx", "xsn", "xsz", "xsy", "xsx", "ysn", "ysz", "ysy",
    "ysx"])  # fmt: skip
def convolve_pairs(
    x, w, bias, y, taps, P, C, T, D, H, W, nz, ny, nx, sz, sy, sx, xsn, xsz, xsy, xsx, ysn, ysz, ysy, ysx,
    KIND: tl.constexpr, AXES: tl.constexpr, V: tl.constexpr, HAS_BIAS: tl.constexpr, LONG: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``convolve_direct`` for half precision channels_last, LAST and PLAIN, in words of two channels.

    C * V words of the result and BC a program; x is int32, and distances, strides and C count vectors of V words;
    w is float32 [T, 2, words], the even channels and the odd ones.
    """
    pid = tl.program_id(0)
    C = C * V
    across = tl.cdiv(C, BC)
    block = pid // across
    c = (pid % across) * BC + tl.arange(0, BC)
    n, oz, oy, ox = place_of(block * BP + tl.arange(0, BP), nz, ny, nx, AXES)
    z = oz * sz
    y_ = oy * sy
    x_ = ox * sx
    real = (block * BP + tl.arange(0, BP) < P)[:, None] & (c < C)[None, :]
    even = tl.zeros((BP, BC), tl.float32)
    odd = tl.zeros((BP, BC), tl.float32)
    if HAS_BIAS:
        even += tl.load(bias + 2 * c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        odd += tl.load(bias + 2 * c + 1, mask=c < C, other=0.0).to(tl.float32)[None, :]
    at = (start_of(n, z, y_, x_, xsn, xsz, xsy, xsx, AXES, LONG) * V)[:, None] + c[None, :]
    wp = w + c
    for t in range(T):
        tap = taps + 4 * t
        ok = real & inside(tap, z, y_, x_, D, H, W, AXES)[:, None]
        word = tl.load(x + tl.load(tap + 3) * V + at, mask=ok, other=0)
        even += tl.load(wp, mask=c < C, other=0.0)[None, :] * first_of(word, KIND)
        odd += tl.load(wp + C, mask=c < C, other=0.0)[None, :] * second_of(word, KIND)
        wp += 2 * C
    result = tl.reshape(tl.join(even, odd), (BP, 2 * BC)).to(y.dtype.element_ty)
    c = (pid % across) * (2 * BC) + tl.arange(0, 2 * BC)
    to = (start_of(n, oz, oy, ox, ysn, ysz, ysy, ysx, AXES, LONG) * (2 * V))[:, None] + c[None, :]
    tl.store(y + to, result, mask=(block * BP + tl.arange(0, BP) < P)[:, None] & (c < 2 * C)[None, :])


@triton.jit(do_not_specialize=[
    "P", "C", "T", "M", "splits", "D", "H", "W", "nz", "ny", "nx", "sz", "sy", "sx", "xsn", "xsc", "xsz", "xsy", "xsx",
    "ysn", "ysc", "ysz", "ysy", "ysx"])  # fmt: skip
def correlate_direct(
    x, dy, part, taps, P, C, T, M, splits, D, H, W, nz, ny, nx, sz, sy, sx, xsn, xsc, xsz, xsy, xsx, ysn, ysc, ysz,
    ysy, ysx, KIND: tl.constexpr, AXES: tl.constexpr, LAST: tl.constexpr, V: tl.constexpr, PLAIN: tl.constexpr,
    PAIRS: tl.constexpr, LONG: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """part[split, t, c] float32: sums of dy times x at BT taps from one read of dy, for BC channels of dy.

    taps [T, 4] int32, T a multiple of BT. PAIRS: x, dy, C, V and BC are words of two channels. Places are counted on
    from block to block, without divisions.
    """
    C = C * V
    across = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    first = pid % (T // BT) * BT
    rest = pid // (T // BT)
    c = (rest % across) * BC + tl.arange(0, BC)
    split = rest // across
    read = c
    if not PLAIN:
        read = c // M
    if LAST:
        xc = read[None, :]
        dc = c[None, :]
    elif LONG:
        xc = (read.to(tl.int64) * xsc)[None, :]
        dc = (c.to(tl.int64) * ysc)[None, :]
    else:
        xc = (read * xsc)[None, :]
        dc = (c * ysc)[None, :]
    p = split * BP + tl.arange(0, BP)
    n, oz, oy, ox = place_of(p, nz, ny, nx, AXES)
    jn, jz, jy, jx = place_of(splits * BP, nz, ny, nx, AXES)
    COUNT: tl.constexpr = 2 * BT if PAIRS else BT
    zero = tl.zeros((BP, BC), tl.float32)
    acc = (zero,)
    for _ in tl.static_range(1, COUNT):
        acc = acc + (zero,)
    for _ in range(split, tl.cdiv(P, BP), splits):
        real = (p < P)[:, None] & (c < C)[None, :]
        at = (start_of(n, oz, oy, ox, ysn, ysz, ysy, ysx, AXES, LONG) * V)[:, None] + dc
        d = tl.load(dy + at, mask=real, other=0)
        z = oz * sz
        y_ = oy * sy
        x_ = ox * sx
        at = (start_of(n, z, y_, x_, xsn, xsz, xsy, xsx, AXES, LONG) * V)[:, None] + xc
        new = acc
        for k in tl.static_range(BT):
            tap = taps + 4 * (first + k)
            ok = real & inside(tap, z, y_, x_, D, H, W, AXES)[:, None]
            v = tl.load(x + tl.load(tap + 3) * V + at, mask=ok, other=0)
            if PAIRS:
                s = (acc[2 * k] + first_of(d, KIND) * first_of(v, KIND),)
                s = s + (acc[2 * k + 1] + second_of(d, KIND) * second_of(v, KIND),)
            else:
                s = (acc[k] + d.to(tl.float32) * v.to(tl.float32),)
            if k == 0:
                new = s
            else:
                new = new + s
        acc = new
        p += splits * BP
        ox += jx
        carry = (ox >= nx).to(tl.int32)
        ox -= carry * nx
        if AXES > 1:
            oy += jy + carry
            carry = (oy >= ny).to(tl.int32)
            oy -= carry * ny
        if AXES > 2:
            oz += jz + carry
            carry = (oz >= nz).to(tl.int32)
            oz -= carry * nz
        n += jn + carry
    for k in tl.static_range(BT):
        if PAIRS:
            to = part + (split.to(tl.int64) * T + first + k) * C * 2 + 2 * c
            tl.store(to, tl.sum(acc[2 * k], 0), mask=c < C)
            tl.store(to + 1, tl.sum(acc[2 * k + 1], 0), mask=c < C)
        else:
            to = part + (split.to(tl.int64) * T + first + k) * C + c
            tl.store(to, tl.sum(acc[k], 0), mask=c < C)
