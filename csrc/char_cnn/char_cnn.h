// SPDX-License-Identifier: Apache-2.0
// char_cnn on the CPU: y = activation(max over positions of a word's windows of (window . filter) + bias).
//
// A window is `width` consecutive characters of one word, each a vector. Equal windows at the end of a word (its
// padding repeats one character) are computed once: the maximum over distinct windows is the maximum over all. Packed
// weights of one width lie in panels of 32 filters, [panel][place in the window][32], float32, padded with zeros: place
// j size + d is number d of the window's character j.
//
// Sums are float32, in the order of places: a word's bits depend on nothing but the word (and the instruction set). NaN
// propagates. ids, y, at and all gradients are contiguous; outputs may not overlap inputs.
#pragma once

#include <cstdint>

#include "base/common.h"
#include "base/isa.h"

namespace ctxfast {

constexpr int kCharCnnPanel = 32;
constexpr int64_t kCharCnnMaxWord = 16384;  // floats of a word, characters times size: a thread keeps them on its stack

// All filters of one width.
struct CharCnnFilters {
  int64_t width = 0, filters = 0;
  const float* packed = nullptr;  // forward: panels of 32 filters
  const void* bias = nullptr;     // forward: (filters)
  const float* rows = nullptr;    // backward: (filters, width, size)
  float* grad_rows = nullptr;     // backward: (filters, width, size)
  float* grad_bias = nullptr;     // backward: (filters)
};

struct CharCnnParams {
  int64_t words = 0, characters = 0, size = 0, vocabulary = 0;
  DType io_dtype = DType::kFloat32;  // table, biases and y: float32 or bfloat16
  bool is_int64 = true;              // ids; else int32
  const void* ids = nullptr;         // (words, characters), rows of the table
  const void* table = nullptr;       // (vocabulary, size), rows stride_table apart
  int64_t stride_table = 0;
  int64_t widths = 0;
  const CharCnnFilters* filters = nullptr;  // (widths)
  bool is_tanh = false;                     // the activation; else relu
  void* y = nullptr;                        // forward: (words, filters of all widths)
  int32_t* at = nullptr;        // (words, filters of all widths): the first largest window's start; forward:
                                //   may be null
  const float* grad = nullptr;  // backward: (words, filters of all widths), before activation
  float* grad_words = nullptr;  // backward: (words, characters, size)
  int64_t threads = 1;
  Isa isa = best_isa();
};

// An id outside the table is an error, raised before anything is written.
Status char_cnn_forward(const CharCnnParams& params);
// Gradients of the words' vectors, of every filter and of every bias; all are written.
Status char_cnn_backward(const CharCnnParams& params);

}  // namespace ctxfast
