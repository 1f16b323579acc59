// SPDX-License-Identifier: Apache-2.0
// AVX-512F alone has no wide byte arithmetic: int8 stays with AVX2.
#define CTXFAST_LANES 16
#include "lstm/narrow.h"

namespace ctxfast {
extern const LstmKernels lstm_bfloat16_avx512 = {&forward<Bfloat16>, nullptr};
}
