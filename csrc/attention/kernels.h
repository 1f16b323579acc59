// SPDX-License-Identifier: Apache-2.0
// Between cpu.cpp (checks, memory, threads) and the kernels of each instruction set; and for ops that run
// attention inside a parallel region of their own.
#pragma once

#include <cstdint>

#include "attention/attention.h"

namespace ctxfast {

struct AttentionJob {
  int64_t heads, kv_heads, head_dim, sequences;
  bool is_int64;    // cu_seqlens; else int32
  const void* qkv;  // (tokens, heads + 2 kv_heads, head_dim)
  int64_t stride_qkv;
  const void* bias;  // (heads + 2 kv_heads, head_dim) or null
  const void* cu_seqlens;
  float scale;
  AttentionPlaces places;
  void* y;  // (tokens, heads, head_dim); the backward leaves it alone
  int64_t stride_y;
  // dropout: null or two seeds; weights whose 16 bits are below the threshold go, the others grow
  const int64_t* seeds;
  int32_t threshold;
  AttentionGradients gradients;
  // (heads, 2 tokens) or null: sums over each sequence's diagonals of the gradient of scores, 2 length - 1 of them from
  // twice the sequence's first token on
  float* diagonals;
  int64_t tokens;
  // workspace: attention_scratch_bytes for each thread, on a cache line
  char* scratch;
  int64_t scratch_bytes;
};

// Thread `index` of `count` does its share, without synchronizing with the others: every row it reads must be
// complete before, and results are complete when all threads are done.
typedef void (*AttentionKernel)(const AttentionJob& job, int index, int count);

// The best kernel that `isa` includes, for float32 or bfloat16.
AttentionKernel attention_kernel_for(DType io_dtype, Isa isa);

// Bytes of one thread of a forward without dropout, a multiple of a cache line; `longest`: tokens of the longest
// sequence.
int64_t attention_scratch_bytes(int64_t longest, int64_t head_dim, bool has_relative_bias);

// Refuses, in the name of `op`, offsets that do not rise from 0 to `tokens`; else sets *longest.
Status attention_check_offsets(const char* op, const void* cu_seqlens, bool is_int64, int64_t sequences, int64_t tokens,
                               int64_t* longest);

CTXFAST_DECLARE_KERNELS(AttentionKernel, attention_float32)
CTXFAST_DECLARE_KERNELS(AttentionKernel, attention_bfloat16)
CTXFAST_DECLARE_KERNELS(AttentionKernel, attention_backward_float32)
CTXFAST_DECLARE_KERNELS(AttentionKernel, attention_backward_bfloat16)

// Query rows of an item of work at most.
constexpr int64_t kAttentionRows = 48;
// Lanes of the widest kernel, and floats of a cache line: what rows of the workspace are padded to.
constexpr int64_t kAttentionPad = 16;
// Keys that one draw of random bits serves.
constexpr int64_t kAttentionDraw = 32;

}  // namespace ctxfast
