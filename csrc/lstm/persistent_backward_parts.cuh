// SPDX-License-Identifier: Apache-2.0
// Parts of the persistent backward kernel: exchange, weights, products, who holds what.
// The whole and its reasons: persistent_backward.cuh.
#pragma once

#include "base/device.cuh"

namespace ctxfast::lstm_backward {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSlots = 5;
constexpr uint32_t kEmpty = 0xFFFFFFFFu;
// Codes of trap_with: 1 partial sums, 2 operands of a product, 3 clears.

struct KernelParams {
  const uint4* weight_hh[2];    // (4H, P)
  const uint4* weight_proj[2];  // (P, H)
  const uint16_t* z[2];         // (B, T, 4, H) of 16-bit gates
  int64_t z_strides[2][2];      // of B and T
  const float* cells;           // (R, B, T, H)
  const float* c_0;             // (R, B, H) or null
  const float* zeros;           // 9 of them
  const void* output;           // (B, T, R P); read only with proj_clip
  int64_t output_strides[2];
  const void* grad_output;  // (B, T, R P) or null
  int64_t grad_output_strides[2];
  const float* grad_h_n;    // (R, B, P) or null
  const float* grad_c_n;    // (R, B, H) or null
  const int64_t* lengths;   // (B) or null
  uint16_t* grad_gates[2];  // (B, T, 4, H)
  void* grad_hidden;        // (R, B, T, P) or null
  float* grad_h_0;          // (R, B, P)
  float* grad_c_0;          // (R, B, H)
  uint4 *x, *d, *s;         // exchange, per direction [kSlots][kTiles][...]
  uint32_t* cleared;        // per direction [blocks]
  int directions, batch, steps, hidden, size;
  int blocks, k_shift;         // of a direction; 2^k_shift K groups
  int row_pairs, cell_pairs;   // K of the two products of a block, in units of 32
  float cell_clip, proj_clip;  // 0: off
};

// x, of which the compiler knows nothing any more: what is made of it is made anew in each phase of each step, and does
// not take registers from the phases between.
CTXFAST_DEVICE int anew(int x) {
#ifndef CTXFAST_EMULATE
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Without branches: each would wait for the words before it.
CTXFAST_DEVICE bool full(const uint4& v) {
  return (v.x != kEmpty) & (v.y != kEmpty) & (v.z != kEmpty) & (v.w != kEmpty);
}
CTXFAST_DEVICE uint32_t published(uint32_t word) { return word == kEmpty ? 0x7FFFFFFFu : word; }
CTXFAST_DEVICE uint4 published(const uint4& v) {
  return make_uint4(published(v.x), published(v.y), published(v.z), published(v.w));
}
CTXFAST_DEVICE uint32_t bits_of(float x) {
  uint32_t word;
  memcpy(&word, &x, sizeof(word));
  return word;
}
CTXFAST_DEVICE float float_of(uint32_t word) {
  float x;
  memcpy(&x, &word, sizeof(x));
  return x;
}
CTXFAST_DEVICE float4 floats_of(const uint4& v) {
  return make_float4(float_of(v.x), float_of(v.y), float_of(v.z), float_of(v.w));
}

// One vector a lane, written by another block and asked for before. All lanes of the warp come.
CTXFAST_DEVICE uint4 wait(uint4 v, const uint4* p) {
  const uint32_t began = spin_begins();
  while (!all_sync(full(v))) {
    if (spun_out(began)) trap_with(1, lane_index());
    if (!full(v)) v = load_relaxed(p);
  }
  return v;
}

// `count` of up to N kpairs at once: fragments of a warp, all loads issued before the first is used.
template <int N, int kColumns>
struct Arriving {
  uint4 v[N * kColumns];

  // from: of this lane in the warp's first kpair; kpairs are kWarps apart
  CTXFAST_DEVICE void ask(const uint4* from, int count) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        v[i * kColumns + n] =
            i < count ? load_relaxed(from + (i * kWarps * kColumns + n) * 32) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  CTXFAST_DEVICE void wait(const uint4* from) {
    const uint32_t began = spin_begins();
    while (true) {
      bool here = true;
#pragma unroll
      for (int i = 0; i < N * kColumns; ++i) here = here & full(v[i]);
      if (all_sync(here)) break;
      if (spun_out(began)) trap_with(2, lane_index());
#pragma unroll
      for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          if (!full(v[i * kColumns + n])) v[i * kColumns + n] = load_relaxed(from + (i * kWarps * kColumns + n) * 32);
        }
      }
    }
  }
};

