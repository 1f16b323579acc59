// SPDX-License-Identifier: Apache-2.0
// The recurrence of `lstm` backwards, all steps in one cooperative launch. Not yet run on a GPU: run on the emulator.
//
// Who owns what. A direction has `blocks` blocks of 256 threads, one per multiprocessor, arranged as row groups x K
// groups. A block owns cells (64 with a projection, 16 without): it keeps their dc and forms their dz. Block (r, k)
// also owns the slice of Wh^T that takes the dz of K group k (an equal part of all cells) to the rows of group r of dh.
// The weights stay on chip: in shared memory, with a first part in registers where they do not fit (kRegisters).
//
// One step, last to first, of a tile of 8 kColumns rows of the batch:
//   collect   partial sums of dh from the K groups meet, in fixed order; + grad_output; the clip of h.
//             With a projection each block finishes 8 rows and publishes them (X); without, dh is of its own cells.
//   cells     with a projection: dm = Wp^T dh of the block's cells. Then dz and dc; publishes dz (D), stores grad_gates.
//   rows      the block's part of dh of the step before: Wh^T dz. Publishes it as fp32 partial sums (S); with a single
//             K group nothing is partial and it stays in shared memory.
// kTiles tiles take turns phase by phase, so that one tile's waiting is the other's work.
//
// Exchange. Everything lies in the layout that its reader's matrix instruction wants, and is its own flag: a word reads
// kEmpty until it is written. kEmpty is a NaN that arithmetic does not make (it makes 0x7FFF, 0x7FFFFFFF) and that
// `published` maps away. Slot n % kSlots carries iteration n. The thread that wrote a word clears it, in iteration
// n + 2, after it has published its dz of that iteration; later the block announces in its `cleared` word, by a
// release, that iterations < n + 1 are cleared. Before iteration m every block acquires, from all blocks of its
// direction, that iterations <= m - kSlots are cleared.
//
// Why that is safe:
// 1. A word is cleared only after every reader has read it. Let a block be past `collect` of iteration n + 2 in the
//    threads that clear. (a) With a projection it has seen X of n + 2 of all blocks (block_sync joins its threads): each
//    was published after its block had read S of n + 1, hence after all its own reads of iteration n. (b) With K groups
//    and no projection, it has seen S of n + 1 of all K groups of its row group: published after their blocks had read
//    D of n + 1 of their K group, together D of n + 1 of all blocks; each of those was published after its block had
//    read S of n, and S of n of every row group was published after D of n was read. (c) With one K group it has read
//    D of n + 1 of all blocks, published after they had read D of n. Every "published after it had read" is program
//    order with a dependency (the value, or the loop that could not end before), block_sync, or both.
// 2. A clear precedes the next write of its word: same thread, program order.
// 3. A reader of iteration m never sees the word of iteration m - kSlots: clear, block_sync, release by one thread;
//    acquire by a thread of the reader's block, block_sync, read: the clear happens before the read, so the read returns
//    the clear or what comes after it. Before the first kSlots iterations the launcher's clear on the stream does this.
// 4. Nobody waits for ever: an announcement waits for nothing of its own or a later iteration, and what a block
//    waits for in a phase was published by phases before it, of blocks that are all resident (cooperative launch).
// Every spin is bounded and traps.
//
// Numbers. Sums in fp32, in an order fixed by the sizes alone; no atomics. Partial sums and carried dh are fp32; dh at a
// step and dz are rounded to the weights' dtype where they enter a product, as a loop in that dtype rounds them. In
// fp16 a dz below 6e-8 is 0 and one above 65504 infinite: scaling the loss is the caller's, as with cuDNN; bf16 has
// fp32's range.
#pragma once

#include "device.cuh"

