// SPDX-License-Identifier: Apache-2.0
// AVX-512F: 32 registers hold 6 x 4 sums, a weight and six broadcast h.
#define CTXFAST_LANES 16
#define CTXFAST_ROWS 6
#define CTXFAST_VECTORS 4
#define CTXFAST_VECTORS_1 4
#include "lstm/float32.h"

namespace ctxfast {
extern const LstmKernels lstm_float32_avx512 = {&forward<Float32>, &backward<Float32>};
}