template <typename T>
CTXFAST_DEVICE void multiply(float (&d)[4], const uint4& weights, uint32_t b0, uint32_t b1) {
  const uint32_t a[4] = {weights.x, weights.y, weights.z, weights.w}, b[2] = {b0, b1};
  mma_16x8x16<T>(d, a, b);
}

// A kpair's 2 x 16 rows of K, 16 kTilesM columns, from a matrix with K along its rows: as the vectors of a warp's
// lanes.
template <int kTilesM>
struct RawPair {
  uint4 v[2][kTilesM];

  // matrix: of the first column; stride: of its rows, in vectors; row_of(k-step, row of 16): where that row of K lies
  template <typename RowOf>
  CTXFAST_DEVICE void load(const uint4* matrix, int stride, RowOf row_of) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        const int at = i * 32 + lane_index(), row = at / (2 * kTilesM), chunk = at % (2 * kTilesM);
        v[step][i] = matrix[int64_t{row_of(step, row)} * stride + chunk];
      }
    }
  }
  // A fragments of the transposed matrix, by way of `stage`: 32 kTilesM vectors of the warp's own. Chunks of 8 columns
  // are turned within a row, so that ldmatrix finds its rows in different banks.
  CTXFAST_DEVICE void to_fragments(uint4 (&fragments)[2][kTilesM], uint4* stage) const {
    constexpr int kChunks = 2 * kTilesM;
    const int lane = lane_index(), k = (lane >> 4) * 8 + (lane & 7);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        const int at = i * 32 + lane, row = at / kChunks, chunk = at % kChunks;
        stage[row * kChunks + (chunk ^ (row & (kChunks - 1)))] = v[step][i];
      }
      warp_sync();
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, stage + k * kChunks + ((m * 2 + (lane >> 3 & 1)) ^ (k & (kChunks - 1))));
        fragments[step][m] = make_uint4(r[0], r[1], r[2], r[3]);
      }
      warp_sync();
    }
  }
};

// Row of W_hh in kpair `pair` of all cells: k-step `step`, row k of 16. See cell_gradient's words for the order.
CTXFAST_DEVICE int row_of_hh(int hidden, int pair, int step, int k) {
  return ((k >> 3) * 2 + (k & 1)) * hidden + (pair >> 1) * 16 + step * 8 + (pair & 1) * 4 + (k >> 1 & 3);
}
// Row of W_proj: dh in the order in which blocks finish it, rows q and q + 8 of 16 in one word.
CTXFAST_DEVICE int row_of_proj(int pair, int step, int k) {
  return pair * 32 + step * 16 + (k & 1) * 8 + (k >> 3) * 4 + (k >> 1 & 3);
}

// One kpair of fragments into the sums.
template <typename T, int kTilesM, int kColumns>
CTXFAST_DEVICE void multiply_pair(float (&acc)[kTilesM][kColumns][4], const uint4* weights, const uint4* arrived) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
    const uint4 a0 = weights[m * 32], a1 = weights[(kTilesM + m) * 32];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      multiply<T>(acc[m][n], a0, arrived[n].x, arrived[n].y);
      multiply<T>(acc[m][n], a1, arrived[n].z, arrived[n].w);
    }
  }
}

template <int kTilesM, int kColumns>
CTXFAST_DEVICE void zero(float (&acc)[kTilesM][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
  }
}

// Of `pairs` kpairs, those of this warp: warp, warp + 8, ...
CTXFAST_DEVICE int pairs_of_warp(int pairs) {
  const int rest = pairs - warp_index();
  return rest > 0 ? (rest + kWarps - 1) / kWarps : 0;
}

