// SPDX-License-Identifier: Apache-2.0
// One step of lstm as kernels: a product of the weights with the state of the step before, and what follows from its
// sums.
//
// Every kernel is the same product: 16 kRowTiles rows of weights by 8 kColumns batch rows, K split over the eight warps
// of the block, their sums added in the order of the warps in shared memory. 16-bit weights go through mma.sync,
// float32 through plain multiply-adds. Then each thread finishes some (row, batch row) elements: the epilogue.
//   gates        W_hh h           -> a cell's step; a tile of 16 rows is 4 gates x 4 cells
//   projection   W_proj m         -> h
//   cells        W_proj^T dh      -> dz, dc                       (backward, with projection)
//   carry        W_hh^T dz        -> dh of the step before        (backward, with projection)
//   carry_cells  W_hh^T dz        -> dh, then dz, dc of the step before (backward, without)
// Weights stream from L2 (ELMo's 42 MB of both directions fit an H100's 50): the bound of this implementation.
// Estimated from the machine code (2026-12, no GPU): ELMo's gates, B <= 8, take a warp 2,540 cycles, reads at 300 each;
// that a cell's four gates lie apart costs nothing, and no pass over the input's weights puts them side by side.
#pragma once

#include "base/device.cuh"
#include "lstm/step.h"

namespace ctxfast::lstm_step {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRowsOfTile = 16;

// What steps leave each other lies K-contiguous in rows of the batch, padded with zeros: kPad elements.
constexpr int kPad = 32;

struct StepParams {
  int batch, steps, hidden, size, directions;
  int t;         // the step, in time
  int t_next;    // backward: the step after it in walking order, -1 at the end
  bool is_last;  // forward: h goes to h_n
  bool has_proj;
  const void* weights[2];
  int tiles;         // of 16 rows
  int k;             // padded K
  const void* from;  // (R, padded B, k)
  void* to;          // what this kernel leaves the next one: (R, padded B, to_k)
  const void* h;     // forward: h before this step, (R, padded B, padded P)
  int to_k, padded_batch, padded_size;
  const void* gates[2];
  int64_t gates_strides[2][2];
  const int64_t* lengths;
  float cell_clip, proj_clip;
  void* output;  // forward: written; backward: read
  void* h_n;
  float* c;      // forward: c_n, carried from step to step
  float* cells;  // written or read
  // backward
  const float* c_0;
  const void* grad_output;
  void* grad_gates[2];
  void* grad_hidden;
  float* grad_h;  // grad_h_0, carried
  float* grad_c;  // grad_c_0, carried
};

CTXFAST_DEVICE bool is_active(const StepParams& p, int b, int t) {
  return t >= 0 && (p.lengths == nullptr || t < p.lengths[b]);
}
CTXFAST_DEVICE float clip(float x, float bound) {
  // NaN stays NaN.
  return bound > 0.0f ? (x > bound ? bound : x < -bound ? -bound : x) : x;
}

// Gates' functions: exact in float32, the hardware's approximations in 16 bits.
template <typename T>
CTXFAST_DEVICE float sigmoid_of(float x) {
  return sizeof(T) == 4 ? sigmoid_exact(x) : sigmoid_fast(x);
}
template <typename T>
CTXFAST_DEVICE float tanh_of(float x) {
  return sizeof(T) == 4 ? tanh_exact(x) : tanh_fast(x);
}

template <typename T>
struct Gates {
  float i, f, g, o;
};
template <typename T>
CTXFAST_DEVICE Gates<T> load_gates(const StepParams& p, int direction, int b, int t, int cell) {
  const T* at = static_cast<const T*>(p.gates[direction]) + b * p.gates_strides[direction][0] +
                t * p.gates_strides[direction][1] + cell;
  const int64_t hidden = p.hidden;
  return {to_float(at[0]), to_float(at[hidden]), to_float(at[2 * hidden]), to_float(at[3 * hidden])};
}

// --- the product: sums[row][column] in shared memory, [kWarps][16 kRowTiles][8 kColumns + 1]

template <int kRowTiles, int kColumns>
constexpr int kPitch = 8 * kColumns + 1;  // odd: columns of a row and rows of a column fall on different banks
template <int kRowTiles, int kColumns>
constexpr int kSums = kRowsOfTile * kRowTiles * kPitch<kRowTiles, kColumns>;

// 16 bits: weights as fragments [tile][pair of k-steps][2][lane]; a pair's 32 k lie in the order that lets a lane read
// 8 neighbours of `from` at once: k = 32 pair + 8 (lane % 4) + 4 step + 2 register + element. See step_pack.cu.
template <typename T, int kRowTiles, int kColumns>
CTXFAST_DEVICE void multiply(const StepParams& p, int direction, int first_tile, int first_row, float* sums) {
  const int lane = lane_index(), warp = warp_index(), g = lane / 4, t = lane % 4, pairs = p.k / 32;
  const uint4* weights = static_cast<const uint4*>(p.weights[direction]);
  const T* from = static_cast<const T*>(p.from) + (int64_t{direction} * p.padded_batch + first_row) * p.k;
  float d[kRowTiles][kColumns][4] = {};
#pragma unroll 2
  for (int pair = warp; pair < pairs; pair += kWarps) {
    uint4 x[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      x[n] = *reinterpret_cast<const uint4*>(from + int64_t{8 * n + g} * p.k + 32 * pair + 8 * t);
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if (first_tile + m >= p.tiles) continue;
      const uint4* of_tile = weights + ((int64_t{first_tile + m} * pairs + pair) * 2) * 32 + lane;
      const uint4 w0 = of_tile[0], w1 = of_tile[32];
      const uint32_t a0[4] = {w0.x, w0.y, w0.z, w0.w}, a1[4] = {w1.x, w1.y, w1.z, w1.w};
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const uint32_t b0[2] = {x[n].x, x[n].y}, b1[2] = {x[n].z, x[n].w};
        mma_16x8x16<T>(d[m][n], a0, b0);
        mma_16x8x16<T>(d[m][n], a1, b1);
      }
    }
  }
  float* own = sums + warp * kSums<kRowTiles, kColumns>;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        own[(16 * m + g + 8 * (j / 2)) * kPitch<kRowTiles, kColumns> + 8 * n + 2 * t + j % 2] = d[m][n][j];
      }
    }
  }
}

