// SPDX-License-Identifier: Apache-2.0
// scalar_mix on CUDA: y = sum over k of w[k] x_k, over K tensors of n elements.
//
// The caller computes w = gamma * softmax(scalar_parameters), float32, on the device.
// Inputs, output and gradients are contiguous and of one dtype (float32, float16, bfloat16); sums are float32.
// 16-byte loads where every pointer is 16-byte aligned, single elements otherwise: the same sums, bit for bit.
// Launchers use the given stream, do not synchronize and allocate nothing; n may be 0. Results are repeatable bit for
// bit. Outputs may not overlap inputs.
#pragma once

#include <cstdint>

#include "base/common.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; this header needs no CUDA

namespace ctxfast {

constexpr int kScalarMixMaxInputs = 64;

struct ScalarMixForwardParams {
  int64_t num_inputs = 0;  // K, 1..64
  int64_t numel = 0;       // n
  DType dtype = DType::kFloat32;
  const void* inputs[kScalarMixMaxInputs] = {};  // K of (n)
  const float* weights = nullptr;                // (K)
  void* output = nullptr;                        // (n)
};

struct ScalarMixBackwardParams {
  int64_t num_inputs = 0;
  int64_t numel = 0;
  DType dtype = DType::kFloat32;
  const void* grad_output = nullptr;             // (n)
  const void* inputs[kScalarMixMaxInputs] = {};  // K of (n); read only for grad_weights
  const float* weights = nullptr;                // (K)
  void* grad_inputs[kScalarMixMaxInputs] = {};   // K of (n): w[k] grad_output; null: not wanted
  float* grad_weights = nullptr;                 // (K): sum of grad_output x_k; null: not wanted
  float* workspace = nullptr;                    // scalar_mix_workspace_bytes; needed for grad_weights only
  int64_t workspace_bytes = 0;
};

// Of the backward pass with grad_weights.
int64_t scalar_mix_workspace_bytes(int64_t num_inputs, int64_t numel);

Status scalar_mix_forward(const ScalarMixForwardParams& params, CUstream_st* stream);
Status scalar_mix_backward(const ScalarMixBackwardParams& params, CUstream_st* stream);

}  // namespace ctxfast
