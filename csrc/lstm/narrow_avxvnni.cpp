// SPDX-License-Identifier: Apache-2.0
// 256-bit integer dot products without AVX-512.
#include <immintrin.h>

#define CTXFAST_LANES 8
#define CTXFAST_DOT_INT8(sum, x, w) (WordVec) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(x), (__m256i)(w))
#include "lstm/narrow.h"

namespace ctxfast {
extern const LstmKernels lstm_int8_avxvnni = {&forward<Int8>, nullptr};
}
