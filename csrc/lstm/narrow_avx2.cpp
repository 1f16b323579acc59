// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 8
#include "lstm/narrow.h"

namespace ctxfast {
extern const LstmKernels lstm_bfloat16_avx2 = {&forward<Bfloat16>, nullptr};
extern const LstmKernels lstm_int8_avx2 = {&forward<Int8>, nullptr};
}  // namespace ctxfast
