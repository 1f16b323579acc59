// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 16
#include "layer_norm/body.h"

namespace ctxfast {
extern const LayerNormKernel layer_norm_avx512 = &rows;
}