namespace ctxfast::lstm_backward {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSlots = 5;
constexpr uint32_t kEmpty = 0xFFFFFFFFu;
constexpr int kSpins = 1 << 22;

struct KernelParams {
  const uint4* packed[2];  // per direction: [block][rows fragments][cells fragments], see cuda_backward.py
  const uint2* z[2];       // (B, T, H) of four 16-bit gates
  int64_t z_strides[2][2];  // of B and T, in uint2
  const float* cells;      // (R, B, T, H)
  const float* c_0;        // (R, B, H) or null
  const void* output;      // (B, T, R P); read only with proj_clip
  int64_t output_strides[2];
  const void* grad_output;  // (B, T, R P) or null
  int64_t grad_output_strides[2];
  const float* grad_h_n;   // (R, B, P) or null
  const float* grad_c_n;   // (R, B, H) or null
  const int64_t* lengths;  // (B) or null
  uint2* grad_gates[2];    // (B, T, H) of four
  void* grad_hidden;       // (R, B, T, P) or null
  float* grad_h_0;         // (R, B, P)
  float* grad_c_0;         // (R, B, H)
  uint4 *x, *d, *s;        // exchange, per direction [kSlots][kTiles][...]
  uint32_t* cleared;       // per direction [blocks]
  int directions, batch, steps, hidden, size;
  int blocks, k_groups;             // of a direction
  int row_pairs, cell_pairs;        // K of the two products of a block, in units of 32
  float cell_clip, proj_clip;       // 0: off
};

CTXFAST_DEVICE bool full(const uint4& v) { return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty; }
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

// One vector a lane, written by another block. All lanes of the warp come.
CTXFAST_DEVICE uint4 wait(const uint4* p) {
  uint4 v = load_relaxed(p);
  for (int spins = 0; !all_sync(full(v)); ++spins) {
    if (spins == kSpins) trap_with(1, spins);
    if (!full(v)) v = load_relaxed(p);
  }
  return v;
}

// `count` of up to N kpairs at once: fragments of a warp, all loads under way before the first is looked at.
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
    for (int spins = 0;; ++spins) {
      bool here = true;
#pragma unroll
      for (int i = 0; i < N * kColumns; ++i) here = here && full(v[i]);
      if (all_sync(here)) break;
      if (spins == kSpins) trap_with(2, spins);
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

// A warp's part of kTilesM x kColumns tiles of 16 x 8: kpairs warp, warp + 8, ... of `pairs`. The first kRegisters of them
// have their weights in `held`, the others in shared memory: [kpair][2 k-steps][kTilesM][lane] from kpair 8 kRegisters.
// from: exchanged [kpair][kColumns][lane].
template <typename T, int kTilesM, int kColumns, int kRegisters, int kHeld>
CTXFAST_DEVICE void product(float (&acc)[kTilesM][kColumns][4], const uint4 (&held)[kHeld], const uint4* weights,
                            const uint4* from, int pairs) {
  const int warp = warp_index(), lane = lane_index();
  constexpr int kGroup = (kRegisters > 0 ? 4 : 8) / kColumns;
  constexpr int kNext = kWarps * kColumns * 32;
#pragma unroll
  for (int m = 0; m < kTilesM; ++m) {
#pragma unroll
    for (int n = 0; n < kColumns; ++n) acc[m][n][0] = acc[m][n][1] = acc[m][n][2] = acc[m][n][3] = 0.0f;
  }
  const int count = pairs > warp ? (pairs - warp + kWarps - 1) / kWarps : 0;
  from += warp * kColumns * 32 + lane;
  weights += (warp * 2 * kTilesM) * 32 + lane;
  Arriving<kGroup, kColumns> now, next;
  now.ask(from, count);
  static_assert(kRegisters % kGroup == 0, "whole groups in registers");
#pragma unroll
  for (int first = 0; first < kRegisters; first += kGroup) {
    next.ask(from + (first + kGroup) * kNext, count - first - kGroup);
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
  for (int first = kRegisters; first < count; first += kGroup) {
    if (first + kGroup < count) next.ask(from + (first + kGroup) * kNext, count - first - kGroup);
    now.wait(from + first * kNext);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (first + i >= count) break;
      const uint4* at = weights + (first + i - kRegisters) * (kWarps * 2 * kTilesM * 32);
#pragma unroll
      for (int m = 0; m < kTilesM; ++m) {
        const uint4 a0 = at[m * 32], a1 = at[(kTilesM + m) * 32];
#pragma unroll
        for (int n = 0; n < kColumns; ++n) {
          const uint4& b = now.v[i * kColumns + n];
          multiply<T>(acc[m][n], a0, b.x, b.y);
          multiply<T>(acc[m][n], a1, b.z, b.w);
        }
      }
    }
    now = next;
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
      const float(&v)[4] = acc[m][n];
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

// Sum over groups of kLanes neighbouring lanes; all lanes get it.
template <int kLanes>
CTXFAST_DEVICE float4 sum_lanes(float4 v) {
#pragma unroll
  for (int mask = 1; mask < kLanes; mask *= 2) {
    v.x += shuffle_xor(v.x, mask);
    v.y += shuffle_xor(v.y, mask);
    v.z += shuffle_xor(v.z, mask);
    v.w += shuffle_xor(v.w, mask);
  }
  return v;
}

// What a cell's step is made of, read before the wait.
struct CellFacts {
  uint2 z = {0, 0};
  float c = 0, before = 0;
  bool active = false;
};

CTXFAST_DEVICE CellFacts load_cell(const KernelParams& p, int direction, int b, int t, int length, int cell) {
  CellFacts facts;
  facts.active = t < length;
  if (!facts.active) return facts;
  facts.z = load_streaming(p.z[direction] + b * p.z_strides[direction][0] + t * p.z_strides[direction][1] + cell);
  const int64_t row = int64_t{direction} * p.batch + b;
  const float* cells = p.cells + row * p.steps * p.hidden + cell;
  facts.c = cells[int64_t{t} * p.hidden];
  const bool first = direction == 0 ? t == 0 : t == length - 1;
  if (!first) {
    facts.before = cells[int64_t{direction == 0 ? t - 1 : t + 1} * p.hidden];
  } else if (p.c_0 != nullptr) {
    facts.before = p.c_0[row * p.hidden + cell];
  }
  return facts;
}

// dz (four gates, as two words) of one cell and batch row; dc is carried on. A row past its end passes everything by.
template <typename T>
CTXFAST_DEVICE uint2 cell_gradient(const CellFacts& facts, float dm, float cell_clip, float* dc) {
  if (!facts.active) return make_uint2(0, 0);
  const float2 z_if = unpack2<T>(facts.z.x), z_go = unpack2<T>(facts.z.y);
  const float i = sigmoid_fast(z_if.x), f = sigmoid_fast(z_if.y), g = tanh_fast(z_go.x), o = sigmoid_fast(z_go.y);
  const float tanh_c = tanh_fast(facts.c);
  float total = *dc + dm * o * (1.0f - tanh_c * tanh_c);
  if (cell_clip > 0.0f && !(fabsf(facts.c) < cell_clip)) total = 0.0f;
  *dc = total * f;
  return make_uint2(
      published(pack2<T>(total * g * i * (1.0f - i), total * facts.before * f * (1.0f - f))),
      published(pack2<T>(total * i * (1.0f - g * g), dm * tanh_c * o * (1.0f - o))));
}

// One value of dh: grad_output + carried, stopped by the clip of h. 0 for a row past its end.
CTXFAST_DEVICE float total_dh(float grad, float h, float carried, float bound, bool active) {
  if (!active || (bound > 0.0f && !(fabsf(h) < bound))) return 0.0f;
  return grad + carried;
}

// Waits until every block of the direction has cleared the iterations before `wanted`. For one warp.
CTXFAST_DEVICE void wait_cleared(const uint32_t* cleared, int blocks, int wanted) {
  if (wanted <= 0) return;
  for (int block = lane_index(); block < blocks; block += 32) {
    for (int spins = 0; static_cast<int>(load_acquire(cleared + block)) < wanted; ++spins) {
      if (spins == kSpins) trap_with(3, block);
    }
  }
  warp_sync();
}

// Grid: directions x blocks, all resident. kColumns: tiles of 8 batch rows side by side. kRows: tiles of 16 rows of dh
// of a block, 4 with K groups and 1 without. Shared memory: see shared_bytes in lstm_persistent_backward_sm90a.cu.
template <typename T, int kColumns, int kTiles, bool kProjected, int kRows, int kRegisters>
__global__ void __launch_bounds__(kThreads, 1) lstm_persistent_backward_kernel(const __grid_constant__ KernelParams p) {
  static_assert(!kProjected || kRows == 4, "a projection comes with eight K groups");
  constexpr int kFragments = kRows * kColumns * 32;              // of a block's rows of dh
  constexpr int kCellFragments = (kProjected ? 4 : 1) * kColumns * 32;  // of its cells
  constexpr int kHeld = kRegisters > 0 ? kRegisters * 2 * kRows : 1;
  constexpr bool kPartial = kRows == 4;                          // dh meets from several K groups
  constexpr int kFinishing = kProjected ? 8 : 4;                 // threads that finish one fragment of dh together
  constexpr int kGroupRows = 8 * kColumns * kTiles;
  constexpr int kReduceTiles = kPartial ? 1 : kTiles;
  const int tid = thread_index(), lane = lane_index(), q = lane >> 2, s = lane & 3;
  const int direction = block_index() % p.directions, block = block_index() / p.directions;
  const int row_group = block / p.k_groups, k_group = block % p.k_groups;
  const int cell_blocks = p.hidden / 8;                          // kpairs of dz of all cells

  auto* weights = reinterpret_cast<uint4*>(shared_memory());
  uint4* cell_weights = weights + (p.row_pairs - kRegisters * kWarps) * (2 * kRows * 32);
  auto* reduce = reinterpret_cast<float4*>(cell_weights + (kProjected ? p.cell_pairs * 256 : 0));
  int* length_of = reinterpret_cast<int*>(reduce + kReduceTiles * kWarps * kFragments);

  uint4 held[kHeld];
  {
    const int row_vectors = p.row_pairs * 2 * kRows * 32, cell_vectors = kProjected ? p.cell_pairs * 256 : 0;
    const uint4* packed = p.packed[direction] + int64_t{block} * (row_vectors + cell_vectors);
    if constexpr (kRegisters > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int pair = i / (2 * kRows) * kWarps + warp_index(), rest = i % (2 * kRows);
        held[i] = packed[(pair * 2 * kRows + rest) * 32 + lane];
      }
    }
    packed += kRegisters * kWarps * 2 * kRows * 32;
    const int vectors = row_vectors + cell_vectors - kRegisters * kWarps * 2 * kRows * 32;
    for (int i = tid; i < vectors; i += kThreads) weights[i] = packed[i];
  }

  // Exchange of this direction; a slot's tiles lie one behind the other.
  const int x_tile = p.cell_pairs * kColumns * 32, d_tile = cell_blocks * kColumns * 32, s_tile = p.blocks * kFragments;
  uint4* x = p.x + int64_t{direction} * kSlots * kTiles * x_tile;
  uint4* d = p.d + int64_t{direction} * kSlots * kTiles * d_tile;
  uint4* partial = p.s + int64_t{direction} * kSlots * kTiles * s_tile;
  uint32_t* cleared = p.cleared + direction * p.blocks;

  // The part of dh this thread finishes: with a projection rows `row` and `row` + 8 of one column in the first two of
  // eight lanes; without, one cell and column in each of four.
  const bool finishes = tid < 128 * kColumns;
  const int part = tid % kFinishing, fragment = tid / kFinishing;
  int finish_lane, finish_column, finish_tile, row;  // in the fragment; of 8 columns; row of P
  if constexpr (kProjected) {
    finish_lane = (k_group & 1) * 16 + fragment % 16;
    finish_column = fragment / 16;
    finish_tile = k_group >> 1;
    row = row_group * 64 + finish_tile * 16 + (finish_lane >> 2);
  } else {
    finish_lane = fragment % 32;
    finish_column = fragment / 32;
    finish_tile = kPartial ? k_group : 0;
    row = block * 16 + (finish_lane >> 2) + 8 * (part >> 1);
  }
  const int finish_batch = finish_column * 8 + 2 * (finish_lane & 3) + (part & 1);  // column of the tile
  const bool keeps = finishes && (!kProjected || part < 2);
  constexpr int kKept = kProjected ? 2 : 1;
  // X: 32-bit words [kpair][kColumns][lane][4]
  const int x_word = (((row_group * 2 + (k_group >> 2)) * kColumns + finish_column) * 32 +
                      (finish_batch & 7) * 4 + ((finish_lane >> 2) & 3)) * 4 + (k_group & 3);

  // The cells whose dz this thread forms.
  constexpr int kCells = kProjected ? 4 : 1;
  const bool forms = kProjected ? tid < kCellFragments : finishes;
  const int form_lane = kProjected ? lane : finish_lane;
  const int form_column = kProjected ? warp_index() % kColumns : finish_column;
  const int form_tile = kProjected ? warp_index() / kColumns : 0;
  const int cell = kProjected ? block * 64 + form_tile * 16 + q : row;
  const int form_batch = kProjected ? form_column * 8 + 2 * s : finish_batch;
  // D: vectors [kpair][kColumns][lane], for column form_batch
  const int d_vector = (((kProjected ? block * 8 + form_tile * 2 : block * 2) + (form_lane >> 4)) * kColumns +
                        form_column) * 32 + (form_batch & 7) * 4 + ((form_lane >> 2) & 3);
  const bool publishes_d = forms && (kProjected || part < 2);

  const float bound = to_float(from_float<T>(p.proj_clip));  // as a clipped h was rounded when it was stored
  int iteration = 0;
  for (int b0 = 0; b0 < p.batch; b0 += kGroupRows) {
    block_sync();  // length_of is free
    if (tid < kGroupRows) {
      const int b = b0 + tid;
      int length = 0;
      if (b < p.batch) length = p.lengths == nullptr ? p.steps : static_cast<int>(p.lengths[b]);
      length_of[tid] = length;
    }
    block_sync();
    float carried[kTiles][kKept], dc[kTiles][kCells];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int b = b0 + tile * 8 * kColumns + finish_batch;
#pragma unroll
      for (int j = 0; j < kKept; ++j) {
        carried[tile][j] = keeps && b < p.batch && p.grad_h_n != nullptr
                               ? p.grad_h_n[(int64_t{direction} * p.batch + b) * p.size + row + 8 * j]
                               : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        const int of = b0 + tile * 8 * kColumns + form_batch + (j & 1);
        dc[tile][j] = forms && of < p.batch && p.grad_c_n != nullptr
                          ? p.grad_c_n[(int64_t{direction} * p.batch + of) * p.hidden + cell + 8 * (j >> 1)]
                          : 0.0f;
      }
    }

    for (int step = 0;; ++step, ++iteration) {
      const bool last = step == p.steps;
      const int t = direction == 0 ? p.steps - 1 - step : step, t_before = direction == 0 ? t + 1 : t - 1;
      const int slot = iteration % kSlots, slot_before = (iteration + kSlots - 1) % kSlots;

      // collect
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int column = tile * 8 * kColumns + finish_batch, b = b0 + column;
        CellFacts facts;
        float grad[kKept] = {}, h[kKept] = {};
        bool active = false, active_before = false;
        if (keeps) {
          active = !last && t < length_of[column];
          active_before = step > 0 && t_before < length_of[column];
          const int64_t at = direction * p.size + row;
#pragma unroll
          for (int j = 0; j < kKept; ++j) {
            if (!active) continue;
            if (p.grad_output != nullptr) {
              grad[j] = to_float(static_cast<const T*>(
                  p.grad_output)[b * p.grad_output_strides[0] + t * p.grad_output_strides[1] + at + 8 * j]);
            }
            if (p.proj_clip > 0.0f) {
              h[j] = to_float(static_cast<const T*>(
                  p.output)[b * p.output_strides[0] + t * p.output_strides[1] + at + 8 * j]);
            }
          }
          if constexpr (!kProjected) facts = load_cell(p, direction, b, t, last ? 0 : length_of[column], cell);
        }
        if (!finishes) continue;
        if (step > 0) {
          float4 sum;
          if constexpr (kPartial) {
            const uint4* from = partial + (slot_before * kTiles + tile) * s_tile +
                                (row_group * kFinishing + part) * kFragments +
                                (finish_tile * kColumns + finish_column) * 32 + finish_lane;
            sum = floats_of(wait(from));
          } else {
            sum = reduced<kFragments, 2>(reduce + tile * kWarps * kFragments, 2 * part, fragment);
          }
          sum = sum_lanes<kFinishing>(sum);
          const float low = part & 1 ? sum.y : sum.x, high = part & 1 ? sum.w : sum.z;
          if (active_before) {
            if constexpr (kProjected) {
              carried[tile][0] = low;
              carried[tile][1] = high;
            } else {
              carried[tile][0] = part & 2 ? high : low;
            }
          }
        }
        if (last) continue;
        float total[kKept];
#pragma unroll
        for (int j = 0; j < kKept; ++j) total[j] = total_dh(grad[j], h[j], carried[tile][j], bound, active);
        if (keeps && b < p.batch && p.grad_hidden != nullptr) {
          T* to = static_cast<T*>(p.grad_hidden) + ((int64_t{direction} * p.batch + b) * p.steps + t) * p.size + row;
#pragma unroll
          for (int j = 0; j < kKept; ++j) to[8 * j] = from_float<T>(total[j]);
        }
        if constexpr (kProjected) {
          if (keeps) {
            auto* to = reinterpret_cast<uint32_t*>(x + (slot * kTiles + tile) * x_tile);
            store_relaxed(to + x_word, published(pack2<T>(total[0], total[1])));
          }
        } else {
          const uint2 dz = cell_gradient<T>(facts, total[0], p.cell_clip, &dc[tile][0]);
          if (b < p.batch) p.grad_gates[direction][(int64_t{b} * p.steps + t) * p.hidden + cell] = dz;
          const uint32_t if_8 = shuffle_xor(dz.x, 2), go_8 = shuffle_xor(dz.y, 2);  // of the cell eight further
          if (publishes_d) {
            store_relaxed(d + (slot * kTiles + tile) * d_tile + d_vector, make_uint4(dz.x, dz.y, if_8, go_8));
          }
        }
      }
      if (last) break;
      if constexpr (!kPartial) block_sync();  // `reduce` is free

      // cells
      if constexpr (kProjected) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          CellFacts facts[kCells];
          if (forms) {
#pragma unroll
            for (int j = 0; j < kCells; ++j) {
              const int column = tile * 8 * kColumns + form_batch + (j & 1);
              facts[j] = load_cell(p, direction, b0 + column, t, length_of[column], cell + 8 * (j >> 1));
            }
          }
          float acc[4][kColumns][4];
          const uint4 none[1] = {};
          product<T, 4, kColumns, 0, 1>(acc, none, cell_weights, x + (slot * kTiles + tile) * x_tile, p.cell_pairs);
          store_fragments<4, kColumns>(reduce, acc);
          block_sync();
          if (forms) {
            const float4 sum = reduced<kCellFragments, kWarps>(reduce, 0, tid);
            const float dm[4] = {sum.x, sum.y, sum.z, sum.w};
            uint2 dz[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int b = b0 + tile * 8 * kColumns + form_batch + (j & 1);
              dz[j] = cell_gradient<T>(facts[j], dm[j], p.cell_clip, &dc[tile][j]);
              if (b < p.batch) {
                p.grad_gates[direction][(int64_t{b} * p.steps + t) * p.hidden + cell + 8 * (j >> 1)] = dz[j];
              }
            }
            uint4* to = d + (slot * kTiles + tile) * d_tile + d_vector;
            store_relaxed(to, make_uint4(dz[0].x, dz[0].y, dz[2].x, dz[2].y));
            store_relaxed(to + 4, make_uint4(dz[1].x, dz[1].y, dz[3].x, dz[3].y));
          }
          block_sync();  // `reduce` is free
        }
      }

      // This thread's words of two iterations ago: everybody has read them.
      if (iteration >= 2) {
        const int old = (iteration - 2) % kSlots;
        const uint4 empty = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (kProjected && keeps) {
            store_relaxed(reinterpret_cast<uint32_t*>(x + (old * kTiles + tile) * x_tile) + x_word, kEmpty);
          }
          if (publishes_d) {
            uint4* to = d + (old * kTiles + tile) * d_tile + d_vector;
            store_relaxed(to, empty);
            if (kProjected) store_relaxed(to + 4, empty);
          }
          if (kPartial && tid < kFragments) {
            store_relaxed(partial + (old * kTiles + tile) * s_tile + block * kFragments + tid, empty);
          }
        }
      }

