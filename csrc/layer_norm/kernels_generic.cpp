// SPDX-License-Identifier: Apache-2.0
#define CTXFAST_LANES 4
#include "layer_norm/body.h"

namespace ctxfast {
extern const LayerNormKernel layer_norm_generic = &rows;
}
