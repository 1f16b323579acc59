// SPDX-License-Identifier: Apache-2.0
// scalar_mix, forward and backward.
//
// Bound by memory: every element is read and written once (grad_output once per group of 8 inputs).
#include <algorithm>

#include "base/checks.h"
#include "base/device.cuh"
#include "base/launch.cuh"
#include "scalar_mix/scalar_mix.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "scalar_mix";
constexpr int kThreads = 256;
// Enough blocks to fill any GPU several times over; more would only lengthen the second stage of the reduction.
constexpr int64_t kMaxBlocks = 2048;
// Elements of a thread and round, at all alignments: so a sum's order depends on n alone.
constexpr int kElements = 8;
// Inputs whose weight gradients one block sums in registers at once.
constexpr int kGroup = 8;
constexpr size_t kReduceBytes = kThreads / 32 * sizeof(float);

// kElements values in one or two 16-byte accesses.
template <typename T>
struct alignas(16) Pack {
  T values[kElements];
};

// Elements first..first+7 of n as float; those past the end are 0.
template <typename T, bool kAligned>
CTXFAST_DEVICE void load(const void* base, int64_t first, int64_t n, float (&values)[kElements]) {
  const T* from = static_cast<const T*>(base) + first;
  if (kAligned && first + kElements <= n) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from);
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] = to_float(pack.values[j]);
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) values[j] = first + j < n ? to_float(from[j]) : 0.0f;
  }
}

template <typename T, bool kAligned>
CTXFAST_DEVICE void store(void* base, int64_t first, int64_t n, const float (&values)[kElements]) {
  T* to = static_cast<T*>(base) + first;
  if (kAligned && first + kElements <= n) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < kElements; ++j) pack.values[j] = from_float<T>(values[j]);
    *reinterpret_cast<Pack<T>*>(to) = pack;
  } else {
#pragma unroll
    for (int j = 0; j < kElements; ++j) {
      if (first + j < n) to[j] = from_float<T>(values[j]);
    }
  }
}

// Grid: any number of blocks along x. Parameters: ScalarMixForwardParams.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    scalar_mix_forward_kernel(const __grid_constant__ ScalarMixForwardParams p) {
  const int64_t stride = int64_t{grid_size()} * kThreads * kElements;
  for (int64_t i = (int64_t{block_index()} * kThreads + thread_index()) * kElements; i < p.numel; i += stride) {
    float sum[kElements] = {};
#pragma unroll 2
    for (int k = 0; k < p.num_inputs; ++k) {
      float x[kElements];
      load<T, kAligned>(p.inputs[k], i, p.numel, x);
      const float weight = load_constant(p.weights + k);
#pragma unroll
      for (int j = 0; j < kElements; ++j) sum[j] = fmaf(weight, x[j], sum[j]);
    }
    store<T, kAligned>(p.output, i, p.numel, sum);
  }
}

// Sum over the block, the same order always; valid in thread 0. `shared` holds kThreads / 32 floats.
CTXFAST_DEVICE float block_sum(float value, float* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += shuffle_down(value, offset);
  block_sync();  // the previous sum's readers are done
  if (thread_index() % 32 == 0) shared[thread_index() / 32] = value;
  block_sync();
  value = 0;
  if (thread_index() == 0) {
    for (int warp = 0; warp < kThreads / 32; ++warp) value += shared[warp];
  }
  return value;
}

// Grid: blocks along x as in the forward pass; y: groups of kGroup inputs. Writes grad_inputs, and one partial sum per
// input and block into the workspace (K, grid_size()). Shared memory: 32 bytes.
template <typename T, bool kAligned, bool kGradWeights>
__global__ void __launch_bounds__(kThreads)
    scalar_mix_backward_kernel(const __grid_constant__ ScalarMixBackwardParams p) {
  const int first_input = block_index_y() * kGroup;
  const int64_t stride = int64_t{grid_size()} * kThreads * kElements;
  [[maybe_unused]] float sum[kGroup] = {};
  for (int64_t i = (int64_t{block_index()} * kThreads + thread_index()) * kElements; i < p.numel; i += stride) {
    float grad[kElements];
    load<T, kAligned>(p.grad_output, i, p.numel, grad);
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int k = first_input + g;
      if (k >= p.num_inputs) break;
      if (kGradWeights) {
        float x[kElements];
        load<T, kAligned>(p.inputs[k], i, p.numel, x);
#pragma unroll
        for (int j = 0; j < kElements; ++j) sum[g] = fmaf(grad[j], x[j], sum[g]);
      }
      if (p.grad_inputs[k] != nullptr) {
        const float weight = load_constant(p.weights + k);
        float dx[kElements];
#pragma unroll
        for (int j = 0; j < kElements; ++j) dx[j] = weight * grad[j];
        store<T, kAligned>(p.grad_inputs[k], i, p.numel, dx);
      }
    }
  }
  if constexpr (kGradWeights) {
#pragma unroll
    for (int g = 0; g < kGroup; ++g) {
      const int k = first_input + g;
      if (k >= p.num_inputs) break;
      const float total = block_sum(sum[g], reinterpret_cast<float*>(shared_memory()));
      if (thread_index() == 0) p.workspace[int64_t{k} * grid_size() + block_index()] = total;
    }
  }
}

