// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#define CTXFAST_LANES 16
#define CTXFAST_DOT_BF16(sum, x, w) (Vec) _mm512_dpbf16_ps((__m512)(sum), (__m512bh)(x), (__m512bh)(w))
#include "lstm/narrow.h"

namespace ctxfast {
extern const LstmKernels lstm_bfloat16_avx512bf16 = {&forward<Bfloat16>, nullptr};
}
