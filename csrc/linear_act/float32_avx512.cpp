// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 16
#include "linear_act/float32.h"

namespace ctxfast {
extern const LinearActKernel linear_act_float32_avx512 = &forward<Vectors<Float32>>;
}
