// The gradient of the weight over tiles. Included by taps.cpp alone.

#pragma once

#include <type_traits>

#include "tiles.h"

namespace {

constexpr i64 kFlush = 512;  // additions a lane before its sum is moved to double
constexpr int kRows = 7;     // of the gradient in registers together: maps are multiples of 7 more often than not

// A vector whose lanes past the row's end count as zeros: they must not count as zero times infinity.
#if defined(__AVX512F__)
INLINE Vec<float>::type kept(const float* from, i64 lanes) {
  return (Vec<float>::type)__builtin_ia32_loadups512_mask(from, Vec<float>::type{}, (unsigned short)((1u << lanes) - 1));
}
INLINE Vec<double>::type kept(const double* from, i64 lanes) {
  return (Vec<double>::type)__builtin_ia32_loadupd512_mask(from, Vec<double>::type{}, (unsigned char)((1u << lanes) - 1));
}
#else
template <class A> INLINE typename Vec<A>::type kept(const A* from, i64 lanes) {
  typedef typename Vec<A>::mask mask;
  mask keep;
  for (int i = 0; i < kLanes<A>; i++) keep[i] = i < lanes ? -1 : 0;
  return (typename Vec<A>::type)((mask)(typename Vec<A>::type)*(const typename Vec<A>::loose*)from & keep);
}
#endif

// Moves the lanes of some taps to their sums in double.
template <class A> void flush(typename Vec<A>::type* lanes, i64 taps, double* sums) {
  constexpr int half = kLanes<A> / 2;
  for (i64 k = 0; k < taps; k++) {
    A line[kLanes<A>];
    *(typename Vec<A>::loose*)line = lanes[k];
    double wide[half];
    for (int i = 0; i < half; i++) wide[i] = double(line[i]) + double(line[i + half]);
    for (int n = half / 2; n > 0; n /= 2)
      for (int i = 0; i < n; i++) wide[i] += wide[i + n];
    sums[k] += wide[0];
    lanes[k] = typename Vec<A>::type{};
  }
}

// Adds to lanes[k] what K taps see: the dot products of the gradient's rows with the input's, shifted.
template <class A, int K>
void correlate(const A* x, const A* dy, const i64* at, i64 rows, i64 x_row, i64 dy_row, i64 columns,
               typename Vec<A>::type* lanes) {
  typedef typename Vec<A>::type vec;
  typedef typename Vec<A>::loose loose;
  constexpr int L = kLanes<A>;
  const i64 whole = columns / L * L, rest = columns - whole;
  i64 from[K];
  for (int k = 0; k < K; k++) from[k] = at[k];
  vec part[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) part[k] = lanes[k];
  for (i64 r = 0; r < rows; r++) {
    const A *xr = x + r * x_row, *dyr = dy + r * dy_row;
    for (i64 c = 0; c < whole; c += L) {
      const vec g = *(const loose*)(dyr + c);
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) part[k] += g * (vec)*(const loose*)(xr + from[k] + c);
    }
    if (rest) {
      const vec g = *(const loose*)(dyr + whole);
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) part[k] += g * kept(xr + from[k] + whole, rest);
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) lanes[k] = part[k];
}

