// SPDX-License-Identifier: Apache-2.0
// Between cpu.cpp (checks, threads) and the kernels of each instruction set.
#pragma once

#include "char_cnn/char_cnn.h"

namespace ctxfast {

// 32 filters of one width.
struct CharCnnPanel {
  const CharCnnFilters* filters;
  const float* packed;    // [place][32]
  int64_t first;          // of the filters of this width
  int64_t column, count;  // in y
};

struct CharCnnJob {
  const CharCnnParams* params;
  const CharCnnPanel* panels;
  int64_t columns, widest;  // of y; characters of the widest filter
};

struct CharCnnKernels {
  // Words from..to, panels first..last.
  void (*forward)(const CharCnnJob& job, int64_t from, int64_t to, int64_t first, int64_t last);
  // Gradients of words from..to.
  void (*backward_words)(const CharCnnJob& job, int64_t from, int64_t to);
  // Gradients of the filters in columns from..to.
  void (*backward_filters)(const CharCnnJob& job, int64_t from, int64_t to);
};

CTXFAST_DECLARE_KERNELS(CharCnnKernels, char_cnn)

}  // namespace ctxfast
