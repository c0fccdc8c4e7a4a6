// Depthwise convolution by taps on a CPU, contiguous planes: forward (which also serves the gradient of the
// input, with flipped taps) and the gradient of the weight. A plain C interface; no headers but the language's own.
//
// A job takes one tile of the output of one group and image: it copies the part of the input the tile reads into a
// buffer, zeros of the padding included and columns sorted by their remainder by the stride, so that every tap is a
// contiguous read at a fixed offset. The sums of R rows by V vectors stay in registers. A *step* is one place of the
// input, relative to the block, with the rows that read it: steps are grouped by that set of rows, so that one load
// serves every row that wants it and no product is formed that the convolution does not have.

#include "forward.h"
#include "weight.h"

namespace {

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
  void (*const by_dtype[])(void*) = {work<float, float>, work<double, double>, work<bf16, float>, work<f16, float>};
  void (*run)(void*) = by_dtype[s.dtype];
  if (parallel && s.threads > 1) parallel(run, &call, unsigned(s.threads), 0);  // GOMP_parallel
  else run(&call);
  return call.failed;
}