// The same for C columns of K taps, one above the other, as far apart as the rows of a block: a loaded row of the input
// meets every row of the gradient in the block that some tap pairs it with, and the columns share those. A column's
// first place is `at`, the next one's K places on.
template <class A, int K, int C>
void correlate_run(const A* x, const A* dy, const i64* at, i64 rows, i64 step, i64 x_row, i64 dy_row, i64 columns,
                   typename Vec<A>::type* lanes) {
  typedef typename Vec<A>::type vec;
  typedef typename Vec<A>::loose loose;
  constexpr int L = kLanes<A>;
  const i64 apart = step * x_row, between = step * dy_row;
  i64 beside[C];
  for (int q = 1; q < C; q++) beside[q] = at[q * K] - at[0];
  x += at[0];
  vec part[C][K];
#pragma GCC unroll 16
  for (int k = 0; k < C * K; k++) part[k / K][k % K] = lanes[k];
  const auto meet = [&](auto count, const A* from, const A* grads, auto&& seen) INLINE_LAMBDA {  // a block's column
    constexpr int N = decltype(count)::value;
    vec g[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; i++, grads += between) g[i] = *(const loose*)grads;
#pragma GCC unroll 16
    for (int r = 0; r < K + N - 1; r++, from += apart) {
#pragma GCC unroll 4
      for (int q = 0; q < C; q++) {
        const vec here = seen(q ? from + beside[q] : from);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++)
          if (r - i >= 0 && r - i < K) part[q][r - i < 0 ? 0 : r - i >= K ? 0 : r - i] += g[i] * here;
      }
    }
  };
  const auto all = [](const A* from) INLINE_LAMBDA -> vec { return *(const loose*)from; };
  const i64 whole = columns / L * L, rest = columns - whole;
  const auto some = [rest](const A* from) INLINE_LAMBDA -> vec { return kept(from, rest); };
  for (i64 p = 0; p < least(step, rows); p++) {
    i64 h = p;
    const auto blocks = [&](auto count) INLINE_LAMBDA {
      for (; h + (count - 1) * step < rows; h += count * step) {
        const A *from = x + h * x_row, *grads = dy + h * dy_row;
        for (i64 c = 0; c < whole; c += L) meet(count, from + c, grads + c, all);
        if (rest) meet(count, from + whole, grads + whole, some);
      }
    };
    blocks(std::integral_constant<int, kRows>());
    blocks(std::integral_constant<int, 1>());
  }
#pragma GCC unroll 16
  for (int k = 0; k < C * K; k++) lanes[k] = part[k / K][k % K];
}

// Columns of so many taps to take together. Three sums alone wait for each other; with more than three taps a column
// it gains little where rows are wide and loses where they are narrow.
constexpr i64 together(i64 taps) { return taps == 3 && kBytes == 64 ? 3 : 1; }

template <class A, int K, int C> struct Columns {
  static INLINE void run(i64 count, const A* x, const A* dy, const i64* at, i64 rows, i64 step, i64 x_row, i64 dy_row,
                         i64 columns, typename Vec<A>::type* lanes) {
    if (count == C) correlate_run<A, K, C>(x, dy, at, rows, step, x_row, dy_row, columns, lanes);
    else Columns<A, K, C - 1>::run(count, x, dy, at, rows, step, x_row, dy_row, columns, lanes);
  }
};
template <class A, int K> struct Columns<A, K, 0> {
  static INLINE void run(i64, const A*, const A*, const i64*, i64, i64, i64, i64, i64, typename Vec<A>::type*) {}
};

template <class A, int K> struct Runs {
  static INLINE void run(i64 length, i64 count, const A* x, const A* dy, const i64* at, i64 rows, i64 step, i64 x_row,
                         i64 dy_row, i64 columns, typename Vec<A>::type* lanes) {
    if (length == K)
      Columns<A, K, together(K)>::run(count, x, dy, at, rows, step, x_row, dy_row, columns, lanes);
    else Runs<A, K - 1>::run(length, count, x, dy, at, rows, step, x_row, dy_row, columns, lanes);
  }
};
template <class A> struct Runs<A, 2> {
  static INLINE void run(i64, i64, const A*, const A*, const i64*, i64, i64, i64, i64, i64, typename Vec<A>::type*) {}
};

// What the rows of one tile are correlated from, and into.
template <class A> struct Rows {
  const A *x, *dy;
  i64 dy_row, x_row;
  const i64* places;
  typename Vec<A>::type* lanes;
};

