// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 4
#include "attention_body.h"

namespace ctxfast {
extern const AttentionKernel attention_float32_generic = &forward<Float32, false>;
extern const AttentionKernel attention_bfloat16_generic = &forward<Float32, true>;
}  // namespace ctxfast
