// SPDX-License-Identifier: Apache-2.0
#include <immintrin.h>

#define CTXFAST_LANES 16
#define CTXFAST_DOT_INT8(sum, x, w) (WordVec) _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(x), (__m512i)(w))
#include "lstm/narrow.h"

namespace ctxfast {
extern const LstmKernels lstm_int8_avx512vnni = {&forward<Int8>, nullptr};
}
