// SPDX-License-Identifier: Apache-2.0
// Random numbers from a counter, a lane each: Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al.,
// "Parallel Random Numbers: As Easy as 1, 2, 3", 2011). As in vector.h everything is in an unnamed namespace.
#pragma once

#include "base/typed_vector.h"

namespace ctxfast {
namespace {

// The high words of the products of every lane with `factor`.
inline WordVec high_words(WordVec x, uint32_t factor) {
#if CTXFAST_LANES == 16
  const __m512i by = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, (__m512i)x, by);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, (__m512i)x, 32), by);
  return (WordVec)_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd);
#elif CTXFAST_LANES == 8
  const __m256i by = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32((__m256i)x, by);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)x, 32), by);
  return (WordVec)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  WordVec high;
  for (int i = 0; i < kLanes; ++i) high[i] = static_cast<uint32_t>(static_cast<uint64_t>(x[i]) * factor >> 32);
  return high;
#endif
}

// Replaces the counter's four words by random ones.
inline void philox(WordVec counter[4], uint64_t seed) {
  constexpr uint32_t kFactors[] = {0xD2511F53u, 0xCD9E8D57u}, kWeyl[] = {0x9E3779B9u, 0xBB67AE85u};
  uint32_t key[] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 7; ++round) {
    const WordVec low[] = {counter[0] * all_words(kFactors[0]), counter[2] * all_words(kFactors[1])};
    const WordVec high[] = {high_words(counter[0], kFactors[0]), high_words(counter[2], kFactors[1])};
    counter[0] = high[1] ^ counter[1] ^ all_words(key[0]);
    counter[1] = low[1];
    counter[2] = high[0] ^ counter[3] ^ all_words(key[1]);
    counter[3] = low[0];
    for (int i = 0; i < 2; ++i) key[i] += kWeyl[i];
  }
}

}  // namespace
}  // namespace ctxfast
