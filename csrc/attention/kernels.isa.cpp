// SPDX-License-Identifier: Apache-2.0
// attention's kernels. Only the forward has a form for bfloat16 instructions: the backward is float32 throughout.
//
// sets: generic avx2 avx512 avx512bf16
#include "attention/backward.h"
#include "attention/forward.h"

namespace ctxfast {
#if defined(CTXFAST_DOT_BF16)
CTXFAST_KERNELS(AttentionKernel, attention_bfloat16) = &forward<Bfloat16, true>;
#else
CTXFAST_KERNELS(AttentionKernel, attention_float32) = &forward<Float32, false>;
CTXFAST_KERNELS(AttentionKernel, attention_bfloat16) = &forward<Float32, true>;
CTXFAST_KERNELS(AttentionKernel, attention_backward_float32) = &backward<false>;
CTXFAST_KERNELS(AttentionKernel, attention_backward_bfloat16) = &backward<true>;
#endif
}  // namespace ctxfast
