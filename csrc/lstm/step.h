// SPDX-License-Identifier: Apache-2.0
// The recurrence of lstm on any GPU from sm_80 and of any size, forward and backward: one launch per step for both
// directions, two with a projection.
//
// B batch, T steps, H cells, P size of h (= H without projection), R directions. Per row b and step t < lengths[b],
// with z = gates[b, t] + W_hh h in the order i, f, g, o:
//   c = clip(sigmoid(i) tanh(g) + sigmoid(f) c, cell_clip), m = sigmoid(o) tanh(c), h = clip(W_proj m, proj_clip)
// (h = clip(m, proj_clip) without projection). Direction 1 runs from a row's last step to 0; past its end a row
// keeps h and c. 16-bit weights and h, or float32; sums, c and gradients of c and h are float32.
// Launchers use the given stream, do not synchronize and allocate nothing. Outputs may not overlap inputs. Sums run in
// an order fixed by the sizes: results are repeatable bit for bit, and a row's do not depend on the others.
#pragma once

#include <cstdint>

#include "base/common.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; this header needs no CUDA

namespace ctxfast {

struct LstmStepShape {
  int64_t batch = 0, steps = 0, hidden = 0, size = 0, directions = 1;
  bool has_proj = false;
  DType dtype = DType::kFloat16;  // kFloat16, kBFloat16 or kFloat32: of every tensor that is not float below
};

// Elements of one direction's packed weights; see cuda_step.py for their order.
//   gates: W_hh for the forward pass; proj: W_proj, for both (0 without projection)
//   gates_t, proj_t: their transposes, for the backward pass
struct LstmStepPacked {
  int64_t gates = 0, proj = 0, gates_t = 0, proj_t = 0;
};
LstmStepPacked lstm_step_packed(const LstmStepShape& shape);

// Bytes of the workspace, 16-byte aligned; need not be cleared.
int64_t lstm_step_workspace_bytes(const LstmStepShape& shape, bool backward);

struct LstmStepForwardParams {
  LstmStepShape shape;
  const void* gates[2] = {};           // (B, T, H, 4): W_ih x + b, a cell's four gates side by side
  int64_t gates_strides[2][2] = {};    // of B and T, in elements, multiples of 4
  const void* packed_gates[2] = {};    // shape.packed.gates
  const void* packed_proj[2] = {};     // or null
  const int64_t* lengths = nullptr;    // (B), 0..T; null: T everywhere
  const void* h_0 = nullptr;           // (R, B, P) contiguous; null: zeros
  const float* c_0 = nullptr;          // (R, B, H) contiguous; null: zeros
  float cell_clip = 0, proj_clip = 0;  // 0: off
  void* output = nullptr;              // (B, T, R P) contiguous; 0 past a row's end
  void* h_n = nullptr;                 // (R, B, P)
  float* c_n = nullptr;                // (R, B, H)
  float* cells = nullptr;              // (R, B, T, H): c of every step, 0 past a row's end; null: not wanted
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

struct LstmStepBackwardParams {
  LstmStepShape shape;
  const void* z[2] = {};         // (B, T, H, 4): gates before their nonlinearity
  int64_t z_strides[2][2] = {};  // of B and T, multiples of 4
  const void* packed_gates_t[2] = {};
  const void* packed_proj_t[2] = {};  // or null
  const int64_t* lengths = nullptr;
  const float* c_0 = nullptr;
  const float* cells = nullptr;       // as stored by the forward pass
  const void* output = nullptr;       // (B, T, R P) contiguous; read with proj_clip only
  const void* grad_output = nullptr;  // (B, T, R P) contiguous; null: zeros
  const float* grad_h_n = nullptr;    // (R, B, P); null: zeros
  const float* grad_c_n = nullptr;    // (R, B, H); null: zeros
  float cell_clip = 0, proj_clip = 0;
  void* grad_gates[2] = {};     // (B, T, H, 4) contiguous; 0 past a row's end
  void* grad_hidden = nullptr;  // (R, B, T, P): of h before its clip, 0 past a row's end; null: not wanted
  float* grad_h_0 = nullptr;    // (R, B, P)
  float* grad_c_0 = nullptr;    // (R, B, H)
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

Status lstm_step_forward(const LstmStepForwardParams& params, CUstream_st* stream);
Status lstm_step_backward(const LstmStepBackwardParams& params, CUstream_st* stream);

}  // namespace ctxfast
