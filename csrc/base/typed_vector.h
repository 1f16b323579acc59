// SPDX-License-Identifier: Apache-2.0
// Vectors that are float32 or bfloat16 in memory and float32 in registers. As in vector.h everything is in an
// unnamed namespace.
#pragma once

#include "base/vector.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ctxfast {
namespace {

// a b + c, rounded once.
inline Vec fma(Vec a, Vec b, Vec c) {
#if CTXFAST_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif CTXFAST_LANES == 8
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// Some compilers take the general conversion of vectors apart.
inline WordVec to_words(ShortVec shorts) {
#if CTXFAST_LANES == 16
  return (WordVec)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)shorts);
#else
  return __builtin_convertvector(shorts, WordVec);
#endif
}
inline ShortVec to_shorts(WordVec words) {
#if CTXFAST_LANES == 16
  __m256i shorts = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)words);
  asm("" : "+x"(shorts));
  return (ShortVec)shorts;
#else
  return __builtin_convertvector(words, ShortVec);
#endif
}
inline ByteVec to_bytes(WordVec words) {
#if CTXFAST_LANES == 16
  __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)words);
  asm("" : "+x"(bytes));  // kept from becoming a store: the instruction that narrows into memory takes 30 cycles
  return (ByteVec)bytes;
#else
  return __builtin_convertvector(words, ByteVec);
#endif
}

inline Vec from_bf16(ShortVec shorts) { return (Vec)(to_words(shorts) << 16); }

// Nearest, ties to even; NaN stays NaN.
inline ShortVec to_bf16(Vec x) {
  const WordVec bits = (WordVec)x;
  const WordVec nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
  const WordVec rounded = (IntVec)(bits & 0x7fffffffu) > 0x7f800000 ? bits | 0x400000u : nearest;
  return to_shorts(rounded >> 16);
}

inline Vec load_bf16(const uint16_t* from, int64_t n) {
  ShortVec shorts = {};
  if (n >= kLanes) {
    __builtin_memcpy(&shorts, from, sizeof shorts);
  } else {
    for (int64_t i = 0; i < n; ++i) shorts[i] = from[i];
  }
  return from_bf16(shorts);
}

// sum + the two products of a word of bfloat16, where there is one instruction for it.
#if defined(__AVX512BF16__) && CTXFAST_LANES == 16
#define CTXFAST_DOT_BF16(sum, x, w) (Vec) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(x), (__m512bh)(w))
#endif

template <bool kBf16>
inline Vec load_typed(const void* from, int64_t at, int64_t n) {
  return kBf16 ? load_bf16(static_cast<const uint16_t*>(from) + at, n)
               : load_some(static_cast<const float*>(from) + at, n);
}

// The same for all but NaN's payload and values too small for a full mantissa, which become zero.
inline ShortVec to_bf16_fast(Vec x) {
#if defined(__AVX512BF16__) && CTXFAST_LANES == 16
  return (ShortVec)_mm512_cvtneps_pbh((__m512)x);
#else
  return to_bf16(x);
#endif
}

template <bool kBf16, bool kFast>
inline void store_typed(void* to, int64_t at, Vec value, int64_t n) {
  if (!kBf16) return store_some(static_cast<float*>(to) + at, value, n);
  const ShortVec shorts = kFast ? to_bf16_fast(value) : to_bf16(value);
  uint16_t* const out = static_cast<uint16_t*>(to) + at;
  if (n >= kLanes) {
    __builtin_memcpy(out, &shorts, sizeof shorts);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = shorts[i];
  }
}

}  // namespace
}  // namespace ctxfast
