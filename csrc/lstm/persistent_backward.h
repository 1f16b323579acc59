// SPDX-License-Identifier: Apache-2.0
// The backward of lstm's recurrence on Hopper (sm_90): all steps in one launch, weights on chip.
//
// B batch, T steps, H cells, P size of h (= H without projection), R directions. All tensors are on one device, the
// stream's; the launcher does not synchronize and allocates nothing. Outputs may not overlap inputs.
// A step t of row b counts if t < lengths[b]; direction 1 ran from a row's last step to 0.
// The weights' gradients, products over all steps of grad_gates and grad_hidden, are left to the caller.
#pragma once

#include <cstdint>

#include "base/common.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; this header needs no CUDA

namespace ctxfast {

// How a call is laid out; `refusal` says why it cannot run, or is empty.
struct LstmPersistentBackwardPlan {
  int64_t blocks = 0;           // of a direction
  int64_t workspace_bytes = 0;  // of a call
  std::string refusal;
};

LstmPersistentBackwardPlan lstm_persistent_backward_plan(int64_t batch, int64_t hidden, int64_t size, bool has_proj,
                                                         int64_t directions);

struct LstmPersistentBackwardParams {
  int64_t batch = 0, steps = 0, hidden = 0, size = 0, directions = 0;
  bool has_proj = false;
  DType dtype = DType::kFloat16;    // or kBFloat16: of weights, z, output, grad_output, grad_gates and grad_hidden
  const void* weight_hh[2] = {};    // (4H, P), 16-byte aligned, as all weights
  const void* weight_proj[2] = {};  // (P, H)
  const void* z[2] = {};            // (B, T, 4, H): gates before their nonlinearity, gate by gate
  int64_t z_strides[2][2] = {};     // of B and T, in elements
  const float* cells = nullptr;     // (R, B, T, H), after the clip
  const float* c_0 = nullptr;       // (R, B, H); null: zeros
  const void* output = nullptr;     // (B, T, R P); needed with proj_clip only
  int64_t output_strides[2] = {};
  const void* grad_output = nullptr;  // (B, T, R P); null: zeros
  int64_t grad_output_strides[2] = {};
  const float* grad_h_n = nullptr;   // (R, B, P); null: zeros
  const float* grad_c_n = nullptr;   // (R, B, H); null: zeros
  const int64_t* lengths = nullptr;  // (B); null: all T
  void* grad_gates[2] = {};          // (B, T, 4, H); 0 past a row's end
  void* grad_hidden = nullptr;       // (R, B, T, P): of h before its clip, 0 past a row's end; null: not wanted
  float* grad_h_0 = nullptr;         // (R, B, P)
  float* grad_c_0 = nullptr;         // (R, B, H)
  void* workspace = nullptr;         // plan.workspace_bytes, 16-byte aligned; need not be cleared
  int64_t workspace_bytes = 0;
  float cell_clip = 0, proj_clip = 0;  // 0: off
};

Status lstm_persistent_backward(const LstmPersistentBackwardParams& params, CUstream_st* stream);

}  // namespace ctxfast
