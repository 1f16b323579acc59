// SPDX-License-Identifier: Apache-2.0
// Between cpu.cpp (checks, memory, threads) and the kernels of each instruction set; and for ops that multiply
// inside a parallel region of their own.
#pragma once

#include <cstdint>

#include "linear_act/linear_act.h"

namespace ctxfast {

// Rows a thread takes at a time: a multiple of every kernel's row block.
constexpr int kLinearActRows = 48;
// Rows of a chunk at most.
constexpr int64_t kLinearActMostRows = 4 * kLinearActRows;
// Rows of x stored as tiles, [group of rows][tile][row][16 words]: whole cache lines at compile-time distances.
constexpr int kLinearActTileRows = 16;

struct LinearActJob {
  int64_t rows, in, out, tiles, chunk;  // tiles: of 16 words along the input; chunk: rows at a time
  bool is_bf16;                         // x, bias and y are bfloat16
  int activation;                       // as enum Activation
  bool is_gated;                        // out / 2 columns of y
  const void* x;
  int64_t stride_x;
  const uint32_t* packed;
  const float* scales;
  const int32_t* sums;
  const void* bias;
  void* y;
  // workspace
  uint32_t* x_tiles;  // (chunk rounded up to whole groups, tiles * 16)
  float* x_scales;    // (chunk), int8
  void* barrier;
};

// Thread `index` of `count` does its share; the threads meet at the job's barrier on the way, not at the end.
typedef void (*LinearActKernel)(const LinearActJob& job, int index, int count);

// The best kernel that `isa` includes.
LinearActKernel linear_act_kernel_for(DType weight_dtype, Isa isa);

// Bytes of one call's workspace, for all threads.
int64_t linear_act_scratch_bytes(int64_t rows, int64_t in, DType weight_dtype);
// `scratch`: that many, on a cache line; `barrier`: a SpinBarrier of the threads that run the job.
LinearActJob linear_act_job(const LinearActParams& params, char* scratch, void* barrier);

// All threads meet here; cpu.cpp defines it.
void linear_act_barrier(void* barrier, int count);

CTXFAST_DECLARE_KERNELS(LinearActKernel, linear_act_float32)
CTXFAST_DECLARE_KERNELS(LinearActKernel, linear_act_bfloat16)
CTXFAST_DECLARE_KERNELS(LinearActKernel, linear_act_int8)

}  // namespace ctxfast
