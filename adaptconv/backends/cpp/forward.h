// Forward convolution of tiles. Included by taps.cpp alone.

#pragma once

#include "tiles.h"

namespace {

template <class A, int R> struct Step {
  i64 at;
  A w[R];
};

template <class A, int R> struct Plan {
  Step<A, R>* steps;
  i64 ends[1 << R];  // steps of row set m lie before ends[m] and not before ends[m - 1]
  i64 of;            // its first output channel
};

// The steps of the output channels that a block computes abreast: its row i is one of channel i % abreast. A weight
// that is exactly zero is left out.
template <class S, class A, int R>
void plan_channels(const Spec& s, const i64* steps, const i64* places, i64 volume, const S* weight, uint8_t* masks,
                   Plan<A, R>& plan) {
  i64 counts[1 << R] = {};
  const i64 width = 3 + R;
  const S* w[R];
  for (int i = 0; i < R; i++) w[i] = weight + i % s.abreast * s.ins * s.taps;
  for (i64 j = 0; j < s.ins; j++) {
    for (i64 k = 0; k < s.steps; k++) {
      const i64* taps = steps + k * width + 3;
      int mask = 0;
      for (int i = 0; i < R; i++) mask |= (taps[i] >= 0 && widened(w[i][j * s.taps + taps[i]]) != A(0)) << i;
      masks[j * s.steps + k] = uint8_t(mask);
      counts[mask]++;
    }
  }
  i64 next[1 << R];
  i64 sum = 0;
  plan.ends[0] = 0;
  for (int m = 1; m < 1 << R; m++) {
    next[m] = sum;
    sum += counts[m];
    plan.ends[m] = sum;
  }
  for (i64 j = 0; j < s.ins; j++) {
    for (i64 k = 0; k < s.steps; k++) {
      const int mask = masks[j * s.steps + k];
      if (!mask) continue;
      const i64* taps = steps + k * width + 3;
      Step<A, R>& step = plan.steps[next[mask]++];
      step.at = places[k] + j * volume;
      for (int i = 0; i < R; i++) step.w[i] = taps[i] >= 0 ? A(widened(w[i][j * s.taps + taps[i]])) : A(0);
    }
  }
}

template <class A, int R, int V, int M> struct Sweep {
  typedef typename Vec<A>::type vec;
  typedef typename Vec<A>::loose loose;
  static INLINE void run(const A* base, const Plan<A, R>& plan, vec (&sums)[R][V]) {
    Sweep<A, R, V, M - 1>::run(base, plan, sums);
    for (i64 k = plan.ends[M - 1]; k < plan.ends[M]; k++) {
      const Step<A, R>& step = plan.steps[k];
      const A* from = base + step.at;
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const vec x = *(const loose*)(from + v * kLanes<A>);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
          if (M >> i & 1) sums[i][v] += x * step.w[i];
      }
    }
  }
};
template <class A, int R, int V> struct Sweep<A, R, V, 0> {
  static INLINE void run(const A*, const Plan<A, R>&, typename Vec<A>::type (&)[R][V]) {}
};

// Where the rows of a block go, in elements on from the first, and what is added to them.
template <class A, int R> struct Target {
  i64 ahead[R];
  A bias[R];
};

template <class A, int R, int V>
__attribute__((noinline)) void block(const A* base, const Plan<A, R>& plan, const Target<A, R>& target, A* y,
                                     int rows, i64 columns) {
  typedef typename Vec<A>::type vec;
  typedef typename Vec<A>::loose loose;
  constexpr int L = kLanes<A>;
  vec sums[R][V];
#pragma GCC unroll 8
  for (int i = 0; i < R; i++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[i][v] = vec{} ;
  Sweep<A, R, V, (1 << R) - 1>::run(base, plan, sums);
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) {
    if (i < rows) {
      A* to = y + target.ahead[i];
      const A bias = target.bias[i];
      if (columns >= V * L) {
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) *(loose*)(to + v * L) = sums[i][v] + bias;
      } else {
        alignas(64) A line[V * L];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) *(loose*)(line + v * L) = sums[i][v] + bias;
        memcpy(to, line, size_t(columns) * sizeof(A));
      }
    }
  }
}

template <class A, int R, int V> struct Blocks {
  static INLINE void run(i64 vectors, const A* base, const Plan<A, R>& plan, const Target<A, R>& target, A* y, int rows,
                         i64 columns) {
    if (vectors >= V) block<A, R, V>(base, plan, target, y, rows, columns);
    else Blocks<A, R, V - 1>::run(vectors, base, plan, target, y, rows, columns);
  }
};
template <class A, int R> struct Blocks<A, R, 0> {
  static INLINE void run(i64, const A*, const Plan<A, R>&, const Target<A, R>&, A*, int, i64) {}
};

