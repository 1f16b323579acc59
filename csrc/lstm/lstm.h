// SPDX-License-Identifier: Apache-2.0
// lstm on the CPU: one layer, one or two directions.
//
// Per row b and step, with z (4H) = W_ih x + b + W_hh h, in the order i, f, g, o:
//   c = clip(sigmoid(i) tanh(g) + sigmoid(f) c, cell_clip)
//   m = sigmoid(o) tanh(c)
//   h = clip(W_proj m, proj_clip)     (h = clip(m, proj_clip) without projection; then P = H)
//
// weight_dtype is the dtype of both factors of every matrix product; all else is float32:
//   kFloat32   unrounded
//   kBFloat16  weights and vectors rounded to bfloat16 (nearest, ties to even), products summed in float32
//   kInt8      weights rounded to 127 steps of their row's largest magnitude, vectors to 127 steps of the vector's
//              largest magnitude (ties to even), products summed exactly, in int32. A vector that holds a NaN or an
//              infinity gives NaN.
//
// Legend: B rows, T steps, I inputs, H cells, P size of h, R directions. All sizes may be 0. Strides are in elements.
// The sum over k of one output element always runs in the same order: a row's bits depend neither on the number of
// threads nor on the other rows. int8 gives the same bits on every instruction set, bfloat16 on all but AMX, whose
// tiles sum in another order.
#pragma once

#include <cstdint>

#include "base/common.h"
#include "base/isa.h"

namespace ctxfast {

constexpr int kLstmMaxDirections = 2;

struct LstmShape {
  int64_t hidden = 0;     // H
  int64_t proj_size = 0;  // P
  bool has_projection = false;
  DType weight_dtype = DType::kFloat32;  // kFloat32, kBFloat16 or kInt8
};

struct LstmPackParams {
  LstmShape shape;
  const float* weight_hh = nullptr;  // (4H, P)
  int64_t weight_hh_strides[2] = {0, 0};
  const float* weight_proj = nullptr;  // (P, H); null without projection
  int64_t weight_proj_strides[2] = {0, 0};
  void* packed = nullptr;  // as many bytes as lstm_(backward_)packed_bytes(shape), aligned to 4; 64 is faster
  int64_t threads = 1;
};

struct LstmParams {
  LstmShape shape;
  int64_t batch = 0;                                  // B
  int64_t steps = 0;                                  // T
  int64_t directions = 1;                             // R; direction 1 runs from each row's last step to its first
  int64_t input = 0;                                  // I
  const float* x[kLstmMaxDirections] = {};            // (B, T, I), last dimension contiguous
  int64_t x_strides[kLstmMaxDirections][2] = {};      // of B and T
  const void* packed_input[kLstmMaxDirections] = {};  // from lstm_pack_input with the same H, I and weight_dtype
  const float* bias[kLstmMaxDirections] = {};         // (4H); null: none
  const void* packed[kLstmMaxDirections] = {};        // from lstm_pack with the same shape
  const int64_t* lengths = nullptr;                   // (B), 0..T; null: T everywhere
  const float* h_0 = nullptr;                         // (R, B, P) contiguous; null: zeros
  const float* c_0 = nullptr;                         // (R, B, H) contiguous; null: zeros
  float cell_clip = 0;                                // 0: off
  float proj_clip = 0;                                // 0: off

  // Written in full, zeros past a row's length. Outputs may not overlap inputs or each other.
  float* output = nullptr;          // (B, T, R * P), last dimension contiguous
  int64_t output_strides[2] = {};   // of B and T
  float* h_n = nullptr;             // (R, B, P) contiguous: the state after each row's last step
  float* c_n = nullptr;             // (R, B, H) contiguous
  float* cells = nullptr;           // (R, B, T, H) contiguous: c of every step; null: not wanted
  void* z = nullptr;                // (R, B, T, 4H) contiguous: z of every step; null: not wanted
  DType z_dtype = DType::kFloat32;  // or kBFloat16

  int64_t threads = 1;  // at most; fewer where there is little to do
  Isa isa = best_isa();
};

struct LstmInputShape {
  int64_t hidden = 0;  // H
  int64_t input = 0;   // I
  DType weight_dtype = DType::kFloat32;
};

struct LstmPackInputParams {
  LstmInputShape shape;
  const float* weight_ih = nullptr;  // (4H, I)
  int64_t weight_ih_strides[2] = {0, 0};
  void* packed = nullptr;  // lstm_input_packed_bytes(shape) bytes, aligned to 4; 64 is faster
  int64_t threads = 1;
};

// Bytes of one direction's packed weights; negative sizes count as 0 (lstm_pack reports them).
int64_t lstm_packed_bytes(const LstmShape& shape);

// Packs one direction's weights into the layout that the kernels read, rounded to weight_dtype.
Status lstm_pack(const LstmPackParams& params);

int64_t lstm_input_packed_bytes(const LstmInputShape& shape);
Status lstm_pack_input(const LstmPackInputParams& params);

Status lstm_forward(const LstmParams& params);

// The backward of one direction: gradients of z at every step, of the bias and of the initial state. Gradients that are
// products over all steps (of the weights and of x) are left to the caller: their factors are grad_z, grad_hidden and
// m. A clipped value, |c| or |h| at its bound, has no gradient. With weight_dtype kBFloat16 the recurrence's products
// have bfloat16 factors, and z, grad_z, grad_hidden and m are bfloat16 (S below); all else is float32.
struct LstmBackwardParams {
  LstmShape shape;  // weight_dtype kFloat32 or kBFloat16
  int64_t batch = 0;
  int64_t steps = 0;
  bool reverse = false;
  float cell_clip = 0;
  float proj_clip = 0;
  const int64_t* lengths = nullptr;     // (B); null: T everywhere
  const void* packed = nullptr;         // from lstm_pack_backward with the same shape
  const void* z = nullptr;              // (B, T, 4H) S, contiguous, from lstm_forward
  const float* cells = nullptr;         // (B, T, H) contiguous, from lstm_forward
  const float* c_0 = nullptr;           // (B, H) contiguous; null: zeros
  const float* output = nullptr;        // (B, T, P), last dimension contiguous
  int64_t output_strides[2] = {};       // of B and T
  const float* grad_output = nullptr;   // (B, T, P), last dimension contiguous
  int64_t grad_output_strides[2] = {};  // of B and T
  const float* grad_h_n = nullptr;      // (B, P) contiguous
  const float* grad_c_n = nullptr;      // (B, H) contiguous
  // Written in full, zeros past a row's length.
  void* grad_z = nullptr;       // (B, T, 4H) S, contiguous
  void* grad_hidden = nullptr;  // (B, T, P) S, contiguous: gradient of h before its clip
  void* m = nullptr;            // (B, T, H) S, contiguous: what was projected; null without projection
  float* grad_bias = nullptr;   // (4H): the sum of grad_z, before it is rounded, over B and T
  float* grad_h_0 = nullptr;    // (B, P) contiguous
  float* grad_c_0 = nullptr;    // (B, H) contiguous
  int64_t threads = 1;
  Isa isa = best_isa();
};

int64_t lstm_backward_packed_bytes(const LstmShape& shape);
Status lstm_pack_backward(const LstmPackParams& params);
Status lstm_backward(const LstmBackwardParams& params);

}  // namespace ctxfast
