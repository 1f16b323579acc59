// SPDX-License-Identifier: Apache-2.0
// transformer_layer on the CPU, forward: one post-LN encoder layer over packed tokens, in one parallel region.
//
//   h = LayerNorm(x + project(attention(qkv(x)))),  y = LayerNorm(h + narrow(activation(widen(h))))
//
// Each part computes what it computes alone (linear_act.h, attention.h, layer_norm.h), bit for bit: in float32, and in
// bfloat16 on one instruction set, a sequence's bits depend on nothing but its rows. Rows are contiguous; y may not
// overlap an input. Beyond the arguments, memory for 3 hidden elements a token, and for the rest of at most 768 tokens.
#pragma once

#include <cstdint>

#include "ctxfast/common.h"
#include "ctxfast/cpu_isa.h"
#include "ctxfast/linear_act.h"

namespace ctxfast {

// A product's weights, packed as linear_act.h says.
struct TransformerLayerProduct {
  const void* packed = nullptr;
  const float* scales = nullptr;  // int8
  const int32_t* sums = nullptr;  // int8
  const void* bias = nullptr;     // (out), may be null
};

struct TransformerLayerNorm {
  const void* weight = nullptr;  // (hidden)
  const void* bias = nullptr;    // (hidden)
};

struct TransformerLayerParams {
  int64_t tokens = 0, hidden = 0, heads = 0, intermediate = 0, sequences = 0;
  DType type = DType::kFloat32;  // all but packed weights: float32 or bfloat16
  DType held = DType::kFloat32;  // packed weights: int8, or what x is
  Activation activation = Activation::kGelu;
  float eps = 0;
  const void* x = nullptr;           // (tokens, hidden)
  const void* cu_seqlens = nullptr;  // (sequences + 1): rises from 0 to tokens
  bool is_int64 = false;             // cu_seqlens; else int32
  TransformerLayerProduct qkv, project, widen, narrow;
  TransformerLayerNorm attention_norm, output_norm;
  void* y = nullptr;  // (tokens, hidden)
  int64_t threads = 1;
  Isa isa = Isa::kGeneric;
};

Status transformer_layer_forward(const TransformerLayerParams& params);

}  // namespace ctxfast