// All taps over the rows top to bottom of the gradient in plane d of a tile. Rows that meet no row of the input through
// any tap of a group are left out, and with them most of a small map under a large window.
template <class A>
void tile_rows(const Spec& s, const Shape& b, const Tile& t, const i64* steps, const Rows<A>& of, i64 d, i64 top,
               i64 bottom) {
  const i64* lengths = steps + s.taps * 3;  // of the runs, whose taps come first
  const A* xs = of.x + d * s.stride[0] * b.plane;
  const A* dys = of.dy + d * s.tile[1] * of.dy_row;
  const i64 z0 = (t.from[0] + d) * s.stride[0] - s.before[0], y0 = t.from[1] * s.stride[1] - s.before[1];
  const auto first_at = [&](i64 y) {  // the first row that reaches input row `y` or one below it
    return y <= 0 ? 0 : s.stride[1] == 1 ? y : (y + s.stride[1] - 1) / s.stride[1];  // a division takes a while
  };
  i64 k = 0;
  if constexpr (sizeof(A) == 4) {  // float64 goes without, for the sake of the time to compile
    for (i64 r = 0, count = 1; r < s.steps; k += count * lengths[r], r += count) {
      const i64 *at = steps + k * 3, length = lengths[r], y = y0 + at[1], reach = (length - 1) * s.step * s.stride[1];
      const auto beside = [&](i64 q) {  // whether run r + q stands beside run r
        const i64* other = at + q * length * 3;
        return r + q < s.steps && lengths[r + q] == length && other[0] == at[0] && other[1] == at[1];
      };
      for (count = 1; count < together(length) && beside(count);) count++;
      if (z0 + at[0] < 0 || z0 + at[0] >= s.size[0]) continue;
      const i64 from = most(top, first_at(-y - reach)), end = least(bottom, first_at(s.size[1] - y));
      if (from < end)
        Runs<A, kTaps>::run(length, count, xs + from * of.x_row, dys + from * of.dy_row, of.places + k, end - from,
                            s.step, of.x_row, of.dy_row, t.count[2], of.lanes + k);
    }
  }
  const auto several = [&](auto count) {
    constexpr int K = decltype(count)::value;
    i64 low = steps[k * 3 + 1], high = low, inside = 0;
    for (i64 i = k; i < k + K; i++) {
      low = least(low, steps[i * 3 + 1]), high = most(high, steps[i * 3 + 1]);
      inside += z0 + steps[i * 3] >= 0 && z0 + steps[i * 3] < s.size[0];
    }
    const i64 from = most(top, first_at(-y0 - high)), end = least(bottom, first_at(s.size[1] - y0 - low));
    if (inside && from < end)
      correlate<A, K>(xs + from * of.x_row, dys + from * of.dy_row, of.places + k, end - from, of.x_row, of.dy_row,
                      t.count[2], of.lanes + k);
    k += K;
  };
  while (k + kTaps <= s.taps) several(std::integral_constant<int, kTaps>());
  while (k + 4 <= s.taps) several(std::integral_constant<int, 4>());
  if (k + 3 == s.taps) several(std::integral_constant<int, 3>());
  while (k < s.taps) several(std::integral_constant<int, 1>());
}