// float32: weights row by row (tile row, k); lanes take every 32nd group of four k.
template <int kRowTiles, int kColumns>
CTXFAST_DEVICE void multiply_float(const StepParams& p, int direction, int first_tile, int first_row, float* sums) {
  const int lane = lane_index(), warp = warp_index();
  const float* weights = static_cast<const float*>(p.weights[direction]);
  const float* from = static_cast<const float*>(p.from) + (int64_t{direction} * p.padded_batch + first_row) * p.k;
  // A warp has whole rows, two of each tile, and all of K; no other warp adds to them.
  for (int m = 0; m < kRowTiles; ++m) {
    const int row = 16 * m + 2 * warp;
    const bool has_rows = first_tile + m < p.tiles;
    const float* w = weights + (int64_t{first_tile} * 16 + row) * p.k;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      float d[2][8] = {};
      for (int k = 4 * lane; has_rows && k < p.k; k += 128) {
        const float4 w0 = *reinterpret_cast<const float4*>(w + k), w1 = *reinterpret_cast<const float4*>(w + p.k + k);
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float4 x = *reinterpret_cast<const float4*>(from + int64_t{8 * n + c} * p.k + k);
          d[0][c] = fmaf(w0.w, x.w, fmaf(w0.z, x.z, fmaf(w0.y, x.y, fmaf(w0.x, x.x, d[0][c]))));
          d[1][c] = fmaf(w1.w, x.w, fmaf(w1.z, x.z, fmaf(w1.y, x.y, fmaf(w1.x, x.x, d[1][c]))));
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float sum = d[r][c];
#pragma unroll
          for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
          if (lane == c) sums[(row + r) * kPitch<kRowTiles, kColumns> + 8 * n + c] = sum;
        }
      }
    }
  }
}

