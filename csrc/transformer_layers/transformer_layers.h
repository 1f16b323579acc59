// SPDX-License-Identifier: Apache-2.0
// transformer_layers on the CPU, forward: post-LN encoder layers over packed tokens, one after another, in one parallel
// region. A layer:
//
//   h = LayerNorm(x + project(attention(qkv(x)))),  y = LayerNorm(h + narrow(activation(widen(h))))
//
// Each part gives the bits that it gives alone (linear_act/linear_act.h, attention/attention.h,
// layer_norm/layer_norm.h): in float32, and in bfloat16 on one instruction set, a sequence's bits depend on nothing but
// its rows. Rows are contiguous; no output may overlap an input. The workspace holds 3 rows of hidden elements a token
// (4 with several layers of which only the last is wanted), and all else for at most 768 tokens.
#pragma once

#include <cstdint>

#include "base/common.h"
#include "base/isa.h"
#include "linear_act/linear_act.h"

namespace ctxfast {

// A product's weights, packed as linear_act/linear_act.h says.
struct TransformerProduct {
  const void* packed = nullptr;
  const float* scales = nullptr;  // int8
  const int32_t* sums = nullptr;  // int8
  const void* bias = nullptr;     // (out), may be null
};

struct TransformerNorm {
  const void* weight = nullptr;  // (hidden)
  const void* bias = nullptr;    // (hidden)
};

// Twenty addresses and nothing else: callers may store them as a row of 64-bit integers.
struct TransformerLayer {
  TransformerProduct qkv, project;
  TransformerNorm attention_norm;
  TransformerProduct widen, narrow;
  TransformerNorm output_norm;
};
static_assert(sizeof(TransformerLayer) == 20 * sizeof(void*), "no padding");

struct TransformerLayersParams {
  int64_t tokens = 0, hidden = 0, heads = 0, intermediate = 0, sequences = 0;
  DType io_dtype = DType::kFloat32;      // all but packed weights: float32 or bfloat16
  DType weight_dtype = DType::kFloat32;  // packed weights: int8, or what x is
  Activation activation = Activation::kGelu;
  float eps = 0;
  const void* x = nullptr;               // (tokens, hidden)
  const void* cu_seqlens = nullptr;      // (sequences + 1): rises from 0 to tokens
  bool is_int64 = false;                 // cu_seqlens; else int32
  const float* relative_bias = nullptr;  // (heads, 2 reach - 1) or null: of all layers, see attention/attention.h
  int64_t reach = 0;
  const TransformerLayer* layers = nullptr;
  int64_t count = 0;         // of layers, 1 or more
  bool all_layers = false;   // every layer's rows are wanted; else the last layer's
  void* const* y = nullptr;  // (tokens, hidden) for each layer that is wanted
  int64_t threads = 1;
  Isa isa = best_isa();
};

Status transformer_layers_forward(const TransformerLayersParams& params);

}  // namespace ctxfast
