// SPDX-License-Identifier: Apache-2.0
// What char_cnn's CUDA kernels share, forward and backward: reading ids, checking arguments.
#pragma once

#include <algorithm>

#include "base/checks.h"
#include "base/device.cuh"
#include "base/launch.cuh"
#include "char_cnn/cuda.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "char_cnn";

CTXFAST_DEVICE int64_t character(const CharCnnCudaParams& p, int64_t word, int place) {
  const int64_t at = word * p.characters + place;
  return p.is_int64 ? static_cast<const int64_t*>(p.ids)[at] : static_cast<const int32_t*>(p.ids)[at];
}

inline Status check(const CharCnnCudaParams& p, bool is_forward) {
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"words", p.words},
                                            {"characters", p.characters, 1},
                                            {"size", p.size, 1},
                                            {"widths", p.widths, 1, kCharCnnCudaMaxWidths}}));
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "dtype", p.dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}));
  int64_t columns = 0, widest = 0;
  for (int i = 0; i < p.widths; ++i) {
    const CharCnnCudaFilters& f = p.filters[i];
    CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"width", f.width, 1, p.characters}, {"filters", f.filters}}));
    columns += f.filters, widest = std::max<int64_t>(widest, f.width);
    if (f.filters == 0) continue;
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"grad_weight", f.grad_weight, !is_forward},
                                                  {"grad_bias", f.grad_bias, !is_forward},
                                                  {"weight", f.weight, p.words > 0},
                                                  {"bias", f.bias, is_forward && p.words > 0}}));
  }
  if (columns != p.columns) return invalid(kOp, "columns", std::to_string(p.columns), std::to_string(columns));
  const int64_t bytes = char_cnn_cuda_shared_bytes(p.characters, p.size, widest);
  CTXFAST_RETURN_IF_ERROR(
      check_sizes(kOp, {{"the shared memory of a word and 64 filters", bytes, 0, kCharCnnCudaSharedBytes}}));
  if (p.words == 0 || p.columns == 0) return {};
  return check_addresses(kOp, {{"ids", p.ids},
                               {"table", p.table},
                               {"y", p.y, is_forward},
                               {"at", p.at, !is_forward},
                               {"grad", p.grad, !is_forward},
                               {"grad_words", p.grad_words, !is_forward}});
}

}  // namespace
}  // namespace ctxfast