// All warps' sums of one element, in the order of the warps.
template <typename T, int kRowTiles, int kColumns>
CTXFAST_DEVICE float total(const float* sums, int row, int column) {
  const float* at = sums + row * kPitch<kRowTiles, kColumns> + column;
  if constexpr (sizeof(T) == 4) return *at;
  float sum = at[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += at[warp * kSums<kRowTiles, kColumns>];
  return sum;
}

// --- from the sums to the step's results

// h of one element: to the next step, to the output, at the end to h_n. A row past its end keeps what it has.
template <typename T>
CTXFAST_DEVICE void write_h(const StepParams& p, int direction, int b, int row, float h, bool active, void* to) {
  const int64_t of_batch = int64_t{direction} * p.padded_batch + b;
  T value = from_float<T>(clip(h, p.proj_clip));
  if (!active) value = static_cast<const T*>(p.h)[of_batch * p.padded_size + row];
  static_cast<T*>(to)[of_batch * p.padded_size + row] = value;
  static_cast<T*>(p.output)[((int64_t{b} * p.steps + p.t) * p.directions + direction) * p.size + row] =
      active ? value : from_float<T>(0.0f);
  if (p.is_last) static_cast<T*>(p.h_n)[(int64_t{direction} * p.batch + b) * p.size + row] = value;
}

// dh of h before its clip: what comes from the output and what was carried; 0 where the clip was met or the row is past
// its end.
template <typename T>
CTXFAST_DEVICE float hidden_gradient(const StepParams& p, int direction, int b, int t, int row, float carried) {
  if (!is_active(p, b, t)) return 0.0f;
  const int64_t at = ((int64_t{b} * p.steps + t) * p.directions + direction) * p.size + row;
  if (p.proj_clip > 0.0f) {
    const float bound = to_float(from_float<T>(p.proj_clip));  // as a clipped h was rounded when it was stored
    if (!(fabsf(to_float(static_cast<const T*>(p.output)[at])) < bound)) return 0.0f;
  }
  return carried + (p.grad_output == nullptr ? 0.0f : to_float(static_cast<const T*>(p.grad_output)[at]));
}

// dz of one cell at step t, and dc carried on.
template <typename T>
CTXFAST_DEVICE void cell_gradient(const StepParams& p, int direction, int b, int t, int cell, float dm, void* to) {
  const int64_t row = int64_t{direction} * p.batch + b;
  float d[4] = {};
  if (is_active(p, b, t)) {
    const Gates<T> z = load_gates<T>(p, direction, b, t, cell);
    const float i = sigmoid_of<T>(z.i), f = sigmoid_of<T>(z.f), g = tanh_of<T>(z.g), o = sigmoid_of<T>(z.o);
    const float* cells = p.cells + row * p.steps * p.hidden + cell;
    const float c = cells[int64_t{t} * p.hidden], tanh_c = tanh_of<T>(c);
    const int length = p.lengths == nullptr ? p.steps : static_cast<int>(p.lengths[b]);
    const bool is_first = direction == 0 ? t == 0 : t == length - 1;
    float before = 0.0f;
    if (!is_first) {
      before = cells[int64_t{direction == 0 ? t - 1 : t + 1} * p.hidden];
    } else if (p.c_0 != nullptr) {
      before = p.c_0[row * p.hidden + cell];
    }
    float* carried = p.grad_c + row * p.hidden + cell;
    float dc = *carried + dm * o * (1.0f - tanh_c * tanh_c);
    if (p.cell_clip > 0.0f && !(fabsf(c) < p.cell_clip)) dc = 0.0f;
    *carried = dc * f;
    d[0] = dc * g * i * (1.0f - i);
    d[1] = dc * before * f * (1.0f - f);
    d[2] = dc * i * (1.0f - g * g);
    d[3] = dm * tanh_c * o * (1.0f - o);
  }
  T* next = static_cast<T*>(to) + (int64_t{direction} * p.padded_batch + b) * p.to_k + 4 * cell;
  T* grad = static_cast<T*>(p.grad_gates[direction]) + (int64_t{b} * p.steps + t) * 4 * p.hidden + cell;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) next[gate] = grad[int64_t{gate} * p.hidden] = from_float<T>(d[gate]);
}

