// SPDX-License-Identifier: Apache-2.0
// Between lstm.cpp (checks, memory, threads) and the per-instruction-set kernels: the work of one direction.
#pragma once

#include <cstdint>

namespace ctxfast {

// Packed weights lie in panels of 64 output columns: for the gates 16 cells x (i, f, g, o), for the projection 64
// outputs. float32: [panel][k][64]. bfloat16: [panel][k / 2][64][2], so that one 32-bit word holds two k of a column;
// an odd k count is padded with a zero weight.
constexpr int kLstmPanel = 64;
constexpr int kLstmPanelCells = 16;
// Sums over k run in blocks of this many terms, block sums added up in order: less rounding error than one long sum, a
// panel's block stays in L1 while the row tiles pass over it, and blocks can be dealt out to threads without changing
// a bit. Even, for bfloat16 pairs. 64, 128 and 256 are equally fast at B=1 and B=32; at B=8 64 wins by a tenth, and its
// error is that of torch's own float32 product or less (2026-11, AVX-512, sums of 512 and 4096 terms).
constexpr int kLstmBlock = 64;

struct LstmJob {
  // sizes
  int64_t batch, steps, hidden, proj_size;
  bool has_projection, bf16, reverse;
  float cell_clip, proj_clip;  // 0: off
  // caller's arrays of this direction
  const float* gates;
  int64_t gates_batch, gates_time;
  const void* weight_gates;
  const void* weight_proj;
  const float* h_0;  // may be null
  const float* c_0;
  float* output;
  int64_t output_batch, output_time;
  float* h_n;
  float* c_n;
  float* cells;  // may be null
  // rows in order of falling length: row[i] is the caller's row number, length[i] its length
  const int64_t* row;
  const int64_t* length;
  // workspace
  float* h;        // (1 or 2, batch, ld_h)
  float* m;        // (batch, ld_m), with projection
  float* c;        // (gate panels, batch, 16)
  float* partial;  // (blocks of hidden, batch, proj panels * 64); null: each thread sums its panels whole
  float* scratch;  // (threads, batch, 64)
  int64_t ld_h, ld_m;
  void* barrier;
};

// All threads meet here; lstm.cpp defines it.
void lstm_barrier(void* barrier, int count);

// The whole recurrence of one direction, thread `index` of `count`.
void lstm_run_generic(const LstmJob& job, int index, int count);
void lstm_run_avx2(const LstmJob& job, int index, int count);
void lstm_run_avx512(const LstmJob& job, int index, int count);

}  // namespace ctxfast
