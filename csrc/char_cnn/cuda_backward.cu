// SPDX-License-Identifier: Apache-2.0
// char_cnn, backward.
//
// A filter's gradient at a word reaches one window only, the largest. One kernel adds up each word's gradient, one each
// filter's; both in a fixed order, without atomics.
#include "char_cnn/cuda.cuh"

namespace ctxfast {
namespace {

constexpr int kThreads = 256;
constexpr int kFilterThreads = 128;  // places of a window: ELMo's widest has 112
constexpr int64_t kMaxBlocks = 4096;

struct Words {
  CharCnnCudaParams p;
  int32_t lanes;   // threads side by side along a character: 8, 16 or 32
  int32_t groups;  // of such threads, each with a sum of its own
};

// Grid: any number of blocks; a word a block and round. Shared memory: a word (characters, size) for each group. A
// group takes every groups-th filter; a thread of it adds to its own numbers of every character only, so nothing is
// waited for.
template <typename T>
__global__ void __launch_bounds__(kThreads) char_cnn_words_kernel(const __grid_constant__ Words w) {
  const CharCnnCudaParams& p = w.p;
  float* const sums = reinterpret_cast<float*>(shared_memory());
  const int length = p.characters * p.size, group = thread_index() / w.lanes, lane = thread_index() % w.lanes;
  float* const own = sums + group * length;
  for (int64_t word = block_index(); word < p.words; word += grid_size()) {
    for (int i = thread_index(); i < w.groups * length; i += block_size()) sums[i] = 0.0f;
    block_sync();
    int64_t column = word * p.columns;
    for (int i = 0; i < p.widths; ++i) {
      const int width = p.filters[i].width, filters = p.filters[i].filters;
      const T* const weights = static_cast<const T*>(p.filters[i].weight);
      for (int f = group; f < filters; f += w.groups) {
        const float grad = p.grad[column + f];
        if (grad == 0.0f) continue;
        float* const window = own + p.at[column + f] * p.size;
        for (int d = lane; d < p.size; d += w.lanes) {
          const T* const weight = weights + (int64_t{f} * p.size + d) * width;
          for (int j = 0; j < width; ++j) {
            window[j * p.size + d] = fmaf(grad, to_float(weight[j]), window[j * p.size + d]);
          }
        }
      }
      column += filters;
    }
    block_sync();
    for (int i = thread_index(); i < length; i += block_size()) {
      float sum = 0;
      for (int g = 0; g < w.groups; ++g) sum += sums[g * length + i];
      p.grad_words[word * length + i] = sum;
    }
    block_sync();  // the sums are read
  }
}

// Grid: a block a filter. A thread adds up one place of the filter at a time over all words, in their order; a warp
// reads the gradients of 32 words at once.
template <typename T>
__global__ void __launch_bounds__(kFilterThreads) char_cnn_filters_kernel(const __grid_constant__ CharCnnCudaParams p) {
  int which = 0, f = block_index();
  while (f >= p.filters[which].filters) f -= p.filters[which++].filters;
  const CharCnnCudaFilters& filters = p.filters[which];
  const int terms = p.size * filters.width, lane = lane_index();
  for (int first = 0; first < terms; first += kFilterThreads) {
    const int place = first + thread_index(), used = place < terms ? place : 0;
    const int d = used / filters.width, j = used % filters.width;
    float sum = 0, bias = 0;
    for (int64_t base = 0; base < p.words; base += 32) {
      const int64_t mine = (base + lane) * p.columns + block_index();
      const bool is_there = base + lane < p.words;
      const float grad_of_lane = is_there ? p.grad[mine] : 0.0f;
      const int at_of_lane = is_there ? p.at[mine] : 0;
#pragma unroll 4
      for (int i = 0; i < 32; ++i) {
        const float grad = shuffle(grad_of_lane, i);
        const int at = shuffle(at_of_lane, i);
        if (grad == 0.0f) continue;
        const int64_t id = character(p, base + i, at + j);
        sum = fmaf(grad, to_float(static_cast<const T*>(p.table)[id * p.size + d]), sum);
        bias += grad;
      }
    }
    if (place < terms) filters.grad_weight[int64_t{f} * terms + place] = sum;
    if (place == 0) filters.grad_bias[f] = bias;
  }
}

template <typename T>
cudaError_t launch_both(const CharCnnCudaParams& p, cudaStream_t stream) {
  const int64_t word = 4 * int64_t{p.characters} * p.size;
  Words w = {p, p.size <= 8 ? 8 : p.size <= 16 ? 16 : 32, 0};
  w.groups = static_cast<int32_t>(std::min<int64_t>(kThreads / w.lanes, kCharCnnCudaSharedBytes / word));
  const LaunchConfig words{dim3(static_cast<unsigned>(std::min(p.words, kMaxBlocks))),
                           static_cast<unsigned>(w.groups * w.lanes), static_cast<size_t>(w.groups * word)};
  if (p.words > 0) {
    const cudaError_t error = launch(char_cnn_words_kernel<T>, words, stream, w);
    if (error != cudaSuccess) return error;
  }
  const LaunchConfig filters{dim3(static_cast<unsigned>(p.columns)), kFilterThreads};
  return launch(char_cnn_filters_kernel<T>, filters, stream, p);
}

}  // namespace

Status char_cnn_cuda_backward(const CharCnnCudaParams& p, CUstream_st* stream) {
  const Status checked = check(p, false);
  if (!checked.ok() || p.columns == 0) return checked;
  CTXFAST_CUDA_CHECK(kOp, p.dtype == DType::kFloat32   ? launch_both<float>(p, stream)
                          : p.dtype == DType::kFloat16 ? launch_both<__half>(p, stream)
                                                       : launch_both<__nv_bfloat16>(p, stream));
  return {};
}

}  // namespace ctxfast
