// SPDX-License-Identifier: Apache-2.0
// AVX2 with FMA: 16 registers hold 3 x 4 sums, one weight and three broadcast h.
#define CTXFAST_LANES 8
#define CTXFAST_ROWS 3
#define CTXFAST_VECTORS 4
#define CTXFAST_VECTORS_1 8
#include "lstm/float32.h"

namespace ctxfast {
extern const LstmKernels lstm_float32_avx2 = {&forward<Float32>, &backward<Float32>};
}
