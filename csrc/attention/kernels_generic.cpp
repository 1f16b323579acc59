// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 4
#include "attention/backward.h"

namespace ctxfast {
extern const AttentionKernel attention_float32_generic = &forward<Float32, false>;
extern const AttentionKernel attention_bfloat16_generic = &forward<Float32, true>;
extern const AttentionKernel attention_backward_float32_generic = &backward<false>;
extern const AttentionKernel attention_backward_bfloat16_generic = &backward<true>;
}  // namespace ctxfast
