// SPDX-License-Identifier: Apache-2.0
// lstm: the recurrence of one layer, one or two directions, on the CPU.
//
// Per row b and step, with z (4H) = gates[b, t] + W_hh h, order i, f, g, o:
//   c = clip(sigmoid(i) tanh(g) + sigmoid(f) c, cell_clip)
//   m = sigmoid(o) tanh(c)
//   h = clip(W_proj m, proj_clip)     (h = clip(m, proj_clip) without projection; then P = H)
// The input product gates = W_ih x + b is made by the caller for all steps at once.
//
// Legend: B rows, T steps, H cells, P size of h, R directions. All sizes may be 0. All strides are in elements.
// Arithmetic is float32 whatever the weights' type. The sum over k of one output element always runs in the same order:
// a row's bits depend neither on the number of threads nor on the other rows.
#pragma once

#include <cstdint>

#include "ctxfast/common.h"
#include "ctxfast/cpu_isa.h"

namespace ctxfast {

constexpr int kLstmMaxDirections = 2;

struct LstmShape {
  int64_t hidden = 0;     // H
  int64_t proj_size = 0;  // P
  bool has_projection = false;
  DType dtype = DType::kFloat32;  // of the packed weights: kFloat32 or kBFloat16
};

struct LstmPackParams {
  LstmShape shape;
  const float* weight_hh = nullptr;  // (4H, P)
  int64_t weight_hh_strides[2] = {0, 0};
  const float* weight_proj = nullptr;  // (P, H); null without projection
  int64_t weight_proj_strides[2] = {0, 0};
  void* packed = nullptr;  // lstm_packed_bytes(shape) bytes, aligned to 4
};

struct LstmParams {
  LstmShape shape;
  int64_t batch = 0;       // B
  int64_t steps = 0;       // T
  int64_t directions = 1;  // R; direction 1 runs from each row's own last step to its first

  const float* gates[kLstmMaxDirections] = {};        // (B, T, 4H), last dimension contiguous
  int64_t gates_strides[kLstmMaxDirections][2] = {};  // of B and T
  const void* packed[kLstmMaxDirections] = {};        // from lstm_pack with the same shape
  const int64_t* lengths = nullptr;                   // (B), 0..T; null: T everywhere
  const float* h_0 = nullptr;                         // (R, B, P) contiguous; null: zeros
  const float* c_0 = nullptr;                         // (R, B, H) contiguous; null: zeros
  float cell_clip = 0;                                // 0: off
  float proj_clip = 0;                                // 0: off

  // Written in full, zeros past a row's length. Outputs may not overlap inputs or each other.
  float* output = nullptr;         // (B, T, R * P), last dimension contiguous
  int64_t output_strides[2] = {};  // of B and T
  float* h_n = nullptr;            // (R, B, P) contiguous: the state after each row's own last step
  float* c_n = nullptr;            // (R, B, H) contiguous
  float* cells = nullptr;          // (R, B, T, H) contiguous: c of every step; null: not wanted

  int64_t threads = 1;  // at most so many; fewer where there is little to do
  Isa isa = Isa::kGeneric;
};

// Bytes of one direction's packed weights; negative sizes count as 0 (lstm_pack reports them).
int64_t lstm_packed_bytes(const LstmShape& shape);

// Brings one direction's weights into the order the kernels read them in; bfloat16 rounds to nearest even.
Status lstm_pack(const LstmPackParams& params);

Status lstm_forward(const LstmParams& params);

}  // namespace ctxfast
