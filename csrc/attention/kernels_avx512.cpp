// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 16
#include "attention/backward.h"

namespace ctxfast {
extern const AttentionKernel attention_float32_avx512 = &forward<Float32, false>;
extern const AttentionKernel attention_bfloat16_avx512 = &forward<Float32, true>;
extern const AttentionKernel attention_backward_float32_avx512 = &backward<false>;
extern const AttentionKernel attention_backward_bfloat16_avx512 = &backward<true>;
}  // namespace ctxfast
