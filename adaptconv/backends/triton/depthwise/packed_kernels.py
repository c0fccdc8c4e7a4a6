"""Kernels on packed rows: the operand is copied once with its zeros, then convolved or correlated strip by strip.

Packed, the loops have no bounds to check, and every load is sixteen bytes at an aligned place. A thread computes eight
neighbours of a row (a strip): it reads the two or three strips that a group of 8 or 16 neighbouring taps touches,
widens each value once and shifts in registers, at no cost, because every shift is known when the kernel is compiled.
Counted on sm_90: 1.4 instructions a multiply-add, where a load for each takes 4 at least (a multiprocessor starts
one load a cycle, and four multiply-adds).

Sums are in float32 and in a fixed order; extents are run-time values, so that one compiled kernel serves many shapes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adaptconv.backends.triton.depthwise.kernels import first_of, second_of


@triton.jit
def four(v, N: tl.constexpr):
    """[N, 4] as four [N]: a renaming of registers, in the order that splitting in two gives."""
    even, odd = tl.split(tl.reshape(v, (N, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    return v0, v1, v2, v3


@triton.jit
def eight(at, there, MASKED: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr):
    """The strips at pointers [N, 4] as eight float32 [N]; half precision comes as words of two.

    A thread loads four words of its own at once; [N, 8] of float32 would be dealt out to two threads a strip.
    """
    if MASKED:
        v = four(tl.load(at, mask=there[:, None], other=0), N)
    else:
        v = four(tl.load(at), N)
    if KIND == "fp32":
        if MASKED:
            return v + four(tl.load(at + 4, mask=there[:, None], other=0), N)
        else:
            return v + four(tl.load(at + 4), N)
    else:
        return (
            first_of(v[0], KIND), second_of(v[0], KIND), first_of(v[1], KIND), second_of(v[1], KIND),
            first_of(v[2], KIND), second_of(v[2], KIND), first_of(v[3], KIND), second_of(v[3], KIND),
        )  # fmt: skip


@triton.jit
def strips(at, V: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr):
    """V neighbouring strips as 8 * V float32 [N]."""
    WORDS: tl.constexpr = 8 if KIND == "fp32" else 4
    xs = eight(at, at, False, KIND, N)
    for v in tl.static_range(1, V):
        xs = xs + eight(at + v * WORDS, at, False, KIND, N)
    return xs


@triton.jit
def strip_of(a, N: tl.constexpr):
    """Eight [N] as [N, 8]: the inverse of ``eight``."""
    even = tl.join(tl.join(a[0], a[4]), tl.join(a[2], a[6]))
    odd = tl.join(tl.join(a[1], a[5]), tl.join(a[3], a[7]))
    return tl.reshape(tl.join(even, odd), (N, 8))


@triton.jit
def plus(acc, w, xs, m: tl.constexpr):
    """One tap on a strip: acc[p] + w * xs[m + p]."""
    return (
        acc[0] + w * xs[m], acc[1] + w * xs[m + 1], acc[2] + w * xs[m + 2], acc[3] + w * xs[m + 3],
        acc[4] + w * xs[m + 4], acc[5] + w * xs[m + 5], acc[6] + w * xs[m + 6], acc[7] + w * xs[m + 7],
    )  # fmt: skip


@triton.jit(do_not_specialize=[
    "C", "D", "H", "W", "rows", "Hp", "Q", "J", "oz", "oy", "ox", "planes", "xsn", "xsc", "xsz", "xsy", "xsx",
])  # fmt: skip
def pack(
    x, xp, C, D, H, W, rows, Hp, Q, J, oz, oy, ox, planes, xsn, xsc, xsz, xsy, xsx,
    LAST: tl.constexpr, DEEP: tl.constexpr, PHASED: tl.constexpr, LONG: tl.constexpr, V: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """xp[c, n, z, y, r, j] = x[n, c, z + oz, y + oy, j * Q + r + ox], zeros outside; 8 * J places j a phase.

    A program copies A rows of one channel, B places of each; LAST, A channels, B places of one row, so that the loads
    run along channels and the stores along places. DEEP: planes is not 1;
    PHASED: Q is not 1. ``rows`` is N * planes * Hp; C and the strides of x count vectors of V.
    """
    C = C * V
    pitch = Q * J * 8
    blocks = tl.cdiv(pitch, B)
    pid = tl.program_id(0)
    f = (pid % blocks) * B + tl.arange(0, B)
    rest = pid // blocks
    if LAST:
        row = rest % rows + tl.zeros((1,), tl.int32)
        c = (rest // rows) * A + tl.arange(0, A)
    else:
        groups = tl.cdiv(rows, A)
        row = (rest % groups) * A + tl.arange(0, A)
        c = rest // groups + tl.zeros((1,), tl.int32)
    iy = row % Hp + oy
    n = row // Hp
    iz = oz + tl.zeros((1,), tl.int32)  # a tensor even where a number would do: some interpreters compare no numbers
    if DEEP:
        iz = n % planes + oz
        n = n // planes
    ix = f + ox
    if PHASED:
        r = f // (J * 8)
        ix = (f - r * (J * 8)) * Q + r + ox
    some = (iy.to(tl.uint32, bitcast=True) < H.to(tl.uint32)) & (iz.to(tl.uint32, bitcast=True) < D.to(tl.uint32))
    some = some & (row < rows) & (c < C)
    near = (ix.to(tl.uint32, bitcast=True) < W.to(tl.uint32)) & (f < pitch)
    if LONG:
        n = n.to(tl.int64)
        c = c.to(tl.int64)
        iz = iz.to(tl.int64)
        iy = iy.to(tl.int64)
        ix = ix.to(tl.int64)
    start = (n * xsn + iz * xsz + iy * xsy) * V
    to = c * rows + row
    if LAST:
        start = start + c
    else:
        start = start + c * xsc * V
    v = tl.load(x + (start[:, None] + (ix * xsx * V)[None, :]), mask=some[:, None] & near[None, :], other=0.0)
    to = xp + ((to * (Q * J))[:, None] * 8 + f[None, :])
    tl.store(to, v, mask=((row < rows) & (c < C))[:, None] & (f < pitch)[None, :])


@triton.jit(do_not_specialize=[
    "N", "D", "H", "W", "rows", "Hp", "Wp", "oz", "oy", "ox", "planes", "xsn", "xsc", "xsz", "xsy", "xsx",
])  # fmt: skip
def pack_images(
    x, xp, N, D, H, W, rows, Hp, Wp, oz, oy, ox, planes, xsn, xsc, xsz, xsy, xsx,
    LONG: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """xp[c, n, z, y, x, i] = x[8 * n + i, c, z + oz, y + oy, x + ox] for eight images i, zeros outside.

    A program copies B places of a row of eight images: it loads along the row and stores strips. ``rows`` is
    ceil(N / 8) * planes * Hp.
    """
    blocks = tl.cdiv(Wp, B)
    pid = tl.program_id(0)
    f = (pid % blocks) * B + tl.arange(0, B)
    row = (pid // blocks) % rows + tl.zeros((1,), tl.int32)  # as in pack
    c = pid // blocks // rows
    iy = row % Hp + oy
    iz = (row // Hp) % planes + oz
    n = row // (Hp * planes) * 8 + tl.arange(0, 8)
    ix = f + ox
    near = (ix.to(tl.uint32, bitcast=True) < W.to(tl.uint32)) & (iy >= 0) & (iy < H) & (iz >= 0) & (iz < D)
    if LONG:
        n = n.to(tl.int64)
        c = c.to(tl.int64)
        iz = iz.to(tl.int64)
        iy = iy.to(tl.int64)
        ix = ix.to(tl.int64)
    at = (c * xsc + iz * xsz + iy * xsy) + ((ix * xsx)[:, None] + (n * xsn)[None, :])
    v = tl.load(x + at, mask=near[:, None] & (n < N)[None, :], other=0.0)
    to = xp + (((c * rows + row) * Wp + f)[:, None] * 8 + tl.arange(0, 8)[None, :])
    tl.store(to, v, mask=(f < Wp)[:, None])


@triton.jit(do_not_specialize=["L", "volume", "taps", "M", "ysc", "ysp"])
def convolve_packed(
    xp, w, bias, y, places, table, L, volume, taps, M, ysc, ysp,
    ADJOINT: tl.constexpr, HAS_BIAS: tl.constexpr, UNIT: tl.constexpr, KIND: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A pass over packed rows. xp [C_read, volume, 8], w [C_weight, taps] float32; a program: B strips of a channel.

    places [2, L] int64: of each strip of a channel's results, the packed strip it starts at, and where it goes in y
    times 16 plus how many of its eight exist. table: ``Packing.table``. Channel c reads channel c // M; ADJOINT, the
    M channels from c * M on, each with its own weights.
    """
    WORDS: tl.constexpr = 8 if KIND == "fp32" else 4
    blocks = tl.cdiv(L, B)
    pid = tl.program_id(0)
    c = pid // blocks
    strip = (pid % blocks) * B + tl.arange(0, B)
    there = strip < L
    from_ = tl.load(places + strip, mask=there, other=0)
    zero = tl.zeros((B,), tl.float32)
    if HAS_BIAS:
        zero += tl.load(bias + c).to(tl.float32)
    acc = (zero, zero, zero, zero, zero, zero, zero, zero)
    wide = tl.load(table)
    narrow = tl.load(table + 1)
    if ADJOINT:
        reads = M
    else:
        reads = 1
    for j in range(reads):
        if ADJOINT:
            read = c * M + j
            wp = w + read.to(tl.int64) * taps
        else:
            read = c // M
            wp = w + c.to(tl.int64) * taps
        base = xp + (read.to(tl.int64) * volume + from_)[:, None] * WORDS + tl.arange(0, 4)[None, :]
        for i in range(wide):
            at = base + tl.load(table + 10 + i) * WORDS
            xs = strips(at, 3, KIND, B)
            for m in tl.static_range(16):
                acc = plus(acc, tl.load(wp + m), xs, m)
            wp += 16
        for i in range(wide, narrow):
            at = base + tl.load(table + 10 + i) * WORDS
            xs = strips(at, 2, KIND, B)
            for m in tl.static_range(8):
                acc = plus(acc, tl.load(wp + m), xs, m)
            wp += 8
        for m in tl.static_range(8):
            for i in range(tl.load(table + 1 + m), tl.load(table + 2 + m)):
                at = base + tl.load(table + 10 + i) * WORDS
                if m > 0:
                    xs = strips(at, 2, KIND, B)
                else:
                    xs = strips(at, 1, KIND, B)
                acc = plus(acc, tl.load(wp), xs, m)
                wp += 1
    code = tl.load(places + L + strip, mask=there, other=0)
    to = y + c.to(tl.int64) * ysc + (code >> 4)
    exist = (code & 15).to(tl.int32)
    if UNIT:
        p = tl.arange(0, 8)[None, :]
        tl.store(to[:, None] + p, strip_of(acc, B).to(y.dtype.element_ty), mask=p < exist[:, None])
    else:
        for i in tl.static_range(8):
            tl.store(to + i * ysp.to(tl.int64), acc[i].to(y.dtype.element_ty), mask=exist > i)


