// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#define CTXFAST_LANES 8
#define CTXFAST_DOT_INT8(sum, x, w) (WordVec) _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(x), (__m256i)(w))
#include "linear_act/narrow.h"

namespace ctxfast {
extern const LinearActKernel linear_act_int8_avxvnni = &forward<Vectors<Int8>>;
}
