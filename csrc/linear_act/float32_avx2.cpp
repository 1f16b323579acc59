// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 8
#include "linear_act/float32.h"

namespace ctxfast {
extern const LinearActKernel linear_act_float32_avx2 = &forward<Vectors<Float32>>;
}
