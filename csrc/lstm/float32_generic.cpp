// SPDX-License-Identifier: Apache-2.0
// The compiler's baseline: SSE2 on x86-64, NEON on aarch64, with 16 registers at least.
#define CTXFAST_LANES 4
#define CTXFAST_ROWS 3
#define CTXFAST_VECTORS 4
#define CTXFAST_VECTORS_1 8
#include "lstm/float32.h"

namespace ctxfast {
extern const LstmKernels lstm_float32_generic = {&forward<Float32>, &backward<Float32>};
}
