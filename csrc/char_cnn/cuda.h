// SPDX-License-Identifier: Apache-2.0
// char_cnn on CUDA: y = activation(max over positions of a word's windows of (window . filter) + bias), and its
// gradients.
//
// A window is `width` consecutive characters of one word, each a vector. Equal windows at the end of a word (its
// padding repeats one character) are computed once. Nothing before the maximum is written to memory. Everything but ids
// and `at` is of one dtype (float32, float16, bfloat16) and contiguous; sums are float32, in an order that depends on
// the sizes of a word and its filters alone. NaN propagates. Launchers use the given stream, do not synchronize and
// allocate nothing. There may be no words. Outputs may not overlap inputs.
#pragma once

#include <cstdint>

#include "base/common.h"

struct CUstream_st;  // cudaStream_t is a pointer to it; this header needs no CUDA

namespace ctxfast {

constexpr int kCharCnnCudaMaxWidths = 16;
constexpr int64_t kCharCnnCudaSharedBytes = 96 * 1024;  // available to a block on every GPU from compute capability 8.0

// All filters of one width.
struct CharCnnCudaFilters {
  const void* weight = nullptr;  // (filters, size, width)
  const void* bias = nullptr;    // (filters); forward
  int32_t width = 0, filters = 0;
  float* grad_weight = nullptr;  // (filters, size, width); backward
  float* grad_bias = nullptr;    // (filters); backward
};

struct CharCnnCudaParams {
  int64_t words = 0;
  int64_t columns = 0;  // filters of all widths
  int32_t characters = 0, size = 0, vocabulary = 0;
  int32_t widths = 0;  // 1..16
  CharCnnCudaFilters filters[kCharCnnCudaMaxWidths];
  DType dtype = DType::kFloat32;
  bool is_int64 = true;         // ids; else int32
  bool is_tanh = false;         // the activation; else relu
  const void* ids = nullptr;    // (words, characters), rows of the table; one outside it traps
  const void* table = nullptr;  // (vocabulary, size)
  void* y = nullptr;            // (words, columns); forward
  int32_t* at = nullptr;        // (words, columns): where the first largest window starts; forward: may be null
  const float* grad = nullptr;  // (words, columns), before the activation; backward
  float* grad_words = nullptr;  // (words, characters, size); backward
};

// The least shared memory of a block for filters up to this width; more than kCharCnnCudaSharedBytes is an error.
int64_t char_cnn_cuda_shared_bytes(int64_t characters, int64_t size, int64_t width);

Status char_cnn_cuda_forward(const CharCnnCudaParams& params, CUstream_st* stream);
// Gradients of the words' vectors, of every filter and of every bias; all are written.
Status char_cnn_cuda_backward(const CharCnnCudaParams& params, CUstream_st* stream);

}  // namespace ctxfast
