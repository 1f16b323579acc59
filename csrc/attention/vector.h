// SPDX-License-Identifier: Apache-2.0
// What attention needs of vectors: exp, reductions over lanes, transposing. As in base/vector.h
// everything is in an unnamed namespace.
#pragma once

#include "base/typed_vector.h"

namespace ctxfast {
namespace {

// `value` in the first n lanes, `other` behind.
inline Vec first_lanes(Vec value, int64_t n, Vec other) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? value : other;
}

inline ShortVec load_shorts(const uint16_t* from, int64_t n) {
  ShortVec shorts = {};
  if (n >= kLanes) {
    __builtin_memcpy(&shorts, from, sizeof shorts);
  } else {
    for (int64_t i = 0; i < n; ++i) shorts[i] = from[i];
  }
  return shorts;
}

// b where either is NaN.
inline Vec max(Vec a, Vec b) {
#if CTXFAST_LANES == 16
  return (Vec)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif CTXFAST_LANES == 8
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

#if CTXFAST_LANES == 16
// The four quarters of a vector, joined by `join`. Masked by all ones: the plain instructions' undefined operand draws
// warnings.
template <class Join>
inline __m128 joined_quarters(Vec x, const Join& join) {
  const Vec halves = join(x, (Vec)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)x, (__m512)x, 0x4e));
  const Vec all_four = join(halves, (Vec)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)halves, (__m512)halves, 0xb1));
  __m128 one;
  __builtin_memcpy(&one, &all_four, sizeof one);
  return one;
}
inline float max_lane(Vec x) {
  __m128 most = joined_quarters(x, [](Vec a, Vec b) { return max(a, b); });
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
inline float sum_lanes(Vec x) {
  __m128 sum = joined_quarters(x, [](Vec a, Vec b) { return a + b; });
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#elif CTXFAST_LANES == 8
inline float max_lane(Vec x) {
  __m128 most = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}
inline float sum_lanes(Vec x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
#else
inline float max_lane(Vec x) {
  float most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}
inline float sum_lanes(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
#endif

// 2^(x step) for x step <= 0, and 0 far below 2^-126; NaN stays NaN. 2^f on [-1/2, 1/2] is a polynomial fitted to 2e-9,
// or kCoarse 3e-6 for what is rounded to bfloat16.
template <bool kCoarse>
inline Vec exp2_scaled(Vec x, float step) {
  constexpr float kFine[] = {1.0f,           0.693147182f,   0.240226462f,   0.0555032864f,
                             0.00961848907f, 0.00133999309f, 0.000153458124f};
  constexpr float kShort[] = {0.999999285f, 0.693121791f, 0.240247443f, 0.0559178591f, 0.00957010221f};
  constexpr int kDegree = kCoarse ? 4 : 6;
#if CTXFAST_LANES == 16
  // Scaling by a power of two makes zero of 2^-200.
  const Vec exponent = max(all(-200.0f), x * all(step));
  const Vec n =
      (Vec)_mm512_maskz_roundscale_ps(0xffff, (__m512)exponent, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec unbounded = x * all(step), exponent = max(all(-127.0f), unbounded);
  const Vec shifted = exponent + all(kRounding), n = shifted - all(kRounding);
#endif
  const Vec f = exponent - n;
  Vec p = all(kCoarse ? kShort[kDegree] : kFine[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; --i) p = p * f + all(kCoarse ? kShort[i] : kFine[i]);
#if CTXFAST_LANES == 16
  return (Vec)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);
#else
  const IntVec biased = (IntVec)shifted - ((IntVec)all(kRounding) - 127);
  return unbounded < all(-126.0f) ? Vec{} : p * (Vec)(biased << 23);
#endif
}

// Four words of kLanes rows, ld_from apart, become four rows of kLanes words, ld_to apart.
inline void transpose4(const uint32_t* from, int64_t ld_from, uint32_t* to, int64_t ld_to) {
#if CTXFAST_LANES >= 8
  Vec transposed[4];
#if CTXFAST_LANES == 16
  const auto four = [from, ld_from](int64_t row) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(from + row * ld_from));
  };
  __m512 part[4];
  for (int i = 0; i < 4; ++i) {  // rows i, i + 4, i + 8 and i + 12 side by side
    part[i] = _mm512_castps128_ps512(four(i));
    part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x00f0, four(i + 4));
    part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x0f00, four(i + 8));
    part[i] = _mm512_mask_broadcast_f32x4(part[i], 0xf000, four(i + 12));
  }
  const __m512 low = _mm512_maskz_unpacklo_ps(0xffff, part[0], part[1]),
               high = _mm512_maskz_unpackhi_ps(0xffff, part[0], part[1]);
  const __m512 low_2 = _mm512_maskz_unpacklo_ps(0xffff, part[2], part[3]),
               high_2 = _mm512_maskz_unpackhi_ps(0xffff, part[2], part[3]);
  transposed[0] = (Vec)_mm512_maskz_shuffle_ps(0xffff, low, low_2, 0x44),
  transposed[1] = (Vec)_mm512_maskz_shuffle_ps(0xffff, low, low_2, 0xee);
  transposed[2] = (Vec)_mm512_maskz_shuffle_ps(0xffff, high, high_2, 0x44),
  transposed[3] = (Vec)_mm512_maskz_shuffle_ps(0xffff, high, high_2, 0xee);
#else
  const auto four = [from, ld_from](int64_t row) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(from + row * ld_from));
  };
  __m256 part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(four(i)), four(i + 4), 1);
  const __m256 low = _mm256_unpacklo_ps(part[0], part[1]), high = _mm256_unpackhi_ps(part[0], part[1]);
  const __m256 low_2 = _mm256_unpacklo_ps(part[2], part[3]), high_2 = _mm256_unpackhi_ps(part[2], part[3]);
  transposed[0] = (Vec)_mm256_shuffle_ps(low, low_2, 0x44), transposed[1] = (Vec)_mm256_shuffle_ps(low, low_2, 0xee);
  transposed[2] = (Vec)_mm256_shuffle_ps(high, high_2, 0x44),
  transposed[3] = (Vec)_mm256_shuffle_ps(high, high_2, 0xee);
#endif
  for (int k = 0; k < 4; ++k) __builtin_memcpy(to + k * ld_to, &transposed[k], sizeof(Vec));
#else
  for (int k = 0; k < 4; ++k) {
    for (int row = 0; row < kLanes; ++row) to[k * ld_to + row] = from[row * ld_from + k];
  }
#endif
}

}  // namespace
}  // namespace ctxfast
