// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 4
#include "lstm/narrow.h"

namespace ctxfast {
extern const LstmKernels lstm_bfloat16_generic = {&forward<Bfloat16>, nullptr};
extern const LstmKernels lstm_int8_generic = {&forward<Int8>, nullptr};
}  // namespace ctxfast