// A warp's part of kTilesM x kColumns tiles of 16 x 8, kpairs warp, warp + 8, ... of `pairs`. The first kRegisters of
// them have their weights in `held`, the others in shared memory: [kpair][2 k-steps][kTilesM][lane] from kpair
// 8 kRegisters. from: exchanged [kpair][kColumns][lane]. kVectors vectors a lane are under way while as many are used;
// the first are asked for before meanwhile() and waited for after it.
template <typename T, int kTilesM, int kColumns, int kRegisters, int kVectors, int kHeld, typename Meanwhile>
CTXFAST_DEVICE void product(float (&acc)[kTilesM][kColumns][4], const uint4 (&held)[kHeld], const uint4* weights,
                            const uint4* from, int pairs, Meanwhile meanwhile) {
  constexpr int kGroup = kVectors / kColumns, kNext = kWarps * kColumns * 32;
  static_assert(kRegisters % kGroup == 0, "whole groups in registers");
  const int count = pairs_of_warp(pairs);
  from += anew(warp_index()) * kColumns * 32 + anew(lane_index());
  Arriving<kGroup, kColumns> now, next;
  // Both before meanwhile(): what is asked for after it would be waited for with what was asked for before.
  now.ask(from, count);
  next.ask(from + kGroup * kNext, count - kGroup);
  meanwhile();
  zero(acc);
  weights += anew(warp_index()) * 2 * kTilesM * 32 + anew(lane_index());
#pragma unroll
  for (int first = 0; first < kRegisters; first += kGroup) {
    if (first > 0) next.ask(from + (first + kGroup) * kNext, count - first - kGroup);
    now.wait(from + first * kNext);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const uint4& b = now.v[i * kColumns + n];
          multiply<T>(acc[m][n], held[((first + i) * 2 + 0) * kTilesM + m], b.x, b.y);
          multiply<T>(acc[m][n], held[((first + i) * 2 + 1) * kTilesM + m], b.z, b.w);
        }
      }
    }
    now = next;
  }
#pragma unroll 1
  for (int first = kRegisters; first < count; first += kGroup) {
    if (first > 0) next.ask(from + (first + kGroup) * kNext, count - first - kGroup);
    now.wait(from + first * kNext);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (first + i >= count) break;
      multiply_pair<T>(acc, weights + (first + i - kRegisters) * (kWarps * 2 * kTilesM * 32), now.v + i * kColumns);
    }
    now = next;
  }
}

// The same for the few kpairs of dh: at most two a warp, loaded at once.
template <typename T, int kTilesM, int kColumns, typename Meanwhile>
CTXFAST_DEVICE void short_product(float (&acc)[kTilesM][kColumns][4], const uint4* weights, const uint4* from,
                                  int pairs, Meanwhile meanwhile) {
  const int count = pairs_of_warp(pairs);
  const int warp = anew(warp_index()), lane = anew(lane_index());
  from += warp * kColumns * 32 + lane;
  weights += warp * 2 * kTilesM * 32 + lane;
  Arriving<2, kColumns> arriving;
  arriving.ask(from, count);
  meanwhile();
  zero(acc);
  arriving.wait(from);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i >= count) break;
    multiply_pair<T>(acc, weights + i * (kWarps * 2 * kTilesM * 32), arriving.v + i * kColumns);
  }
}

// A warp's fragments to shared memory [warp][kTilesM][kColumns][lane], where `reduced` adds them up.
template <int kTilesM, int kColumns>
CTXFAST_DEVICE void store_fragments(float4* shared, const float (&acc)[kTilesM][kColumns][4]) {
  float4* at = shared + warp_index() * kTilesM * kColumns * 32 + lane_index();
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
      const float (&v)[4] = acc[m][n];
      at[(m * kColumns + n) * 32] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
}

