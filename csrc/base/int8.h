// SPDX-License-Identifier: Apache-2.0
// int8 dot products on vectors, the same bits on every instruction set: a word holds four factors, unsigned in x and
// signed in w.
#pragma once

#include "base/vector.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// sum + four products of unsigned x and signed w, where there is one instruction for it.
#if defined(__AVX512VNNI__) && CTXFAST_LANES == 16
#define CTXFAST_DOT_INT8(sum, x, w) (WordVec) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(x), (__m512i)(w))
#elif defined(__AVXVNNI__) && CTXFAST_LANES == 8
#define CTXFAST_DOT_INT8(sum, x, w) (WordVec) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(x), (__m256i)(w))
#endif

namespace ctxfast {
namespace {

// kIsOne: one instruction; kIsPlain: plain arithmetic; else AVX2's pairs.
struct Int8Dot {
  typedef WordVec Sum;
#if defined(CTXFAST_DOT_INT8)
  static constexpr bool kIsOne = true, kIsPlain = false;
  static constexpr bool kBiased = true;  // x is stored as x + 128
  typedef WordVec Spread;
  static Spread spread(uint32_t word) { return all_words(word); }
  static Sum dot(Sum sum, Spread x, WordVec w) { return CTXFAST_DOT_INT8(sum, x, w); }
#elif defined(__AVX2__) && CTXFAST_LANES == 8
  // vpmaddubsw adds pairs of products in 16 bits: with |x| and w sign(x), both at most 127, they fit.
  static constexpr bool kIsOne = false, kIsPlain = false;
  static constexpr bool kBiased = false;
  struct Spread {
    __m256i sign, magnitude;
  };
  static Spread spread(uint32_t word) {
    const __m256i x = _mm256_set1_epi32(static_cast<int>(word ^ 0x80808080u));
    return {x, _mm256_abs_epi8(x)};
  }
  static Sum dot(Sum sum, const Spread& x, WordVec w) {
    const __m256i pairs = _mm256_maddubs_epi16(x.magnitude, _mm256_sign_epi8((__m256i)w, x.sign));
    return sum + (WordVec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
#else
  static constexpr bool kIsOne = false, kIsPlain = true;
  static constexpr bool kBiased = false;
  struct Spread {
    IntVec part[4];
  };
  static Spread spread(uint32_t word) {
    Spread x;
    for (int b = 0; b < 4; ++b) x.part[b] = (IntVec)all_words(word >> 8 * b & 255u) - 128;
    return x;
  }
  static Sum dot(Sum sum, const Spread& x, WordVec w) {
    for (int b = 0; b < 4; ++b) sum += (WordVec)(x.part[b] * ((IntVec)(w << (24 - 8 * b)) >> 24));
    return sum;
  }
#endif
};

// How a row is quantized: multiplied by `steps` and rounded; `scale` undoes it. Where a row has nothing to quantize
// (`there` is false) everything is zero, or NaN if an element is not finite.
struct Int8Step {
  bool there;
  float steps, scale;
};

// From the largest magnitude in each lane, as integers: they order alike, and NaN is above infinity.
inline Int8Step int8_step(IntVec most) {
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  float bound;
  __builtin_memcpy(&bound, &largest, sizeof bound);
  const bool finite = largest < 0x7f800000, there = finite && bound > 1e-30f;
  return {there, there ? 127.0f / bound : 0.0f, there ? bound / 127.0f : finite ? 0.0f : __builtin_nanf("")};
}

}  // namespace
}  // namespace ctxfast
