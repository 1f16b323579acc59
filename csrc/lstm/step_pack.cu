// SPDX-License-Identifier: Apache-2.0
// Packs lstm_step's weights, or those of them that have changed since: the host is not asked.
//
// Two kernels for all matrices of a call: one compares samples with those that were kept and notes the new ones, one
// packs. Known weights cost the reading of a sample: 0.5 MB of ELMo's 42.
#include <algorithm>

#include "base/checks.h"
#include "base/device.cuh"
#include "base/launch.cuh"
#include "lstm/step_pack.h"

namespace ctxfast {
namespace {

using namespace lstm_step;

constexpr const char* kOp = "lstm";
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 512;  // of a matrix
constexpr int64_t kLargest = int64_t{1} << 30;

enum class Order { kGates, kPlain, kGatesTransposed, kTransposed };

struct Matrix {
  const void* from;
  int64_t strides[2];
  int rows, columns;  // of the weight
  Order order;
  void* to;
  int tiles, k;  // of what is packed
  void* sample;
  int width, windows;
};

struct PackParams {
  Matrix of[4];
  uint32_t* changed;  // (4)
  int hidden;
  bool is_known;
};

template <typename T>
CTXFAST_DEVICE T entry(const Matrix& m, int row, int column) {
  if (row >= m.rows || column >= m.columns) return from_float<T>(0.0f);
  return static_cast<const T*>(m.from)[row * m.strides[0] + column * m.strides[1]];
}

// Row and k of what is packed.
template <typename T>
CTXFAST_DEVICE T packed_entry(const Matrix& m, int hidden, int row, int k) {
  switch (m.order) {
    case Order::kGates: {
      const int cell = row / 16 * 4 + row % 4, gate = row / 4 % 4;
      return cell < hidden ? entry<T>(m, gate * hidden + cell, k) : from_float<T>(0.0f);
    }
    case Order::kPlain:
      return entry<T>(m, row, k);
    case Order::kGatesTransposed:
      return k < 4 * hidden ? entry<T>(m, k % 4 * hidden + k / 4, row) : from_float<T>(0.0f);
    default:
      return entry<T>(m, k, row);
  }
}

template <typename T>
CTXFAST_DEVICE uint32_t bits(T value) {
  uint32_t word = 0;
  memcpy(&word, &value, sizeof(T));
  return word;
}

// Grid: x any number of blocks, y a matrix.
template <typename T>
__global__ void __launch_bounds__(kThreads) lstm_step_sample_kernel(const __grid_constant__ PackParams p) {
  const Matrix& m = p.of[block_index_y()];
  T* const sample = static_cast<T*>(m.sample);
  const int64_t count = int64_t{m.rows} * m.width, step = int64_t{grid_size()} * kThreads;
  for (int64_t i = int64_t{block_index()} * kThreads + thread_index(); i < count; i += step) {
    const int row = static_cast<int>(i / m.width), begin = row % m.windows * m.width, last = m.columns - m.width;
    const T now = entry<T>(m, row, (begin < last ? begin : last) + static_cast<int>(i % m.width));
    if (p.is_known) {
      if (bits(now) == bits(sample[i])) continue;
      store_relaxed(p.changed + block_index_y(), 1u);
    }
    sample[i] = now;
  }
}

// Grid: x any number of blocks, each a tile of 16 rows and round, y a matrix. 16 bits: [tile][pair][step][lane][8],
// see lstm/step.cuh; float32: rows as they are.
template <typename T>
__global__ void __launch_bounds__(kThreads) lstm_step_pack_kernel(const __grid_constant__ PackParams p) {
  constexpr int kEach = 16 / sizeof(T);
  const Matrix& m = p.of[block_index_y()];
  if (p.is_known && load_relaxed(p.changed + block_index_y()) == 0) return;
  const int vectors = 16 * m.k / kEach, in_row = m.k / kEach;
  for (int tile = block_index(); tile < m.tiles; tile += grid_size()) {
    uint4* const to = static_cast<uint4*>(m.to) + int64_t{tile} * vectors;
    for (int i = thread_index(); i < vectors; i += kThreads) {
      T values[kEach];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        int row = i / in_row, k = i % in_row * kEach + j;
        if constexpr (sizeof(T) == 2) {
          const int lane = i % 32;
          row = lane / 4 + 8 * (j / 2 % 2);
          k = 32 * (i / 64) + 8 * (lane % 4) + 4 * (i / 32 % 2) + 2 * (j / 4) + j % 2;
        }
        values[j] = packed_entry<T>(m, p.hidden, 16 * tile + row, k);
      }
      memcpy(static_cast<void*>(to + i), values, sizeof(uint4));
    }
  }
}

Matrix matrix_of(const void* from, const int64_t (&strides)[2], const SampleSize& sample, Order order,
                 const PackedSize& size, unsigned char* packed, int64_t to, int64_t sample_at) {
  return {from,
          {strides[0], strides[1]},
          static_cast<int>(sample.rows),
          static_cast<int>(sample.columns),
          order,
          packed + to,
          static_cast<int>(size.tiles),
          static_cast<int>(size.k),
          packed + sample_at,
          static_cast<int>(sample.width),
          static_cast<int>(sample.windows)};
}

template <typename T>
Status pack(const LstmStepPackParams& params, cudaStream_t stream) {
  const LstmStepShape& s = params.shape;
  const PackedPlaces at = packed_places(s, params.backward);
  auto* packed = static_cast<unsigned char*>(params.packed);
  PackParams p = {};
  p.changed = reinterpret_cast<uint32_t*>(packed + at.changed);
  p.hidden = static_cast<int>(s.hidden);
  p.is_known = params.is_known;
  int count = 0;
  int64_t tiles = 0, samples = 0;
  for (int64_t r = 0; r < s.directions; ++r) {
    p.of[count++] = matrix_of(params.weight_hh[r], params.weight_hh_strides[r], sample_hh(s),
                              params.backward ? Order::kGatesTransposed : Order::kGates, packed_hh(s, params.backward),
                              packed, at.hh[r], at.hh_sample[r]);
    if (!s.has_proj) continue;
    p.of[count++] = matrix_of(params.weight_proj[r], params.weight_proj_strides[r], sample_proj(s),
                              params.backward ? Order::kTransposed : Order::kPlain, packed_proj(s, params.backward),
                              packed, at.proj[r], at.proj_sample[r]);
  }
  for (int i = 0; i < count; ++i) {
    tiles = std::max<int64_t>(tiles, p.of[i].tiles);
    samples = std::max(samples, int64_t{p.of[i].rows} * p.of[i].width);
  }
  const auto grid = [&](int64_t blocks) {
    return LaunchConfig{dim3(static_cast<unsigned>(std::min(blocks, kMaxBlocks)), static_cast<unsigned>(count)),
                        kThreads};
  };
  CTXFAST_CUDA_CHECK(kOp, clear_async(p.changed, 0, 4 * sizeof(uint32_t), stream));
  CTXFAST_CUDA_CHECK(kOp, launch(lstm_step_sample_kernel<T>, grid(ceil_div(samples, kThreads)), stream, p));
  CTXFAST_CUDA_CHECK(kOp, launch(lstm_step_pack_kernel<T>, grid(tiles), stream, p));
  return {};
}

}  // namespace

