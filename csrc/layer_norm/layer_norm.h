// SPDX-License-Identifier: Apache-2.0
// add_layer_norm, add_norm and embed_layer_norm on the CPU, forward: y = norm(sum of rows) weight + bias; the norm is
// LayerNorm's, or without its mean (RMSNorm).
//
// Row i of the sum is first[i] + shift + second[i] + ..., added in this order; a source with ids contributes its row
// ids[i]. Arithmetic is float32; the variance is computed in a second pass over the row. A row's bits depend on nothing
// but the row (and the instruction set). Rows are contiguous; no output may overlap an input. Where
// the sum is wanted it is what is normalised: rounded, in bfloat16.
#pragma once

#include <cstdint>

#include "base/common.h"
#include "base/isa.h"

namespace ctxfast {

constexpr int kLayerNormSources = 4;
constexpr int64_t kLayerNormMaxSize = 8192;

struct LayerNormSource {
  const void* rows = nullptr;
  int64_t stride = 0;         // elements between rows
  const void* ids = nullptr;  // null: row i
  int64_t count = 0;          // with ids: rows of the source
  bool is_int64 = true;       // else int32
};

struct LayerNormParams {
  int64_t rows = 0, size = 0;
  DType io_dtype = DType::kFloat32;  // everything but ids: float32 or bfloat16
  int64_t sources = 0;               // 1..4
  LayerNormSource source[kLayerNormSources];
  const void* shift = nullptr;   // (size), may be null
  const void* weight = nullptr;  // (size)
  const void* bias = nullptr;    // (size), may be null
  bool is_rms = false;           // without the mean
  float eps = 0;
  void* sum = nullptr;  // (rows, size), may be null
  void* y = nullptr;    // (rows, size)
  int64_t threads = 1;
  Isa isa = best_isa();
};

// An id outside its source is an error, raised before anything is written.
Status layer_norm_forward(const LayerNormParams& params);

}  // namespace ctxfast