// A job is some output channels of a group over a part of the images and tiles, with all inputs of the group.
template <class S, class A> void grad_weight(Call& call) {
  const Spec& s = *call.spec;
  const Shape b = shape_of<A>(s);
  constexpr i64 L = kLanes<A>;
  const i64 channels = s.groups * s.outs, inputs = s.groups * s.ins, pairs = s.abreast * s.ins;
  const i64 tiles = b.tiles[0] * b.tiles[1] * b.tiles[2];
  const i64 pixels = s.size[0] * s.size[1] * s.size[2], outs = s.out[0] * s.out[1] * s.out[2];
  const i64 dy_row = (s.tile[2] + L - 1) / L * L, dy_volume = dy_row * s.tile[0] * s.tile[1];
  A* x = room<A>(b.total);
  A* dy = room<A>(dy_volume * s.abreast + L);
  i64* places = room<i64>(s.taps);
  auto* lanes = (typename Vec<A>::type*)room<A>(pairs * s.taps * L);
  const i64 block = kRows * s.step, vectors = (s.tile[2] + L - 1) / L;
  const i64 chunk = most(block, kFlush / vectors / block * block);
  if (x && dy && places && lanes) {
    memset((void*)lanes, 0, size_t(pairs * s.taps * L) * sizeof(A));
    memset(x, 0, size_t(b.total) * sizeof(A));
    memset(dy, 0, size_t(dy_volume * s.abreast + L) * sizeof(A));
    for (i64 k = 0; k < s.taps; k++) places[k] = place(s, b, call.steps + k * 3);
    const i64 work = s.batch * tiles, total = channels / s.abreast * s.parts;
    i64 filled = -1;
    for (i64 job; (job = call.next.fetch_add(1)) < total;) {
      const i64 o = job / s.parts * s.abreast, first = o / s.outs * s.ins, part = job % s.parts;
      const auto sums_of = [&](i64 pair) { return (double*)call.y + ((o * s.ins + pair) * s.parts + part) * s.taps; };
      for (i64 pair = 0; pair < pairs; pair++) {
        double* sums = sums_of(pair);
        for (i64 k = 0; k < s.taps; k++) sums[k] = 0;
      }
      const auto flush_all = [&] {
        for (i64 pair = 0; pair < pairs; pair++) flush<A>(lanes + pair * s.taps, s.taps, sums_of(pair));
      };
      i64 pending = 0;  // additions a lane since the last flush
      for (i64 i = work * part / s.parts; i < work * (part + 1) / s.parts; i++) {
        const i64 n = i / tiles;
        const Tile t = tile_of(s, b, i % tiles);
        for (i64 j = 0; j < s.ins; j++)
          fill<S, A>(s, b, t, (const S*)call.a + (n * inputs + first + j) * pixels, x + j * b.volume,
                     i % tiles == filled);
        filled = i % tiles;
        for (i64 q = 0; q < s.abreast; q++) {
          const S* from = (const S*)call.b + (n * channels + o + q) * outs;
          for (i64 d = 0; d < t.count[0]; d++)
            for (i64 h = 0; h < t.count[1]; h++) {
              const S* line = from + ((t.from[0] + d) * s.out[1] + t.from[1] + h) * s.out[2] + t.from[2];
              A* to = dy + q * dy_volume + (d * s.tile[1] + h) * dy_row;
              widen_line(line, t.count[2], to);
              for (i64 c = t.count[2]; c < dy_row; c++) to[c] = A(0);
            }
        }
        if (tiles == 1 && n + 1 < s.batch) {
          announce((const S*)call.a + ((n + 1) * inputs + first) * pixels, s.ins * pixels);
          announce((const S*)call.b + ((n + 1) * channels + o) * outs, s.abreast * outs);
        }
        for (i64 d = 0; d < t.count[0]; d++) {
          for (i64 top = 0; top < t.count[1]; top += chunk) {
            const i64 bottom = least(top + chunk, t.count[1]), additions = (bottom - top) * ((t.count[2] + L - 1) / L);
            if (pending + additions > kFlush) flush_all(), pending = 0;
            pending += additions;
            for (i64 q = 0, pair = 0; q < s.abreast; q++)
              for (i64 j = 0; j < s.ins; j++, pair++) {
                const Rows<A> rows{x + j * b.volume, dy + q * dy_volume,     dy_row,
                                   b.row * s.stride[1], places, lanes + pair * s.taps};
                tile_rows<A>(s, b, t, call.steps, rows, d, top, bottom);
              }
          }
        }
      }
      flush_all();
    }
  } else {
    call.failed = 1;
  }
  free(x), free(dy), free(places), free(lanes);
}

}  // namespace