int64_t lstm_step_packed_bytes(const LstmStepShape& shape, bool backward) { return packed_places(shape, backward).end; }

Status lstm_step_pack(const LstmStepPackParams& p, CUstream_st* stream) {
  const LstmStepShape& s = p.shape;
  CTXFAST_RETURN_IF_ERROR(check_sizes(
      kOp, {{"hidden", s.hidden, 1, kLargest}, {"size", s.size, 1, kLargest}, {"directions", s.directions, 1, 2}}));
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "dtype", s.dtype, {DType::kFloat16, DType::kBFloat16, DType::kFloat32}));
  const auto alignment = static_cast<uintptr_t>(element_bytes(s.dtype));
  for (int64_t r = 0; r < s.directions; ++r) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"weight_hh", p.weight_hh[r], true, alignment},
                                                  {"weight_proj", p.weight_proj[r], s.has_proj, alignment}}));
  }
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"packed_bytes", p.packed_bytes, lstm_step_packed_bytes(s, p.backward)}}));
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"packed", p.packed, true, 16}}));
  switch (s.dtype) {
    case DType::kFloat16:
      return pack<__half>(p, stream);
    case DType::kBFloat16:
      return pack<__nv_bfloat16>(p, stream);
    default:
      return pack<float>(p, stream);
  }
}

}  // namespace ctxfast