// Sum over `kCount` warps from `first`, of fragment `at`.
template <int kFragments, int kCount>
CTXFAST_DEVICE float4 reduced(const float4* shared, int first, int at) {
  float4 sum = shared[first * kFragments + at];
#pragma unroll
  for (int w = 1; w < kCount; ++w) {
    const float4 v = shared[(first + w) * kFragments + at];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  return sum;
}

// Sum over groups of `lanes` (a power of 2) neighbouring lanes; all lanes get it.
CTXFAST_DEVICE float4 sum_lanes(float4 v, int lanes) {
#pragma unroll 1
  for (int mask = 1; mask < lanes; mask *= 2) {
    v.x += shuffle_xor(v.x, mask);
    v.y += shuffle_xor(v.y, mask);
    v.z += shuffle_xor(v.z, mask);
    v.w += shuffle_xor(v.w, mask);
  }
  return v;
}

// Waits until the block of each lane has cleared the iterations before `wanted`: 32 of `blocks` blocks, `first` and its
// followers. For one warp.
CTXFAST_DEVICE void wait_cleared(const uint32_t* cleared, int first, int blocks, int wanted) {
  const int block = first + lane_index();
  if (wanted <= 0) return;
  if (block < blocks) {
    const uint32_t began = spin_begins();
    while (static_cast<int>(load_acquire(cleared + block)) < wanted) {
      if (spun_out(began)) trap_with(3, block);
    }
  }
  warp_sync();
}

// The part of dh that a thread finishes: with a projection rows `row` and `row` + 8 of one column in the first two of
// a fragment's lanes (one a K group); without, one cell and column in each of four.
struct Finish {
  int part, fragment;      // which of the lanes that add one fragment up; which of the block's fragments
  int lane, column, tile;  // the fragment's place: lane, 8 columns, 16 rows of dh
  int row, batch;          // of P, of the tile's columns
  int x_word;              // in X: 32-bit words [kpair][kColumns][lane][4]
  bool keeps;              // this lane keeps a sum
};

template <bool kProjected, bool kPartial, int kColumns>
CTXFAST_DEVICE Finish finish_of(int tid, int block, int k_shift) {
  Finish f;
  const int k_group = block & ((1 << k_shift) - 1), row_group = block >> k_shift;
  if constexpr (kPartial) {
    // A row group's 4 tiles x 32 lanes, dealt out in order to its blocks; a thread for each K group's sum.
    const int shift = 7 - k_shift;
    f.part = tid & ((1 << k_shift) - 1);
    f.fragment = tid >> k_shift;
    f.column = f.fragment >> shift;
    f.lane = (k_group << shift) + (f.fragment & ((1 << shift) - 1));
    f.tile = f.lane / 32;
    f.lane %= 32;
  } else {
    f.part = tid % 4;
    f.fragment = tid / 4;
    f.column = f.fragment / 32;
    f.lane = f.fragment % 32;
    f.tile = 0;
  }
  f.row = kProjected ? row_group * 64 + f.tile * 16 + (f.lane >> 2) : block * 16 + (f.lane >> 2) + 8 * (f.part >> 1);
  f.batch = f.column * 8 + 2 * (f.lane & 3) + (f.part & 1);
  f.keeps = tid < 128 * kColumns && (!kProjected || f.part < 2);
  const int pair = row_group * 2 + (f.tile >> 1), word = (f.tile & 1) * 2 + (f.lane >> 4);
  f.x_word = ((pair * kColumns + f.column) * 32 + (f.batch & 7) * 4 + (f.lane >> 2 & 3)) * 4 + word;
  return f;
}

// The cells whose dz a thread forms: with a projection `cell` and `cell` + 8 of columns `batch` and `batch` + 1;
// without, the one it finishes dh of.
struct Form {
  int cell, batch;
  int d_vector;  // in D: vectors [kpair][kColumns][lane]; of the next column 4 further
  bool forms, publishes;
};

template <bool kProjected, bool kPartial, int kColumns>
CTXFAST_DEVICE Form form_of(int tid, int block, int k_shift) {
  Form f;
  int lane = tid % 32, column = tid / 32 % kColumns, pair = block * 8 + tid / (32 * kColumns) * 2;
  f.forms = tid < 128 * kColumns;
  if constexpr (kProjected) {
    f.cell = block * 64 + tid / (32 * kColumns) * 16 + (lane >> 2);
    f.batch = column * 8 + 2 * (lane & 3);
    f.publishes = f.forms;
  } else {
    const Finish finish = finish_of<kProjected, kPartial, kColumns>(tid, block, k_shift);
    lane = finish.lane, column = finish.column, pair = block * 2;
    f.cell = finish.row;
    f.batch = finish.batch;
    f.publishes = f.forms && finish.part < 2;
  }
  f.d_vector = ((pair + (lane >> 4)) * kColumns + column) * 32 + (f.batch & 7) * 4 + (lane >> 2 & 3);
  return f;
}

}  // namespace ctxfast::lstm_backward
