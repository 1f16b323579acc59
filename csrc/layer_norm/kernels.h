// SPDX-License-Identifier: Apache-2.0
// Between cpu.cpp (checks, threads) and the kernels of each instruction set.
#pragma once

#include "layer_norm/layer_norm.h"

namespace ctxfast {

typedef void (*LayerNormKernel)(const LayerNormParams& params, int64_t from, int64_t to);

// The best kernel that `isa` includes.
LayerNormKernel layer_norm_kernel_for(Isa isa);

extern const LayerNormKernel layer_norm_generic, layer_norm_avx2, layer_norm_avx512;

}  // namespace ctxfast
