// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 4
#include "linear_act/narrow.h"

namespace ctxfast {
extern const LinearActKernel linear_act_bfloat16_generic = &forward<Vectors<Bfloat16>>;
extern const LinearActKernel linear_act_int8_generic = &forward<Vectors<Int8>>;
}  // namespace ctxfast
