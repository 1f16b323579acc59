// SPDX-License-Identifier: Apache-2.0
// What char_cnn's CUDA kernels share, forward and backward: reading ids, checking arguments.
#pragma once

#include <algorithm>

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
  const auto null_argument = [](const std::string& name) { return invalid(kOp, name, "null", "a device address"); };
  if (p.words < 0) return invalid(kOp, "words", std::to_string(p.words), "0 or more");
  if (p.characters < 1) return invalid(kOp, "characters", std::to_string(p.characters), "1 or more");
  if (p.size < 1) return invalid(kOp, "size", std::to_string(p.size), "1 or more");
  if (p.widths < 1 || p.widths > kCharCnnCudaMaxWidths) {
    return invalid(kOp, "widths", std::to_string(p.widths), "1..16");
  }
  int64_t columns = 0, widest = 0;
  for (int i = 0; i < p.widths; ++i) {
    const CharCnnCudaFilters& filters = p.filters[i];
    if (filters.width < 1 || filters.width > p.characters) {
      return invalid(kOp, "width", std::to_string(filters.width), "1.." + std::to_string(p.characters));
    }
    if (filters.filters < 0) return invalid(kOp, "filters", std::to_string(filters.filters), "0 or more");
    columns += filters.filters, widest = std::max<int64_t>(widest, filters.width);
    if (filters.filters == 0) continue;
    if (!is_forward && filters.grad_weight == nullptr) return null_argument("grad_weight");
    if (!is_forward && filters.grad_bias == nullptr) return null_argument("grad_bias");
    if (p.words == 0) continue;
    if (filters.weight == nullptr) return null_argument("weight");
    if (is_forward && filters.bias == nullptr) return null_argument("bias");
  }
  if (columns != p.columns) return invalid(kOp, "columns", std::to_string(p.columns), std::to_string(columns));
  const int64_t bytes = char_cnn_cuda_shared_bytes(p.characters, p.size, widest);
  if (bytes > kCharCnnCudaSharedBytes) {
    return invalid(kOp, "the shared memory of a word and 64 filters", std::to_string(bytes) + " bytes",
                   "at most " + std::to_string(kCharCnnCudaSharedBytes));
  }
  if (p.dtype == DType::kInt8) return invalid(kOp, "dtype", "int8", "float32, float16 or bfloat16");
  if (p.words == 0 || p.columns == 0) return {};
  if (p.ids == nullptr) return null_argument("ids");
  if (p.table == nullptr) return null_argument("table");
  if (is_forward) return p.y == nullptr ? null_argument("y") : Status{};
  if (p.at == nullptr) return null_argument("at");
  if (p.grad == nullptr) return null_argument("grad");
  if (p.grad_words == nullptr) return null_argument("grad_words");
  return {};
}

}  // namespace
}  // namespace ctxfast