struct ReduceParams {
  const float* partial;  // (K, blocks)
  int blocks;
  float* grad_weights;  // (K)
};

// Grid: one block per input. partial (K, blocks) -> grad_weights (K). Shared memory: 32 bytes.
__global__ void __launch_bounds__(kThreads) scalar_mix_reduce_kernel(const __grid_constant__ ReduceParams p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  float sum = 0;
  for (int b = thread_index(); b < p.blocks; b += kThreads) sum += p.partial[int64_t{block_index()} * p.blocks + b];
  const float total = block_sum(sum, shared);
  if (thread_index() == 0) p.grad_weights[block_index()] = total;
}

int64_t blocks_for(int64_t numel) { return std::min(ceil_div(numel, kThreads * kElements), kMaxBlocks); }

bool aligned16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// What forward and backward have in common.
template <typename P>
Status check(const P& p) {
  CTXFAST_RETURN_IF_ERROR(
      check_sizes(kOp, {{"the number of inputs", p.num_inputs, 1, kScalarMixMaxInputs}, {"numel", p.numel}}));
  return check_dtype(kOp, "dtype", p.dtype, {DType::kFloat32, DType::kFloat16, DType::kBFloat16});
}

template <typename T>
cudaError_t launch_forward(const ScalarMixForwardParams& p, bool aligned, cudaStream_t stream) {
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks_for(p.numel))), kThreads};
  return launch(aligned ? scalar_mix_forward_kernel<T, true> : scalar_mix_forward_kernel<T, false>, config, stream, p);
}

template <typename T, bool kAligned>
cudaError_t launch_backward_as(const ScalarMixBackwardParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_for(p.numel)), static_cast<unsigned>(ceil_div(p.num_inputs, kGroup)));
  const LaunchConfig config{grid, kThreads, kReduceBytes};
  return launch(p.grad_weights != nullptr ? scalar_mix_backward_kernel<T, kAligned, true>
                                          : scalar_mix_backward_kernel<T, kAligned, false>,
                config, stream, p);
}

template <typename T>
cudaError_t launch_backward(const ScalarMixBackwardParams& p, bool aligned, cudaStream_t stream) {
  return aligned ? launch_backward_as<T, true>(p, stream) : launch_backward_as<T, false>(p, stream);
}

}  // namespace

int64_t scalar_mix_workspace_bytes(int64_t num_inputs, int64_t numel) {
  return num_inputs > 0 && numel > 0 ? num_inputs * blocks_for(numel) * static_cast<int64_t>(sizeof(float)) : 0;
}

Status scalar_mix_forward(const ScalarMixForwardParams& p, CUstream_st* stream) {
  const Status checked = check(p);
  if (!checked.ok() || p.numel == 0) return checked;
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"weights", p.weights}, {"output", p.output}}));
  bool aligned = aligned16(p.output);
  for (int64_t k = 0; k < p.num_inputs; ++k) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"an input", p.inputs[k]}}));
    aligned = aligned && aligned16(p.inputs[k]);
  }
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::kFloat32:
      error = launch_forward<float>(p, aligned, stream);
      break;
    case DType::kFloat16:
      error = launch_forward<__half>(p, aligned, stream);
      break;
    default:
      error = launch_forward<__nv_bfloat16>(p, aligned, stream);
      break;
  }
  CTXFAST_CUDA_CHECK(kOp, error);
  return {};
}

Status scalar_mix_backward(const ScalarMixBackwardParams& p, CUstream_st* stream) {
  CTXFAST_RETURN_IF_ERROR(check(p));
  const int64_t needed = p.grad_weights != nullptr ? scalar_mix_workspace_bytes(p.num_inputs, p.numel) : 0;
  if (p.workspace_bytes < needed || (needed > 0 && p.workspace == nullptr)) {
    return invalid(kOp, "workspace", std::to_string(p.workspace ? p.workspace_bytes : 0) + " bytes",
                   std::to_string(needed) + " bytes, see scalar_mix_workspace_bytes");
  }
  if (p.numel > 0) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"grad_output", p.grad_output}, {"weights", p.weights}}));
    bool aligned = aligned16(p.grad_output);
    for (int64_t k = 0; k < p.num_inputs; ++k) {
      CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"an input", p.inputs[k], p.grad_weights != nullptr}}));
      aligned = aligned && aligned16(p.inputs[k]) && aligned16(p.grad_inputs[k]);
    }
    cudaError_t error = cudaErrorInvalidValue;
    switch (p.dtype) {
      case DType::kFloat32:
        error = launch_backward<float>(p, aligned, stream);
        break;
      case DType::kFloat16:
        error = launch_backward<__half>(p, aligned, stream);
        break;
      default:
        error = launch_backward<__nv_bfloat16>(p, aligned, stream);
        break;
    }
    CTXFAST_CUDA_CHECK(kOp, error);
  }
  if (p.grad_weights != nullptr) {
    const ReduceParams reduce{p.workspace, static_cast<int>(blocks_for(p.numel)), p.grad_weights};
    const LaunchConfig config{dim3(static_cast<unsigned>(p.num_inputs)), kThreads, kReduceBytes};
    CTXFAST_CUDA_CHECK(kOp, launch(scalar_mix_reduce_kernel, config, stream, reduce));
  }
  return {};
}

}  // namespace ctxfast
