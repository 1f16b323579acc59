// SPDX-License-Identifier: Apache-2.0
// Between cpu_*.cpp (checks, memory, threads) and the per-instruction-set kernels: the work of one direction.
#pragma once

#include <cstdint>

#include "base/isa.h"

namespace ctxfast {

// Packed weights lie in panels of 64 output columns: for the gates 16 cells x (i, f, g, o), for the projection 64
// outputs. A panel is [word][64] of 32-bit words, one word per column holding one k (float32), two k (bfloat16, the
// lower in the low half) or four k (int8, the lowest in the low byte). bfloat16 and int8 panels are padded with zero
// weights to a multiple of 16 words, one AMX tile. Before an int8 panel's words stand 64 float scales and 64 int32
// sums 128 * (sum of the column's weights): vectors are stored as value + 128, unsigned, as the dot products require.
constexpr int kLstmPanel = 64;
constexpr int kLstmPanelCells = 16;
constexpr int kLstmTileWords = 16;
constexpr int kLstmTileRows = 16;
constexpr int kLstmInt8Header = 2 * kLstmPanel;
// Sums over k run in blocks of this many words, block sums added up in order: less rounding error than one long sum, a
// panel's block stays in cache while the row tiles stream over it, and blocks can be divided among threads without
// changing a bit. float32: 64, 128 and 256 are equally fast at B=1 and B=32; at B=8 64 wins by a tenth, and its error
// is that of torch's own float32 product or less (2026-11, AVX-512, sums of 512 and 4096 terms).
constexpr int kLstmBlock = 64;
constexpr int kLstmNarrowBlock = 256;
// Rows of the input product that use a panel together: they stay in L1.
constexpr int kLstmInputRows = 48;
// Rows (of several steps) whose input product is computed at once: enough to read W_ih seldom, few enough to stay
// in the cache until their step.
constexpr int kLstmChunkRows = 128;

struct LstmJob {
  // sizes
  int64_t batch, steps, hidden, proj_size;
  bool has_projection, reverse;
  float cell_clip, proj_clip;  // 0: off
  // caller's arrays of this direction
  const float* x;
  int64_t input, x_batch, x_time;
  const void* weight_input;
  const float* bias;  // may be null
  const void* weight_gates;
  const void* weight_proj;
  const float* h_0;  // may be null
  const float* c_0;
  float* output;
  int64_t output_batch, output_time;
  float* h_n;
  float* c_n;
  float* cells;  // may be null
  void* z;       // (B, T, 4H), bfloat16 if z_bf16; may be null
  bool z_bf16;
  // rows in order of falling length: row[i] is the caller's row number, length[i] its length
  const int64_t* row;
  const int64_t* length;
  // workspace; "batch" here is a multiple of kLstmTileRows
  float* h;        // (2 for float32 without projection, else 1; batch, ld_h)
  float* m;        // (batch, ld_m), with projection
  float* c;        // (gate panels, batch, 16)
  float* partial;  // (blocks of hidden * proj panels, batch, 64); null: each thread sums its panels whole
  float* scratch;  // (threads, batch or kLstmInputRows if that is more, 64)
  // gates made from x: (gate panels, chunk_rows, 64), and those rows of x as words
  float* chunk;
  uint32_t* x_words;  // (chunk_rows and kLstmInputRows more, ld_x_words)
  float* x_scale;
  int64_t chunk_rows, chunk_steps, ld_x_words;
  // what the products read: h and m rounded, or (float32) h and m themselves
  uint32_t* h_words;  // (batch, ld_h_words)
  uint32_t* m_words;  // (batch, ld_m_words)
  float* h_scale;     // (batch), int8
  float* m_scale;
  int64_t ld_h, ld_m, ld_h_words, ld_m_words, ld_batch;
  void* barrier;
};

// The backward of one direction: from each row's last step to its first. S: bfloat16 where the products' factors are,
// else float32.
struct LstmBackwardJob {
  int64_t batch, steps, hidden, proj_size;
  bool has_projection, reverse;
  float cell_clip, proj_clip;  // 0: off
  // caller's arrays of this direction
  const void* z;  // (B, T, 4H) S: gates before their nonlinearities
  void* grad_z;   // (B, T, 4H) S
  const float* cells;
  const float* c_0;  // may be null
  const float* output;
  int64_t output_batch, output_time;
  const float* grad_output;
  int64_t grad_batch, grad_time;
  const float* grad_h_n;
  const float* grad_c_n;
  const void* weight_hh;    // panels of 64 of P, terms 4H
  const void* weight_proj;  // panels of 64 cells, terms P
  void* grad_hidden;        // (B, T, P) S: gradient of h before its clip
  void* m;                  // (B, T, H) S, with projection
  float* grad_bias;         // (4H)
  float* grad_h_0;
  float* grad_c_0;
  const int64_t* row;
  const int64_t* length;
  // workspace; words: what the products read, S
  float* carried;     // (batch, ld_h): gradient of h from the step after
  float* d_h;         // (batch, ld_h): of the step's h, before its clip
  uint32_t* h_words;  // (batch, ld_h_words): d_h itself, or d_h rounded
  uint32_t* z_words;  // (batch, ld_z_words): gradient of the step's z
  float* d_c;         // (panels of 64 cells, batch, 64)
  float* d_bias;      // (panels of 64 cells, 4, 64)
  float* partial;     // (proj panels, groups of kLstmBackwardTerms, batch, 64)
  float* scratch;     // (threads, batch, 64)
  int64_t ld_h, ld_h_words, ld_z_words;
  void* barrier;
};

// Terms of the sum over 4H gates that one thread adds up: whole blocks of every kind of product.
constexpr int kLstmBackwardTerms = 1024;

// One set of kernels: one way to hold the factors, on one instruction set. Thread `index` of `count`.
struct LstmKernels {
  void (*forward)(const LstmJob& job, int index, int count);
  void (*backward)(const LstmBackwardJob& job, int index, int count);  // null for int8
};

// All threads meet here; cpu_forward.cpp defines it.
void lstm_barrier(void* barrier, int count);

CTXFAST_DECLARE_KERNELS(LstmKernels, lstm_float32)
CTXFAST_DECLARE_KERNELS(LstmKernels, lstm_bfloat16)
CTXFAST_DECLARE_KERNELS(LstmKernels, lstm_int8)

}  // namespace ctxfast
