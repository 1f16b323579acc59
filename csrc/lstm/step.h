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

// The weights as the kernels read them: packed once for many calls, of the forward pass or, transposed, of the backward
// pass. Beside them lies a sample of the weights' bits, by the rule of base/samples.h: every row in part, small weights
// whole. batch and steps of the shape do not matter.
struct LstmStepPackParams {
  LstmStepShape shape;
  bool backward = false;
  const void* weight_hh[2] = {};         // (4H, P), rows in the order i, f, g, o
  int64_t weight_hh_strides[2][2] = {};  // in elements
  const void* weight_proj[2] = {};       // (P, H), or null
  int64_t weight_proj_strides[2][2] = {};
  // Whether `packed` was written by an earlier call with these very arguments: a weight is then packed again only if
  // its sample is another one. All on the stream; the host learns nothing and waits for nothing.
  bool is_known = false;
  void* packed = nullptr;  // lstm_step_packed_bytes, 16-byte aligned
  int64_t packed_bytes = 0;
};
int64_t lstm_step_packed_bytes(const LstmStepShape& shape, bool backward);
Status lstm_step_pack(const LstmStepPackParams& params, CUstream_st* stream);

// Bytes of the workspace, 16-byte aligned; need not be cleared.
int64_t lstm_step_workspace_bytes(const LstmStepShape& shape, bool backward);

struct LstmStepForwardParams {
  LstmStepShape shape;
  const void* gates[2] = {};           // (B, T, 4, H): W_ih x + b, gate by gate
  int64_t gates_strides[2][2] = {};    // of B and T, in elements
  const void* packed = nullptr;        // by lstm_step_pack
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
  const void* z[2] = {};         // (B, T, 4, H): gates before their nonlinearity
  int64_t z_strides[2][2] = {};  // of B and T
  const void* packed = nullptr;  // by lstm_step_pack, backward
  const int64_t* lengths = nullptr;
  const float* c_0 = nullptr;
  const float* cells = nullptr;       // as stored by the forward pass
  const void* output = nullptr;       // (B, T, R P) contiguous; read with proj_clip only
  const void* grad_output = nullptr;  // (B, T, R P) contiguous; null: zeros
  const float* grad_h_n = nullptr;    // (R, B, P); null: zeros
  const float* grad_c_n = nullptr;    // (R, B, H); null: zeros
  float cell_clip = 0, proj_clip = 0;
  void* grad_gates[2] = {};     // (B, T, 4, H) contiguous; 0 past a row's end
  void* grad_hidden = nullptr;  // (R, B, T, P): of h before its clip, 0 past a row's end; null: not wanted
  float* grad_h_0 = nullptr;    // (R, B, P)
  float* grad_c_0 = nullptr;    // (R, B, H)
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

Status lstm_step_forward(const LstmStepForwardParams& params, CUstream_st* stream);
Status lstm_step_backward(const LstmStepBackwardParams& params, CUstream_st* stream);

}  // namespace ctxfast
