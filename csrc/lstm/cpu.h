// SPDX-License-Identifier: Apache-2.0
// What the host side of lstm shares: checks, sizes of packed weights, memory, threads, choice of kernels.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>

#include "base/checks.h"
#include "base/parallel.h"
#include "lstm/kernels.h"
#include "lstm/lstm.h"

namespace ctxfast {

constexpr const char* kOp = "lstm";

Status check_shape(const LstmShape& shape);
Status check_input_shape(const LstmInputShape& shape);
Status check_lengths(const int64_t* lengths, int64_t batch, int64_t steps);

// Words of a column with `size` terms; of a panel of such columns; of one block of their sums.
int64_t column_words(DType dtype, int64_t size);
int64_t panel_words(DType dtype, int64_t size);
int64_t block_words(DType dtype);
// Words of all gate panels, and of all projection panels.
int64_t gate_words(const LstmShape& shape);
int64_t proj_words(const LstmShape& shape);

// The best kernels that `isa` includes.
const LstmKernels& kernels_for(DType dtype, Isa isa);

// Threads worth starting for `work` multiply-adds between two barriers.
int64_t threads_for(int64_t work, int64_t most);
Status run_on(int64_t threads, void (*body)(void*, int, int), void* call);

constexpr size_t kWorkspaceAlignment = 64;

// One allocation for everything a call needs besides the caller's arrays.
class Workspace {
 public:
  // Floats (or 32-bit words), aligned; returns where they will be.
  size_t reserve(int64_t words) {
    const size_t at = size_;
    size_ += static_cast<size_t>(round_up(words, kWorkspaceAlignment / 4));
    return at;
  }
  Status allocate() {
    memory_.reset(
        static_cast<float*>(std::aligned_alloc(kWorkspaceAlignment, std::max<size_t>(size_ * 4, kWorkspaceAlignment))));
    if (memory_) return {};
    return runtime_error(kOp, "no memory for a workspace of " + std::to_string(size_ * 4) + " bytes.");
  }
  float* floats(size_t at) const { return memory_.get() + at; }
  uint32_t* words(size_t at) const { return reinterpret_cast<uint32_t*>(memory_.get() + at); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  size_t size_ = 0;
  std::unique_ptr<float, Free> memory_;
};

// Rows in order of falling length, those of equal length in the caller's order.
void sort_rows(const int64_t* lengths, int64_t batch, int64_t steps, int64_t* row, int64_t* length);

}  // namespace ctxfast
