// Vectors, and numbers widened into what sums are kept in and narrowed again. Included by taps.cpp alone.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512BW__)
#include <immintrin.h>
#endif

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
struct f16 { uint16_t bits; };

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

template <class To, class From> INLINE To same_bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "as wide");
  To to;
  memcpy(&to, &v, sizeof(To));
  return to;
}

INLINE uint32_t chosen(bool which, uint32_t yes, uint32_t no) {  // both are computed: loops become vectors
  const uint32_t mask = 0u - uint32_t(which);
  return (yes & mask) | (no & ~mask);
}

// Into what sums are kept in.
INLINE float widened(float v) { return v; }
INLINE double widened(double v) { return v; }
INLINE float widened(bf16 v) { return same_bits<float>(uint32_t(v.bits) << 16); }

// To nearest, ties to even; a NaN stays one.
INLINE void narrow(float v, float* to) { *to = v; }
INLINE void narrow(double v, double* to) { *to = v; }
INLINE void narrow(float v, bf16* to) {
  const uint32_t bits = same_bits<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, nan = (bits >> 16) | 0x40u;
  to->bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// float16 is not read or written through subnormal floats, which the processor may be set to take for zero; its own
// instructions heed no such setting.
[[maybe_unused]] constexpr int kNearest = 0;  // as they number the ways to round
#if defined(__F16C__)
INLINE float widened(f16 v) { return _cvtsh_ss(v.bits); }
INLINE void narrow(float v, f16* to) { to->bits = _cvtss_sh(v, kNearest); }
#else
INLINE float widened(f16 v) {
  const uint32_t magnitude = v.bits & 0x7fffu, sign = uint32_t(v.bits & 0x8000u) << 16, shifted = magnitude << 13;
  // A subnormal is a count of 2^-24.
  const uint32_t small = same_bits<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t finite = chosen(magnitude < 0x400u, small, shifted + (112u << 23));
  return same_bits<float>(sign | chosen(magnitude < 0x7c00u, finite, shifted | 0x7f800000u));
}
INLINE void narrow(float v, f16* to) {
  const uint32_t bits = same_bits<uint32_t>(v), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Added to a half, whose last bit is 2^-24, a magnitude below 2^-14 is rounded to what a subnormal can say.
  const uint32_t small = same_bits<uint32_t>(same_bits<float>(magnitude) + 0.5f) - same_bits<uint32_t>(0.5f);
  const uint32_t finite = chosen(magnitude < (113u << 23), small, normal);
  const uint32_t beyond = 0x7c00u | uint32_t(magnitude > 0x7f800000u) << 9;  // from 2^16; less may round to it as well
  to->bits = uint16_t((bits >> 16 & 0x8000u) | chosen(magnitude < (143u << 23), finite, beyond));
}
#endif

// A line of numbers, widened or narrowed.
template <class S, class A> INLINE void widen_line(const S* __restrict from, i64 count, A* __restrict to) {
  for (i64 i = 0; i < count; i++) to[i] = widened(from[i]);
}
template <class S, class A> INLINE void narrow_line(const A* __restrict from, i64 count, S* __restrict to) {
  for (i64 i = 0; i < count; i++) narrow(from[i], to + i);
}
#if defined(__AVX512BW__) && defined(__AVX512VL__)
INLINE void widen_line(const f16* from, i64 count, float* to) {
  for (i64 i = 0; i < count; i += 16) {
    const __mmask16 mask = __mmask16(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    _mm512_mask_storeu_ps(to + i, mask, _mm512_maskz_cvtph_ps(mask, _mm256_maskz_loadu_epi16(mask, from + i)));
  }
}
INLINE void narrow_line(const float* from, i64 count, f16* to) {
  for (i64 i = 0; i < count; i += 16) {
    const __mmask16 mask = __mmask16(count - i >= 16 ? 0xffff : (1 << (count - i)) - 1);
    const __m256i halves = _mm512_maskz_cvtps_ph(mask, _mm512_maskz_loadu_ps(mask, from + i), kNearest);
    _mm256_mask_storeu_epi16(to + i, mask, halves);
  }
}
#elif defined(__F16C__)
INLINE void widen_line(const f16* from, i64 count, float* to) {
  i64 i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < count; i++) to[i] = widened(from[i]);
}
INLINE void narrow_line(const float* from, i64 count, f16* to) {
  i64 i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), kNearest));
  for (; i < count; i++) narrow(from[i], to + i);
}
#endif

}  // namespace
