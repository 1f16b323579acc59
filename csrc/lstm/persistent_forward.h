// SPDX-License-Identifier: Apache-2.0
// The recurrence of lstm on Hopper (sm_90): all steps in one launch, weights on chip. The formulas: lstm.h.
//
// B batch, T steps, H cells, P size of h (= H without projection), R directions. All tensors are on one device, the
// stream's; the launcher does not synchronize and allocates nothing. Outputs may not overlap inputs or each other.
// A step t of row b counts if t < lengths[b]; direction 1 runs from a row's last step to 0.
#pragma once

#include "base/common.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; this header needs no CUDA

namespace ctxfast {

struct LstmPersistentDevice {
  int64_t multiprocessors = 0, major = 0, minor = 0;
  int64_t shared_per_block = 0;  // bytes, with opt-in
  bool cooperative = false;
  int64_t pairs = 0;  // clusters of two blocks, a multiprocessor each, that are resident at once
};

// How a call is laid out; `refusal` says why it cannot run, or is empty.
struct LstmPersistentForwardPlan {
  int64_t cells = 0;      // of a block: 16, 32 or 64
  int64_t blocks = 0;     // of a direction
  int64_t tile_rows = 0;  // of the batch at once: 8, 16 or 32
  bool in_pairs = false;  // two blocks of a cluster project together: where the device holds so many pairs at once
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;  // of a call
  std::string refusal;
};

LstmPersistentForwardPlan lstm_persistent_forward_plan(const LstmPersistentDevice& device, int64_t batch,
                                                       int64_t hidden, int64_t size, bool has_proj, int64_t directions);

// Of a CUDA device; asks the driver, which loads the kernels there; does not synchronize.
Status lstm_persistent_device(int device, LstmPersistentDevice* facts);

struct LstmPersistentForwardParams {
  LstmPersistentDevice device;  // the current one
  int64_t batch = 0, steps = 0, hidden = 0, size = 0, directions = 0;
  bool has_proj = false;
  DType dtype = DType::kFloat16;     // or kBFloat16: of gates, weights, h_0, output and h_n
  const void* gates[2] = {};         // (B, T, 4H): W_ih x + b, gates in the order i, f, g, o
  int64_t gates_strides[2][2] = {};  // of B and T, in elements, multiples of 2
  const void* weight_hh[2] = {};     // (4H, P), rows dense
  int64_t weight_hh_stride[2] = {};  // of a row, in elements, multiple of 8
  const void* weight_proj[2] = {};   // (P, H), rows dense; null without projection
  int64_t weight_proj_stride[2] = {};
  const int64_t* lengths = nullptr;    // (B); null: all T
  const void* h_0 = nullptr;           // (R, B, P); null: zeros
  const float* c_0 = nullptr;          // (R, B, H); null: zeros
  float cell_clip = 0, proj_clip = 0;  // 0: off

  // Written in full, zeros past a row's length.
  void* output = nullptr;          // (B, T, R P)
  int64_t output_strides[2] = {};  // of B and T, in elements, multiples of 8
  void* h_n = nullptr;             // (R, B, P): the state after each row's last step
  float* c_n = nullptr;            // (R, B, H)
  float* cells = nullptr;          // (R, B, T, H): c of every step; null: not wanted

  void* workspace = nullptr;  // plan.workspace_bytes, 16-byte aligned; need not be cleared
  int64_t workspace_bytes = 0;
};

// batch and steps at least 1.
Status lstm_persistent_forward(const LstmPersistentForwardParams& params, CUstream_st* stream);

}  // namespace ctxfast