      // rows
      if (warp_index() == kWarps - 1) wait_cleared(cleared, p.blocks, iteration + 2 - kSlots);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float acc[kRows][kColumns][4];
        const uint4* from = d + (slot * kTiles + tile) * d_tile + k_group * p.row_pairs * kColumns * 32;
        product<T, kRows, kColumns, kRegisters, kHeld>(acc, held, weights, from, p.row_pairs);
        store_fragments<kRows, kColumns>(reduce + (kPartial ? 0 : tile * kWarps * kFragments), acc);
        block_sync();
        if constexpr (kPartial) {
          if (tid < kFragments) {
            const float4 sum = reduced<kFragments, kWarps>(reduce, 0, tid);
            const uint4 words = make_uint4(bits_of(sum.x), bits_of(sum.y), bits_of(sum.z), bits_of(sum.w));
            store_relaxed(partial + (slot * kTiles + tile) * s_tile + block * kFragments + tid, published(words));
          }
          block_sync();  // `reduce` is free
        }
      }
      if (iteration >= 2 && tid == kThreads - 1) store_release(cleared + block, static_cast<uint32_t>(iteration - 1));
    }

    // What is left goes to the initial state.
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int b = b0 + tile * 8 * kColumns + finish_batch;
      if (keeps && b < p.batch) {
#pragma unroll
        for (int j = 0; j < kKept; ++j) {
          p.grad_h_0[(int64_t{direction} * p.batch + b) * p.size + row + 8 * j] = carried[tile][j];
        }
      }
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        const int of = b0 + tile * 8 * kColumns + form_batch + (j & 1);
        if (forms && of < p.batch) {
          p.grad_c_0[(int64_t{direction} * p.batch + of) * p.hidden + cell + 8 * (j >> 1)] = dc[tile][j];
        }
      }
    }
  }
}

}  // namespace ctxfast::lstm_backward
