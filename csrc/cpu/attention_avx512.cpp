// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 16
#include "attention_body.h"

namespace ctxfast {
extern const AttentionKernel attention_float32_avx512 = &forward<Float32, false>;
extern const AttentionKernel attention_bfloat16_avx512 = &forward<Float32, true>;
}  // namespace ctxfast
