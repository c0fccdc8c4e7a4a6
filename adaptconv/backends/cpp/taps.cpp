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

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kAcross = 4, kAlone = 8, kTaps = 8;
#elif defined(__AVX__)
constexpr int kBytes = 32, kAcross = 2, kAlone = 8, kTaps = 8;
#else
constexpr int kBytes = 16, kAcross = 2, kAlone = 8, kTaps = 8;
#endif

#define INLINE inline __attribute__((always_inline))

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
  i64 taps, rows, step, steps, parts, threads;
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
  i64 beyond = b.row * (s.rows - 1) * s.step * s.stride[1] + lanes * (kAlone + 1) + s.tile[2];
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

// Copies what a tile reads of one plane; places outside the input become zero.
template <class S, class A> void fill(const Spec& s, const Shape& b, const Tile& t, const S* x, A* to) {
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
        memset(row, 0, size_t(b.row) * sizeof(A));
        continue;
      }
      const S* from = x + (z * s.size[1] + y) * s.size[2];
      for (i64 p = 0; p < step; p++) {  // column left + p + i * step goes to place i of phase p
        A* line = row + p * b.phase;
        const i64 start = left + p;
        i64 begin = start < 0 ? (-start + step - 1) / step : 0;
        i64 end = s.size[2] - start <= 0 ? 0 : (s.size[2] - start + step - 1) / step;
        begin = least(begin, b.phase), end = most(begin, least(end, b.phase));
        for (i64 i = 0; i < begin; i++) line[i] = A(0);
        if (step == 1) {
          for (i64 i = begin; i < end; i++) line[i] = widened(from[start + i]);
        } else {
          for (i64 i = begin; i < end; i++) line[i] = widened(from[start + i * step]);
        }
        for (i64 i = end; i < b.phase; i++) line[i] = A(0);
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
};

