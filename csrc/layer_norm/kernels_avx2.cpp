// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 8
#include "layer_norm/body.h"

namespace ctxfast {
extern const LayerNormKernel layer_norm_avx2 = &rows;
}