// dh at step t of one element, before the clip: to the next kernel, and kept for the projection's weight gradient.
template <typename T>
CTXFAST_DEVICE void write_hidden_gradient(const StepParams& p, int direction, int b, int t, int row, float carried) {
  const T value = from_float<T>(hidden_gradient<T>(p, direction, b, t, row, carried));
  static_cast<T*>(p.to)[(int64_t{direction} * p.padded_batch + b) * p.to_k + row] = value;
  if (p.grad_hidden != nullptr) {
    static_cast<T*>(p.grad_hidden)[((int64_t{direction} * p.batch + b) * p.steps + t) * p.size + row] = value;
  }
}

enum class Step { kGates, kProjection, kCells, kCarry, kCarryCells };

template <typename T, Step kStep, int kRowTiles, int kColumns>
CTXFAST_DEVICE void finish(const StepParams& p, int direction, int first_tile, int first_row, const float* sums) {
  constexpr int kBatchRows = 8 * kColumns;
  if constexpr (kStep == Step::kGates) {
    for (int i = thread_index(); i < 4 * kRowTiles * kBatchRows; i += kThreads) {
      const int local = i % (4 * kRowTiles), column = i / (4 * kRowTiles), b = first_row + column;
      const int cell = 4 * first_tile + local, row = 16 * (local / 4) + local % 4;
      if (b >= p.batch || cell >= p.hidden) continue;
      const bool active = is_active(p, b, p.t);
      const int64_t at = (int64_t{direction} * p.batch + b) * p.hidden + cell;
      float c = p.c[at], m = 0.0f;
      if (active) {
        const Gates<T> z = load_gates<T>(p, direction, b, p.t, cell);
        float sum[4];
#pragma unroll
        for (int gate = 0; gate < 4; ++gate) sum[gate] = total<T, kRowTiles, kColumns>(sums, row + 4 * gate, column);
        const float in = sigmoid_of<T>(z.i + sum[0]), keep = sigmoid_of<T>(z.f + sum[1]);
        const float new_value = tanh_of<T>(z.g + sum[2]), out = sigmoid_of<T>(z.o + sum[3]);
        c = clip(in * new_value + keep * c, p.cell_clip);
        m = out * tanh_of<T>(c);
        p.c[at] = c;
      }
      if (p.cells != nullptr) {
        p.cells[((int64_t{direction} * p.batch + b) * p.steps + p.t) * p.hidden + cell] = active ? c : 0.0f;
      }
      if (p.has_proj) {
        static_cast<T*>(p.to)[(int64_t{direction} * p.padded_batch + b) * p.to_k + cell] = from_float<T>(m);
      } else {
        write_h<T>(p, direction, b, cell, m, active, p.to);
      }
    }
  } else {
    for (int i = thread_index(); i < 16 * kRowTiles * kBatchRows; i += kThreads) {
      const int local = i % (16 * kRowTiles), column = i / (16 * kRowTiles), b = first_row + column;
      const int row = 16 * first_tile + local, rows = kStep == Step::kCells ? p.hidden : p.size;
      if (b >= p.batch || row >= rows) continue;
      const float sum = total<T, kRowTiles, kColumns>(sums, local, column);
      if constexpr (kStep == Step::kProjection) {
        write_h<T>(p, direction, b, row, sum, is_active(p, b, p.t), p.to);
      } else if constexpr (kStep == Step::kCells) {
        cell_gradient<T>(p, direction, b, p.t, row, sum, p.to);
      } else {
        float* carried = p.grad_h + (int64_t{direction} * p.batch + b) * p.size + row;
        const float carry = is_active(p, b, p.t) ? sum : *carried;
        *carried = carry;
        if (p.t_next < 0) continue;
        if constexpr (kStep == Step::kCarry) {
          write_hidden_gradient<T>(p, direction, b, p.t_next, row, carry);
        } else {
          const float dm = hidden_gradient<T>(p, direction, b, p.t_next, row, carry);
          cell_gradient<T>(p, direction, b, p.t_next, row, dm, p.to);
        }
      }
    }
  }
}