// The steps of one output channel. A weight that is exactly zero is left out.
template <class S, class A, int R>
void plan_channel(const Spec& s, const i64* steps, const i64* places, i64 volume, const S* w, uint8_t* masks,
                  Plan<A, R>& plan) {
  i64 counts[1 << R] = {};
  const i64 width = 3 + R;
  for (i64 j = 0; j < s.ins; j++) {
    for (i64 k = 0; k < s.steps; k++) {
      const i64* taps = steps + k * width + 3;
      int mask = 0;
      for (int i = 0; i < R; i++) mask |= (taps[i] >= 0 && widened(w[j * s.taps + taps[i]]) != A(0)) << i;
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
      for (int i = 0; i < R; i++) step.w[i] = taps[i] >= 0 ? A(widened(w[j * s.taps + taps[i]])) : A(0);
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

template <class A, int R, int V>
__attribute__((noinline)) void block(const A* base, const Plan<A, R>& plan, A bias, A* y, i64 stride, int rows,
                                     i64 columns) {
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
      A* to = y + i * stride;
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
  static INLINE void run(i64 vectors, const A* base, const Plan<A, R>& plan, A bias, A* y, i64 stride, int rows,
                         i64 columns) {
    if (vectors >= V) block<A, R, V>(base, plan, bias, y, stride, rows, columns);
    else Blocks<A, R, V - 1>::run(vectors, base, plan, bias, y, stride, rows, columns);
  }
};
template <class A, int R> struct Blocks<A, R, 0> {
  static INLINE void run(i64, const A*, const Plan<A, R>&, A, A*, i64, int, i64) {}
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

template <class S, class A, int R> void forward(Call& call) {
  constexpr int across = R == 1 ? kAlone : kAcross;
  constexpr i64 L = kLanes<A>;
  const Spec& s = *call.spec;
  const Shape b = shape_of<A>(s);
  A* buffer = room<A>(b.total);
  i64* places = room<i64>(s.steps);
  uint8_t* masks = room<uint8_t>(s.steps * s.ins);
  Plan<A, R> plan;
  plan.steps = room<Step<A, R>>(s.steps * s.ins);
  if (buffer && places && masks && plan.steps) {
    memset(buffer, 0, size_t(b.total) * sizeof(A));
    for (i64 k = 0; k < s.steps; k++) places[k] = place(s, b, call.steps + k * (3 + R));
    const i64 tiles = b.tiles[0] * b.tiles[1] * b.tiles[2], total = s.groups * s.batch * tiles;
    const i64 pixels = s.size[0] * s.size[1] * s.size[2], outs = s.out[0] * s.out[1] * s.out[2];
    const i64 chunk = most(1, total / (s.threads * 16));
    i64 planned = -1;
    for (i64 from; (from = call.next.fetch_add(chunk)) < total;) {
      for (i64 job = from; job < least(from + chunk, total); job++) {
        const i64 g = job / (s.batch * tiles), n = job / tiles % s.batch;
        const Tile t = tile_of(s, b, job % tiles);
        for (i64 j = 0; j < s.ins; j++)
          fill<S, A>(s, b, t, (const S*)call.a + ((n * s.groups + g) * s.ins + j) * pixels, buffer + j * b.volume);
        if (tiles == 1 && job + 1 < total) {
          const i64 after = (job + 1) % s.batch * s.groups + (job + 1) / s.batch;
          announce((const S*)call.a + after * s.ins * pixels, s.ins * pixels);
        }
        for (i64 o = g * s.outs; o < (g + 1) * s.outs; o++) {
          if (planned != o)
            plan_channel<S, A, R>(s, call.steps, places, b.volume, (const S*)call.b + o * s.ins * s.taps, masks, plan);
          planned = o;
          const A bias = call.bias ? A(widened(((const S*)call.bias)[o])) : A(0);
          S* y = (S*)call.y + (n * s.groups * s.outs + o) * outs;
          for (i64 d = 0; d < t.count[0]; d++) {
            for (i64 p = 0; p < least(s.step, t.count[1]); p++) {
              for (i64 h = p; h < t.count[1]; h += R * s.step) {
                const int rows = int(least(R, (t.count[1] - h + s.step - 1) / s.step));
                const A* base = buffer + d * s.stride[0] * b.plane + h * s.stride[1] * b.row;
                S* to = y + ((t.from[0] + d) * s.out[1] + t.from[1] + h) * s.out[2] + t.from[2];
                for (i64 c = 0; c < t.count[2]; c += across * L) {
                  const i64 columns = t.count[2] - c, vectors = (columns + L - 1) / L;
                  if constexpr (sizeof(S) == sizeof(A)) {
                    Blocks<A, R, across>::run(vectors, base + c, plan, bias, to + c, s.step * s.out[2], rows, columns);
                  } else {
                    alignas(64) A sums[R * across * L];
                    Blocks<A, R, across>::run(vectors, base + c, plan, bias, sums, across * L, rows, columns);
                    for (int i = 0; i < rows; i++)
                      for (i64 k = 0; k < least(columns, across * L); k++)
                        narrow(sums[i * across * L + k], to + i * s.step * s.out[2] + c + k);
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
  free(buffer), free(places), free(masks), free(plan.steps);
}

// ---- gradient of the weight ------------------------------------------------------------------------------------

constexpr i64 kFlush = 512;  // additions a lane before its sum is moved to double

template <class A, int K> INLINE void flushed(typename Vec<A>::type (&part)[K], double* sums) {
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) {
    A line[kLanes<A>];
    *(typename Vec<A>::loose*)line = part[k];
    double sum = 0;
    for (int i = 0; i < kLanes<A>; i++) sum += double(line[i]);
    sums[k] += sum;
    part[k] = typename Vec<A>::type{};
  }
}

// Adds to sums[k] what K taps see: the dot products of the gradient's rows with the input's, shifted.
template <class A, int K>
void correlate(const A* x, const A* dy, const i64* at, i64 rows, i64 x_row, i64 dy_row, i64 columns, double* sums) {
  typedef typename Vec<A>::type vec;
  typedef typename Vec<A>::loose loose;
  typedef typename Vec<A>::mask mask;
  constexpr int L = kLanes<A>;
  const i64 whole = columns / L * L, rest = columns - whole;
  mask keep = {};
  for (int i = 0; i < L; i++) keep[i] = i < rest ? -1 : 0;
  i64 from[K];
  for (int k = 0; k < K; k++) from[k] = at[k];
  vec part[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) part[k] = vec{};
  i64 done = 0;
  for (i64 r = 0; r < rows; r++) {
    const A *xr = x + r * x_row, *dyr = dy + r * dy_row;
    for (i64 c = 0; c < whole; c += L) {
      const vec g = *(const loose*)(dyr + c);
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) part[k] += g * (vec)*(const loose*)(xr + from[k] + c);
    }
    if (rest) {  // what lies past the row must not count, not even as zero times infinity
      const vec g = *(const loose*)(dyr + whole);
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) part[k] += g * (vec)((mask)(vec)*(const loose*)(xr + from[k] + whole) & keep);
    }
    done += columns / L + 1;
    if (done >= kFlush || r == rows - 1) flushed<A, K>(part, sums), done = 0;
  }
}

// The same for K taps one above the other, as far apart as the rows of a block: a loaded row of the input meets every
// row of the gradient in the block that some tap pairs it with.
template <class A, int K>
void correlate_run(const A* x, const A* dy, i64 rows, i64 step, i64 x_row, i64 dy_row, i64 columns, double* sums) {
  typedef typename Vec<A>::type vec;
  typedef typename Vec<A>::loose loose;
  typedef typename Vec<A>::mask mask;
  constexpr int L = kLanes<A>, R = 4;
  const i64 whole = columns / L * L, rest = columns - whole, apart = step * x_row;
  mask keep = {}, all = {};
  for (int i = 0; i < L; i++) keep[i] = i < rest ? -1 : 0, all[i] = -1;
  vec part[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; k++) part[k] = vec{};
  i64 done = 0;
  for (i64 p = 0; p < least(step, rows); p++) {
    i64 h = p;
    for (; h + (R - 1) * step < rows; h += R * step) {
      for (i64 c = 0; c < columns; c += L) {
        const mask kept = c < whole ? all : keep;
        const A* from = x + h * x_row + c;
        vec g[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) g[i] = *(const loose*)(dy + (h + i * step) * dy_row + c);
#pragma GCC unroll 16
        for (int r = 0; r < K + R - 1; r++) {
          const vec seen = (vec)((mask)(vec)*(const loose*)(from + r * apart) & kept);
#pragma GCC unroll 8
          for (int i = 0; i < R; i++)
            if (r - i >= 0 && r - i < K) part[r - i < 0 ? 0 : r - i >= K ? 0 : r - i] += g[i] * seen;
        }
      }
      done += R * (columns / L + 1);
      if (done >= kFlush) flushed<A, K>(part, sums), done = 0;
    }
    for (; h < rows; h += step) {
      for (i64 c = 0; c < columns; c += L) {
        const mask kept = c < whole ? all : keep;
        const vec g = *(const loose*)(dy + h * dy_row + c);
#pragma GCC unroll 8
        for (int k = 0; k < K; k++)
          part[k] += g * (vec)((mask)(vec)*(const loose*)(x + h * x_row + k * apart + c) & kept);
      }
    }
  }
  flushed<A, K>(part, sums);
}

template <class A, int K> struct Runs {
  static INLINE void run(i64 length, const A* x, const A* dy, i64 rows, i64 step, i64 x_row, i64 dy_row, i64 columns,
                         double* sums) {
    if (length == K) correlate_run<A, K>(x, dy, rows, step, x_row, dy_row, columns, sums);
    else Runs<A, K - 1>::run(length, x, dy, rows, step, x_row, dy_row, columns, sums);
  }
};
template <class A> struct Runs<A, 2> {
  static INLINE void run(i64, const A*, const A*, i64, i64, i64, i64, i64, double*) {}
};

template <class S, class A> void grad_weight(Call& call) {
  const Spec& s = *call.spec;
  const Shape b = shape_of<A>(s);
  constexpr i64 L = kLanes<A>;
  const i64 channels = s.groups * s.outs, tiles = b.tiles[0] * b.tiles[1] * b.tiles[2];
  const i64 pixels = s.size[0] * s.size[1] * s.size[2], outs = s.out[0] * s.out[1] * s.out[2];
  const i64 dy_row = (s.tile[2] + L - 1) / L * L;
  const i64* lengths = call.steps + s.taps * 3;  // of the runs, whose taps come first
  A* x = room<A>(b.total);
  A* dy = room<A>(dy_row * s.tile[0] * s.tile[1] + L);
  i64* places = room<i64>(s.taps);
  if (x && dy && places) {
    memset(x, 0, size_t(b.total) * sizeof(A));
    memset(dy, 0, size_t(dy_row * s.tile[0] * s.tile[1] + L) * sizeof(A));
    for (i64 k = 0; k < s.taps; k++) places[k] = place(s, b, call.steps + k * 3);
    const i64 work = s.batch * tiles, total = channels * s.parts;
    for (i64 job; (job = call.next.fetch_add(1)) < total;) {
      const i64 o = job / s.parts, part = job % s.parts;
      double* sums = (double*)call.y + job * s.taps;
      for (i64 k = 0; k < s.taps; k++) sums[k] = 0;
      for (i64 i = work * part / s.parts; i < work * (part + 1) / s.parts; i++) {
        const i64 n = i / tiles;
        const Tile t = tile_of(s, b, i % tiles);
        fill<S, A>(s, b, t, (const S*)call.a + (n * s.groups + o / s.outs) * pixels, x);
        const S* from = (const S*)call.b + (n * channels + o) * outs;
        for (i64 d = 0; d < t.count[0]; d++)
          for (i64 h = 0; h < t.count[1]; h++) {
            const S* line = from + ((t.from[0] + d) * s.out[1] + t.from[1] + h) * s.out[2] + t.from[2];
            A* to = dy + (d * s.tile[1] + h) * dy_row;
            for (i64 c = 0; c < t.count[2]; c++) to[c] = widened(line[c]);
            for (i64 c = t.count[2]; c < dy_row; c++) to[c] = A(0);
          }
        if (tiles == 1 && n + 1 < s.batch) {
          announce((const S*)call.a + ((n + 1) * s.groups + o / s.outs) * pixels, pixels);
          announce((const S*)call.b + ((n + 1) * channels + o) * outs, outs);
        }
        const i64 x_row = b.row * s.stride[1];
        for (i64 d = 0; d < t.count[0]; d++) {
          const A* xs = x + d * s.stride[0] * b.plane;
          const A* dys = dy + d * s.tile[1] * dy_row;
          i64 k = 0;
          if constexpr (sizeof(A) == 4) {  // float64 goes without, for the sake of the time to compile
            for (i64 r = 0; r < s.steps; k += lengths[r++])
              Runs<A, kTaps>::run(lengths[r], xs + places[k], dys, t.count[1], s.step, x_row, dy_row, t.count[2],
                                  sums + k);
          }
          for (; k + kTaps <= s.taps; k += kTaps)
            correlate<A, kTaps>(xs, dys, places + k, t.count[1], x_row, dy_row, t.count[2], sums + k);
          for (; k + 4 <= s.taps; k += 4)
            correlate<A, 4>(xs, dys, places + k, t.count[1], x_row, dy_row, t.count[2], sums + k);
          if (k + 3 == s.taps) {
            correlate<A, 3>(xs, dys, places + k, t.count[1], x_row, dy_row, t.count[2], sums + k);
            k += 3;
          }
          for (; k < s.taps; k++)
            correlate<A, 1>(xs, dys, places + k, t.count[1], x_row, dy_row, t.count[2], sums + k);
        }
      }
    }
  } else {
    call.failed = 1;
  }
  free(x), free(dy), free(places);
}

template <class S, class A> void work(void* data) {
  Call& call = *(Call*)data;
  if (call.spec->direction) grad_weight<S, A>(call);
  else if (call.spec->rows == 4) forward<S, A, 4>(call);
  else forward<S, A, 1>(call);
}

}  // namespace

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

// The gradient of the weight is left in double, [channels, parts, taps], for the caller to add up in order.
extern "C" int adaptconv_taps(const int64_t* spec, const int64_t* steps, const void* a, const void* b,
                              const void* bias, void* y, Parallel parallel) {
  const Spec& s = *(const Spec*)spec;
  Call call{&s, steps, a, b, bias, y, {0}, {0}};
  void (*run)(void*) = s.dtype == 0 ? work<float, float> : s.dtype == 1 ? work<double, double> : work<bf16, float>;
  if (parallel && s.threads > 1) parallel(run, &call, unsigned(s.threads), 0);  // GOMP_parallel
  else run(&call);
  return call.failed;
}
