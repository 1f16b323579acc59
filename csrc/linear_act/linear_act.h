// SPDX-License-Identifier: Apache-2.0
// linear_act on the CPU, forward: y = activation(x W^T + b) over packed float32, bfloat16 or int8 weights; gated, y =
// activation(x A^T + a) (x B^T + b), one product of both halves W = (A, B).
//
// Packed weights lie in panels of 32 output columns. A panel is [tile][2][16][16] of 32-bit words: tiles of 16 words
// along the input, two halves of 16 columns, words, columns. A word holds one input (float32), two
// (bfloat16, the lower in the low half) or four (int8, the lowest in the low byte). Both sizes are padded with zero
// weights. Gated, a panel holds 16 columns of A in its first half and the same of B in its second.
//
// float32 and bfloat16 sums are float32, in one order: a row's bits do not depend on the rows beside it nor on threads.
// int8: each row of x is quantized in steps of 1/127 of its largest magnitude; the same bits on every instruction set.
// Rows of x and y are contiguous; y may not overlap an input.
#pragma once

#include <cstdint>

#include "base/common.h"
#include "base/isa.h"

namespace ctxfast {

constexpr int kLinearActPanel = 32;
constexpr int kLinearActTileWords = 16;

enum class Activation { kNone, kGelu, kGeluTanh, kRelu, kTanh, kSilu };
constexpr const char* kActivationNames[] = {"none", "gelu", "gelu_tanh", "relu", "tanh", "silu"};

struct LinearActParams {
  int64_t rows = 0, in = 0, out = 0;  // out: columns of W, so gated twice those of y
  DType weight_dtype = DType::kInt8;  // int8, or what x is
  DType io_dtype = DType::kFloat32;   // x, bias and y: float32 or bfloat16
  Activation activation = Activation::kNone;
  bool is_gated = false;
  const void* x = nullptr;        // (rows, in), rows stride_x apart
  int64_t stride_x = 0;           // elements
  const void* packed = nullptr;   // linear_act_packed_bytes, on a cache line
  const float* scales = nullptr;  // int8: (out padded to 32), the step of each column as packed
  const int32_t* sums = nullptr;  // int8: (out padded to 32), 128 times the sum of each column's steps
  const void* bias = nullptr;     // (out), gated (a, b); may be null
  void* y = nullptr;              // (rows, out), gated (rows, out / 2)
  int64_t threads = 1;
  Isa isa = best_isa();
};

int64_t linear_act_packed_bytes(int64_t in, int64_t out, DType weight_dtype);
Status linear_act_forward(const LinearActParams& params);

}  // namespace ctxfast