// Grid: (groups of kRowTiles tiles, groups of 8 kColumns batch rows, 1 or both directions). Direction 1 of a step is at
// another time than direction 0: its own parameters. Shared memory: kSums floats a warp.
struct BothDirections {
  StepParams of[2];
};

template <typename T, Step kStep, int kRowTiles, int kColumns>
__global__ void __launch_bounds__(kThreads, 2) lstm_step_kernel(const __grid_constant__ BothDirections both) {
  const int direction = block_index_z(), first_tile = block_index() * kRowTiles,
            first_row = block_index_y() * 8 * kColumns;
  const StepParams& p = both.of[direction];
  float* sums = reinterpret_cast<float*>(shared_memory());
  if constexpr (sizeof(T) == 4) {
    multiply_float<kRowTiles, kColumns>(p, direction, first_tile, first_row, sums);
  } else {
    multiply<T, kRowTiles, kColumns>(p, direction, first_tile, first_row, sums);
  }
  block_sync();
  finish<T, kStep, kRowTiles, kColumns>(p, direction, first_tile, first_row, sums);
}

// --- before the first step

struct StartParams {
  StepParams of[2];
  const void* h_0;
  const float* c_0;
  const float* grad_h_n;
  const float* grad_c_n;
  void* first_h;  // (R, padded B, padded P), zeros so far
};

// States in, one thread an element of (R, B, max(H, P)).
template <typename T>
__global__ void __launch_bounds__(kThreads) lstm_step_start_kernel(const __grid_constant__ StartParams s) {
  const StepParams& p = s.of[0];
  const int width = p.hidden > p.size ? p.hidden : p.size;
  const int64_t i = int64_t{block_index()} * kThreads + thread_index();
  if (i >= int64_t{p.directions} * p.batch * width) return;
  const int column = static_cast<int>(i % width);
  const int64_t row = i / width;  // direction, batch
  const int direction = static_cast<int>(row / p.batch), b = static_cast<int>(row % p.batch);
  if (column < p.size) {
    const T h = s.h_0 == nullptr ? from_float<T>(0.0f) : static_cast<const T*>(s.h_0)[row * p.size + column];
    static_cast<T*>(s.first_h)[(int64_t{direction} * p.padded_batch + b) * p.padded_size + column] = h;
    if (p.steps == 0) static_cast<T*>(p.h_n)[row * p.size + column] = h;
  }
  if (column < p.hidden) p.c[row * p.hidden + column] = s.c_0 == nullptr ? 0.0f : s.c_0[row * p.hidden + column];
}

// Gradients of the final states in, and what the first product of the walk back needs.
template <typename T>
__global__ void __launch_bounds__(kThreads) lstm_step_start_back_kernel(const __grid_constant__ StartParams s) {
  const StepParams& shape = s.of[0];
  const int width = shape.hidden > shape.size ? shape.hidden : shape.size;
  const int64_t i = int64_t{block_index()} * kThreads + thread_index();
  if (i >= int64_t{shape.directions} * shape.batch * width) return;
  const int column = static_cast<int>(i % width);
  const int64_t row = i / width;
  const int direction = static_cast<int>(row / shape.batch), b = static_cast<int>(row % shape.batch);
  const StepParams& p = s.of[direction];
  float carry = 0.0f;
  if (column < p.size) {
    carry = s.grad_h_n == nullptr ? 0.0f : s.grad_h_n[row * p.size + column];
    p.grad_h[row * p.size + column] = carry;
  }
  if (column < p.hidden) {
    p.grad_c[row * p.hidden + column] = s.grad_c_n == nullptr ? 0.0f : s.grad_c_n[row * p.hidden + column];
  }
  if (p.t_next < 0) return;
  if (p.has_proj) {
    if (column < p.size) write_hidden_gradient<T>(p, direction, b, p.t_next, column, carry);
  } else if (column < p.hidden) {
    const float dm = hidden_gradient<T>(p, direction, b, p.t_next, column, carry);
    cell_gradient<T>(p, direction, b, p.t_next, column, dm, p.to);
  }
}

}  // namespace ctxfast::lstm_step