@triton.jit(do_not_specialize=["L", "C", "volume", "groups", "splits", "M"])
def correlate_packed(
    xp, dyp, part, places, table, L, C, volume, groups, splits, M,
    KIND: tl.constexpr, B: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Sums over places of dy times x, packed alike. part [splits, C, groups * R, 8 * (V - 1) or 1] float32.

    A program adds up, for one channel c of dy [C, L, 8] and channel c // M of xp, the R groups of 8 * (V - 1)
    neighbouring taps (single ones if V is 1) whose strip offsets are in table [groups * R], over every ``splits``-th
    block of B strips: dy is read once for all of them, and each thread keeps its own sums until the end.
    """
    COLUMNS: tl.constexpr = 8 * (V - 1) if V > 1 else 1
    pid = tl.program_id(0)
    group = pid % groups
    split = (pid // groups) % splits
    c = pid // (groups * splits)
    WORDS: tl.constexpr = 8 if KIND == "fp32" else 4
    word = tl.arange(0, 4)[None, :]
    lane = tl.arange(0, B)
    xb = xp + (c // M).to(tl.int64) * volume * WORDS + word
    db = dyp + c.to(tl.int64) * L * WORDS + word
    zero = tl.zeros((B,), tl.float32)
    acc = (zero,)
    for k in tl.static_range(1, COLUMNS * R):
        acc = acc + (zero,)
    for block in range(split, tl.cdiv(L, B), splits):
        strip = block * B + lane
        there = strip < L
        from_ = tl.load(places + strip, mask=there, other=0)
        d = eight(db + strip.to(tl.int64)[:, None] * WORDS, there, True, KIND, B)
        base = xb + from_[:, None] * WORDS
        new = acc
        for r in tl.static_range(R):
            at = base + tl.load(table + group * R + r) * WORDS
            xs = strips(at, V, KIND, B)
            for m in tl.static_range(COLUMNS):
                s = acc[r * COLUMNS + m]
                for q in tl.static_range(8):
                    s += d[q] * xs[m + q]
                if r + m == 0:
                    new = (s,)
                else:
                    new = new + (s,)
        acc = new
    to = part + ((split * C + c).to(tl.int64) * groups + group) * (R * COLUMNS)
    for k in tl.static_range(COLUMNS * R):
        tl.store(to + k, tl.sum(acc[k], 0))