constexpr i64 kPlans = 1 << 18;  // bytes of plans kept together: those of all channels of a group, where they fit

template <class S, class A, int R> void forward(Call& call) {
  constexpr int across = R == 1 ? kAlone : R == 2 ? kAlone / 2 : kAcross;
  constexpr i64 L = kLanes<A>;
  const Spec& s = *call.spec;
  const Shape b = shape_of<A>(s);
  const i64 size = s.steps * s.ins, sets = s.outs / s.abreast;
  const i64 kept = sets * size * i64(sizeof(Step<A, R>)) <= kPlans ? sets : 1;
  A* buffer = room<A>(b.total);
  i64* places = room<i64>(s.steps);
  uint8_t* masks = room<uint8_t>(size);
  Step<A, R>* planned = room<Step<A, R>>(size * kept);
  Plan<A, R>* plans = room<Plan<A, R>>(kept);
  if (buffer && places && masks && planned && plans) {
    memset(buffer, 0, size_t(b.total) * sizeof(A));
    for (i64 k = 0; k < s.steps; k++) places[k] = place(s, b, call.steps + k * (3 + R));
    for (i64 k = 0; k < kept; k++) plans[k].steps = planned + k * size, plans[k].of = -1;
    const i64 tiles = b.tiles[0] * b.tiles[1] * b.tiles[2], total = s.groups * s.batch * tiles;
    const i64 pixels = s.size[0] * s.size[1] * s.size[2], outs = s.out[0] * s.out[1] * s.out[2];
    const i64 chunk = most(1, total / (s.threads * 16)), apart = R / s.abreast * s.step;
    Target<A, R> target;
    i64 ahead[R];  // in y; sums of another type than its own go through a buffer
    for (int i = 0; i < R; i++) {
      ahead[i] = i % s.abreast * outs + i / s.abreast * s.step * s.out[2];
      target.ahead[i] = sizeof(S) == sizeof(A) ? ahead[i] : i * across * L;
    }
    i64 filled = -1;
    for (i64 from; (from = call.next.fetch_add(chunk)) < total;) {
      for (i64 job = from; job < least(from + chunk, total); job++) {
        const i64 g = job / (s.batch * tiles), n = job / tiles % s.batch;
        const Tile t = tile_of(s, b, job % tiles);
        for (i64 j = 0; j < s.ins; j++)
          fill<S, A>(s, b, t, (const S*)call.a + ((n * s.groups + g) * s.ins + j) * pixels, buffer + j * b.volume,
                     job % tiles == filled);
        filled = job % tiles;
        if (tiles == 1 && job + 1 < total) {
          const i64 after = (job + 1) % s.batch * s.groups + (job + 1) / s.batch;
          announce((const S*)call.a + after * s.ins * pixels, s.ins * pixels);
        }
        for (i64 k = 0; k < sets; k++) {
          const i64 o = g * s.outs + k * s.abreast;
          Plan<A, R>& plan = plans[kept == 1 ? 0 : k];
          if (plan.of != o)
            plan_channels<S, A, R>(s, call.steps, places, b.volume, (const S*)call.b + o * s.ins * s.taps, masks, plan);
          plan.of = o;
          for (int i = 0; i < R; i++)
            target.bias[i] = call.bias ? A(widened(((const S*)call.bias)[o + i % s.abreast])) : A(0);
          S* y = (S*)call.y + (n * s.groups * s.outs + o) * outs;
          for (i64 d = 0; d < t.count[0]; d++) {
            for (i64 p = 0; p < least(s.step, t.count[1]); p++) {
              for (i64 h = p; h < t.count[1]; h += apart) {
                const A* base = buffer + d * s.stride[0] * b.plane + h * s.stride[1] * b.row;
                S* to = y + ((t.from[0] + d) * s.out[1] + t.from[1] + h) * s.out[2] + t.from[2];
                const i64 left = (t.count[1] - h + s.step - 1) / s.step * s.abreast;
                const int rows = int(least(R, left));
                for (i64 c = 0; c < t.count[2]; c += across * L) {
                  const i64 columns = t.count[2] - c, vectors = (columns + L - 1) / L;
                  if constexpr (sizeof(S) == sizeof(A)) {
                    Blocks<A, R, across>::run(vectors, base + c, plan, target, to + c, rows, columns);
                  } else {
                    alignas(64) A sums[R * across * L];
                    Blocks<A, R, across>::run(vectors, base + c, plan, target, sums, rows, columns);
                    const i64 count = least(columns, across * L);
                    for (int i = 0; i < rows; i++) narrow_line(sums + i * across * L, count, to + c + ahead[i]);
                  }
                }
              }
            }
          }
        }
      }
    }
  } else {
    call.failed = 1;
  }
  free(buffer), free(places), free(masks), free(planned), free(plans);
}

}  // namespace
