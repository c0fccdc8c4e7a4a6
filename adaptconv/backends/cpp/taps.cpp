// Depthwise convolution by taps on a CPU, contiguous planes: forward (which also serves the gradient of the
// input, with flipped taps) and the gradient of the weight. A plain C interface; no headers but the language's own.
//
// A job takes one tile of the output of one group and image: it copies the part of the input the tile reads into a
// buffer, zeros of the padding included and columns sorted by their remainder by the stride, so that every tap is a
// contiguous read at a fixed offset. The sums of R rows by V vectors stay in registers. A *step* is one place of the
// input, relative to the block, with the rows that read it: steps are grouped by that set of rows, so that one load
// serves every row that wants it and no product is formed that the convolution does not have.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kAcross = 4, kAlone = 8, kTaps = 8;
#elif defined(__AVX__)
constexpr int kBytes = 32, kAcross = 2, kAlone = 8, kTaps = 8;
#else
constexpr int kBytes = 16, kAcross = 2, kAlone = 8, kTaps = 8;
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

using i64 = int64_t;
struct bf16 { uint16_t bits; };

template <class A> struct Vec;
template <> struct Vec<float> {
  typedef float type __attribute__((vector_size(kBytes)));
  typedef float loose __attribute__((vector_size(kBytes), aligned(4), may_alias));
  typedef int32_t mask __attribute__((vector_size(kBytes)));
  typedef int32_t lane;
};
template <> struct Vec<double> {
  typedef double type __attribute__((vector_size(kBytes)));
  typedef double loose __attribute__((vector_size(kBytes), aligned(8), may_alias));
  typedef int64_t mask __attribute__((vector_size(kBytes)));
  typedef int64_t lane;
};
template <class A> constexpr int kLanes = kBytes / int(sizeof(A));

INLINE float widened(float v) { return v; }
INLINE double widened(double v) { return v; }
INLINE float widened(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
INLINE void narrow(float v, float* to) { *to = v; }
INLINE void narrow(double v, double* to) { *to = v; }
INLINE void narrow(float v, bf16* to) {  // to nearest, ties to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &v, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t nan = (bits >> 16) | 0x40u;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

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
          for (i64 i = begin; i < end; i++) line[i] = widened(from[start + i]);
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

// ---- forward ---------------------------------------------------------------------------------------------------

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
                    for (int i = 0; i < rows; i++) {
                      S* row = to + c + ahead[i];
                      for (i64 q = 0; q < count; q++) narrow(sums[i * across * L + q], row + q);
                    }
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

// ---- gradient of the weight ------------------------------------------------------------------------------------

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
              for (i64 c = 0; c < t.count[2]; c++) to[c] = widened(line[c]);
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

template <class S, class A> void work(void* data) {
  Call& call = *(Call*)data;
  if (call.spec->direction) grad_weight<S, A>(call);
  else if (call.spec->rows == 4) forward<S, A, 4>(call);
  else if (call.spec->rows == 2) forward<S, A, 2>(call);
  else forward<S, A, 1>(call);
}

}  // namespace

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

// The gradient of the weight is left in double, [pairs of channels, parts, taps], for the caller to add up in order.
extern "C" int adaptconv_taps(const int64_t* spec, const int64_t* steps, const void* a, const void* b,
                              const void* bias, void* y, Parallel parallel) {
  const Spec& s = *(const Spec*)spec;
  Call call{&s, steps, a, b, bias, y, {0}, {0}};
  void (*run)(void*) = s.dtype == 0 ? work<float, float> : s.dtype == 1 ? work<double, double> : work<bf16, float>;
  if (parallel && s.threads > 1) parallel(run, &call, unsigned(s.threads), 0);  // GOMP_parallel
  else run(&call);
  return call.failed;
}
