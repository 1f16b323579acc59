// SPDX-License-Identifier: Apache-2.0
// Between cpu.cpp (checks, threads) and the kernels of each instruction set.
#pragma once

#include "layer_norm/layer_norm.h"

namespace ctxfast {

typedef void (*LayerNormKernel)(const LayerNormParams& params, int64_t from, int64_t to);

CTXFAST_DECLARE_KERNELS(LayerNormKernel, layer_norm)

}  // namespace ctxfast
