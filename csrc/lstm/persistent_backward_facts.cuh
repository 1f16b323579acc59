// SPDX-License-Identifier: Apache-2.0
// Parts of the persistent backward kernel: what a step reads of each cell and of dh, and a cell's gradient.
// The whole and its reasons: persistent_backward.cuh.
#pragma once

#include <type_traits>

#include "lstm/persistent_backward_parts.cuh"

namespace ctxfast::lstm_backward {

// The inputs of a cell's step, read while something else is waited for.
struct CellFacts {
  uint32_t z[4];  // of 16 bits each; packed: in pairs in the first two
  float c, before;

  // Frees two registers. Waits for z.
  CTXFAST_DEVICE void pack() {
    z[0] = static_cast<uint32_t>(anew(static_cast<int>(z[0] | z[1] << 16)));
    z[1] = static_cast<uint32_t>(anew(static_cast<int>(z[2] | z[3] << 16)));
  }
};

// Of cell `cell` and, with 4, `cell` + 8, of the batch's row b0 + column + kRow: facts[j] are of row j & 1 where there
// are four, two rows in turn. length_of: the rows' lengths from b0 on. Nothing branches: where a row is past its end,
// row b0 is read in its place, and nobody looks at it. t is a step, 0..steps - 1.
template <int kRow, int kCells>
CTXFAST_DEVICE void load_cells(const KernelParams& p, int direction, int b0, int column, int t, const int* length_of,
                               int cell, CellFacts (&facts)[kCells]) {
  constexpr int kBatchRows = kCells == 4 ? 2 : 1;
  const int length = length_of[column + kRow], b = t < length ? b0 + column + kRow : b0;
  const bool first = direction == 0 ? t == 0 : t >= length - 1;
  const uint16_t* z = p.z[direction] + b * p.z_strides[direction][0] + t * p.z_strides[direction][1] + cell;
  const int64_t row = int64_t{direction} * p.batch + b;
  const float* c = p.cells + (row * p.steps + t) * p.hidden + cell;
  const float* before = direction == 0 ? c - p.hidden : c + p.hidden;
  if (first) before = p.c_0 == nullptr ? p.zeros : p.c_0 + row * p.hidden + cell;
#pragma unroll
  for (int j = kRow; j < kCells; j += kBatchRows) {
    const int further = j / kBatchRows * 8;
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) facts[j].z[gate] = z[gate * p.hidden + further];
    facts[j].c = c[further];
    facts[j].before = before[further];
  }
}

template <int kRow>
using Row = std::integral_constant<int, kRow>;

// What goes into a thread's values of dh, read while something else is waited for: of rows `row`, `row` + 8. As it is
// stored: to convert it is to wait for it.
template <typename T, int kKept>
struct HiddenFacts {
  T grad[kKept], h[kKept];
};

template <typename T, int kKept>
CTXFAST_DEVICE void load_hidden(const KernelParams& p, int direction, int b, int t, int row,
                                HiddenFacts<T, kKept>* facts) {
  const int at = direction * p.size + row;
  if (p.grad_output != nullptr) {
    const T* grad = static_cast<const T*>(p.grad_output) + b * p.grad_output_strides[0] + t * p.grad_output_strides[1];
#pragma unroll
    for (int j = 0; j < kKept; ++j) facts->grad[j] = grad[at + 8 * j];
  }
  if (p.proj_clip > 0.0f) {
    const T* h = static_cast<const T*>(p.output) + b * p.output_strides[0] + t * p.output_strides[1];
#pragma unroll
    for (int j = 0; j < kKept; ++j) facts->h[j] = h[at + 8 * j];
  }
}

// Brings what load_cells and load_hidden will read of step t into the L2 cache: 8 threads for each of the batch's rows
// from b0 on, which lie in `length_of`. cell, row: the block's first of the cells and of dh.
template <typename T, int kBlockCells>
CTXFAST_DEVICE void prefetch_facts(const KernelParams& p, int direction, int b0, int rows, int t, const int* length_of,
                                   int cell, int row) {
  const int thread = anew(kThreads - 1 - thread_index()), column = thread / 8, part = thread % 8;
  if (column >= rows || t < 0 || t >= length_of[column]) return;
  const int b = b0 + column;
  const void* line = nullptr;
  if (part < 4) {
    line = p.z[direction] + b * p.z_strides[direction][0] + t * p.z_strides[direction][1] + part * p.hidden + cell;
  } else if (part < 6) {
    const int further = (part - 4) * 32;  // floats of a line
    if (further < kBlockCells) {
      line = p.cells + ((int64_t{direction} * p.batch + b) * p.steps + t) * p.hidden + cell + further;
    }
  } else if (part == 6 && p.grad_output != nullptr) {
    line = static_cast<const T*>(p.grad_output) + b * p.grad_output_strides[0] + t * p.grad_output_strides[1] +
           direction * p.size + row;
  } else if (part == 7 && p.proj_clip > 0.0f) {
    line =
        static_cast<const T*>(p.output) + b * p.output_strides[0] + t * p.output_strides[1] + direction * p.size + row;
  }
  if (line != nullptr) prefetch_l2(line);
}

// dz of what load_cells reads, to grad_gates; nothing of rows past the batch.
template <int kCells>
CTXFAST_DEVICE void store_gates(const KernelParams& p, int direction, int b, int t, int cell,
                                const uint2 (&dz)[kCells]) {
  constexpr int kBatchRows = kCells == 4 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kBatchRows; ++i) {
    if (b + i >= p.batch) continue;
    uint16_t* to = p.grad_gates[direction] + (int64_t{b + i} * p.steps + t) * 4 * p.hidden + cell;
#pragma unroll
    for (int j = i; j < kCells; j += kBatchRows) {
      const int further = j / kBatchRows * 8;
      to[further] = static_cast<uint16_t>(dz[j].x);
      to[p.hidden + further] = static_cast<uint16_t>(dz[j].x >> 16);
      to[2 * p.hidden + further] = static_cast<uint16_t>(dz[j].y);
      to[3 * p.hidden + further] = static_cast<uint16_t>(dz[j].y >> 16);
    }
  }
}

// dz (four gates, as two words) of one cell and batch row, from packed facts; dc is carried on. A row past its end
// passes everything by.
template <typename T>
CTXFAST_DEVICE uint2 cell_gradient(const CellFacts& facts, bool active, float dm, float cell_clip, float* dc) {
  if (!active) return make_uint2(0, 0);
  const float2 z_if = unpack2<T>(facts.z[0]), z_go = unpack2<T>(facts.z[1]);
  const float i = sigmoid_fast(z_if.x), f = sigmoid_fast(z_if.y), g = tanh_fast(z_go.x), o = sigmoid_fast(z_go.y);
  const float tanh_c = tanh_fast(facts.c);
  float total = *dc + dm * o * (1.0f - tanh_c * tanh_c);
  if (cell_clip > 0.0f && !(fabsf(facts.c) < cell_clip)) total = 0.0f;
  *dc = total * f;
  return make_uint2(published(pack2<T>(total * g * i * (1.0f - i), total * facts.before * f * (1.0f - f))),
                    published(pack2<T>(total * i * (1.0f - g * g), dm * tanh_c * o * (1.0f - o))));
}

// One value of dh: grad_output + carried, stopped by the clip of h. 0 for a row past its end.
CTXFAST_DEVICE float total_dh(float grad, float h, float carried, float bound, bool active) {
  if (!active || (bound > 0.0f && !(fabsf(h) < bound))) return 0.0f;
  return grad + carried;
}

}  // namespace ctxfast::lstm_backward
