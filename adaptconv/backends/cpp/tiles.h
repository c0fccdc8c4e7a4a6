// What the caller says, and the part of the input that a tile reads. Included by taps.cpp alone.

#pragma once

#include <atomic>
#include <cstdlib>

#include "numbers.h"

namespace {

struct Spec {  // as the caller fills it, in this order
  i64 direction, dtype, batch, groups, ins, outs;
  i64 size[3], out[3], stride[3], before[3], window[3], tile[3];
  i64 taps, rows, step, steps, parts, abreast, threads;
};

// What one tile of the input looks like in the buffer.
struct Shape {
  i64 phase, row, plane, volume, total, tiles[3];  // in elements
};

template <class A> Shape shape_of(const Spec& s) {
  Shape b;
  const i64 lanes = kLanes<A>;
  i64 width = s.tile[2] + (s.window[2] - 1) / s.stride[2];
  b.phase = (width + lanes - 1) / lanes * lanes;
  b.row = b.phase * s.stride[2];
  if (b.row * i64(sizeof(A)) % 1024 == 0) b.row += lanes;  // rows of a power of two share their cache sets
  b.plane = b.row * ((s.tile[1] - 1) * s.stride[1] + s.window[1]);
  b.volume = b.plane * ((s.tile[0] - 1) * s.stride[0] + s.window[0]);
  i64 beyond = b.row * (s.rows / s.abreast - 1) * s.step * s.stride[1] + lanes * (kAlone + 1) + s.tile[2];
  b.total = b.volume * s.ins + beyond;
  for (int i = 0; i < 3; i++) b.tiles[i] = (s.out[i] + s.tile[i] - 1) / s.tile[i];
  return b;
}

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }

struct Tile { i64 from[3], count[3]; };

Tile tile_of(const Spec& s, const Shape& b, i64 index) {
  Tile t;
  for (int i = 2; i >= 0; i--) {
    t.from[i] = index % b.tiles[i] * s.tile[i];
    t.count[i] = least(s.tile[i], s.out[i] - t.from[i]);
    index /= b.tiles[i];
  }
  return t;
}

// Copies what a tile reads of one plane; places outside the input become zero. With `again` they are zero already:
// the buffer last held the same tile of another plane.
template <class S, class A> void fill(const Spec& s, const Shape& b, const Tile& t, const S* x, A* to, bool again) {
  i64 first[3], need[3];
  for (int i = 0; i < 3; i++) {
    first[i] = t.from[i] * s.stride[i] - s.before[i];
    need[i] = (t.count[i] - 1) * s.stride[i] + s.window[i];
  }
  const i64 step = s.stride[2], left = first[2];
  for (i64 d = 0; d < need[0]; d++) {
    for (i64 h = 0; h < need[1]; h++) {
      A* row = to + d * b.plane + h * b.row;
      const i64 z = first[0] + d, y = first[1] + h;
      if (z < 0 || z >= s.size[0] || y < 0 || y >= s.size[1]) {
        if (!again) memset(row, 0, size_t(b.row) * sizeof(A));
        continue;
      }
      const S* from = x + (z * s.size[1] + y) * s.size[2];
      for (i64 p = 0; p < step; p++) {  // column left + p + i * step goes to place i of phase p
        A* line = row + p * b.phase;
        const i64 start = left + p;
        i64 begin = start < 0 ? (-start + step - 1) / step : 0;
        i64 end = s.size[2] - start <= 0 ? 0 : (s.size[2] - start + step - 1) / step;
        begin = least(begin, b.phase), end = most(begin, least(end, b.phase));
        if (!again) {
          memset(line, 0, size_t(begin) * sizeof(A));
          memset(line + end, 0, size_t(b.phase - end) * sizeof(A));
        }
        if (step == 1) {
          widen_line(from + start + begin, end - begin, line + begin);
        } else {
          for (i64 i = begin; i < end; i++) line[i] = widened(from[start + i * step]);
        }
      }
    }
  }
}

INLINE i64 place(const Spec& s, const Shape& b, const i64* at) {
  return at[0] * b.plane + at[1] * b.row + at[2] % s.stride[2] * b.phase + at[2] / s.stride[2];
}

// Asks for the beginning of a plane that is wanted next: planes are pages apart, where no hardware looks ahead.
template <class S> INLINE void announce(const S* from, i64 count) {
  const char* begin = (const char*)from;
  const i64 bytes = least(count * i64(sizeof(S)), 16384);
  for (i64 i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i, 0, 2);
}

struct Call {
  const Spec* spec;
  const i64* steps;
  const void *a, *b, *bias;
  void* y;
  std::atomic<i64> next;
  std::atomic<int> failed;
};

template <class T> T* room(i64 count) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, size_t(most(count, 1)) * sizeof(T))) return nullptr;
  return (T*)p;
}

}  // namespace
