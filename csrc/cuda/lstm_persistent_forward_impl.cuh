// SPDX-License-Identifier: Apache-2.0
// The recurrence of `lstm` forwards, all steps in one cooperative launch, weights on chip. Not yet run on a GPU: run on
// the emulator. A predecessor (4096 cells, 512 projected, fp16) ran on an H100: 4.3 us a step at B = 8, 8.2 at B = 32.
//
// Who owns what. A direction has `blocks` blocks of 512 threads, one per multiprocessor. Block i owns the cells
// [i C, (i + 1) C), C = 16, 32 or 64, as C / 4 tiles of 16 gate rows (row = 4 gate + cell); with a projection the first
// P / 8 blocks also own 8 rows of it each. The batch goes in tiles of 8 kTiles rows, one after the other; weights stay.
//
// One step (round) of a tile:
//   product   W_hh h. Tiles of 8 rows by mma.sync: a warp takes 4 row tiles and every KG-th 32 of K, reads its part of
//             h straight from L2 into registers and starts when that part is there. 16 and 32 rows by wgmma: a K group
//             of 4 KG warps copies its part of h to shared memory first. K groups meet in shared memory.
//             (4096/512, B = 8: predicted 1,650 cycles against the predecessor's 2,230 for one row tile per warp and h
//             in shared memory; all weights of a step must still pass, 128 bytes a cycle.)
//   cells     a warp holds the four gates of 4 cells x 8 rows: c, m = o tanh(c). Published: h, or m with a projection.
//   project   8 rows of W_proj times all m, gathered as operands from L2, 8 vectors of a thread under way at once (the
//             predecessor had 4 at B = 32, 6,100 cycles; predicted 4,500: 256 KB a block at 64 bytes a cycle). The 16
//             warps' sums meet in shared memory without bank conflicts. Published: h.
//
// Exchange. The data is its own flag: a word of a slot is kEmpty until it is written; no arithmetic makes that pair of
// NaNs (conversions make 0x7FFF), and `filled` maps away what comes from memory. Slot n % kSlots carries round n; h_0
// is round -1, and the last round of a tile carries h_0 of the next tile instead of h, so rounds run on evenly over
// tiles; rows past their end publish the h they keep. Who writes a word clears it: m of round n - 1 and h of round n -
// 1 in round n with a projection, h of round n - 2 in round n without. Once a round every warp executes a fence, where
// it waits anyway and has no fresh stores: with a projection warps 0-7 (who publish h) between publishing m and
// gathering, warps 8-15 (who publish m) at the end; without, warps 8-15 (who publish h) after the product, warps 0-7 at
// the end.
//
// Why that is safe (block A clears, block Z reads; "joined" = by block_sync):
// 1. No word is cleared before all have read it. With a projection: A clears m of n - 1 after its warps, joined, saw h
//    of n - 1 from all blocks that project; each published it after its warps, joined, had gathered m of n - 1. A
//    clears h of n - 1 after its warps, joined, gathered m of n from all blocks; each published it after its warps,
//    joined, had read h of n - 1. Without: A clears h of n - 2 after its warps, joined, saw h of n - 1 of all blocks,
//    each published after its warps, joined, had read h of n - 2. A reader leaves its loop only with a value that is
//    not kEmpty, so no order of memory can let it see the clear of that very round.
// 2. No reader sees what a slot held kSlots rounds before. A word cleared in round r is polled next in round r + 3 or
//    later. A's warp that publishes (joined with the clears) executes a fence after them and before it publishes in
//    round r + 1: a release. The thread of Z that polls the word polls the same place of every slot, so it read what A
//    published in round r + 1, in round r + 1 (m) or r + 2 (h), and executes a fence after that and before it polls the
//    word: an acquire. So the clear happens before the read. Before the first rounds the launcher clears on the stream.
// 3. A word's clear and its next write are by the same thread, in program order.
// 4. Nobody waits for ever: round n waits only for what rounds <= n of blocks that are all resident publish.
// Every spin is bounded and traps. All blocks run all rounds, whatever the lengths.
//
// Numbers. fp32 sums in an order fixed by the sizes and kTiles alone, no atomics; fp32 cells; h and m rounded to the
// weights' type where they are published. tanh.approx: 2e-4 of relative error over 128 steps (H100).
#pragma once

#include "device.cuh"

namespace ctxfast::lstm_forward {

constexpr int kThreads = 512, kWarps = 16;
constexpr int kSlots = 4;
constexpr uint32_t kEmpty = 0xFFFFFFFFu;
// About a second: a peer answers within microseconds, or never.
constexpr int kSpins = 1 << 21;
// k-steps of 16 whose weights a warp (its 16 or 64 gate rows) keeps in registers: 64 of them.
constexpr int kRegisterFragments = 16;
constexpr int kMmaTiles = 4;  // row tiles of a warp, mma.sync

// Bytes from the start of shared memory.
struct SharedPlaces {
  int projection, h, partial, published, sums, lengths;
};

struct KernelParams {
  int batch, steps, hidden, size, directions;  // size: P, or H without projection
  int row_tiles;                               // of a block: C / 4
  int pairs;                                   // 32s of K = P
  int cell_pairs;                              // 32s of H with a projection, else 0
  int batch_tiles;
  bool shares_h;  // published values and sums lie where h lay
  SharedPlaces at;
  const uint4* packed[2];       // [block] gate weights, then [P / 8] projection weights
  const uint2* gates[2];        // (B, T, H) of four 16-bit gates
  int64_t gates_strides[2][2];  // of B and T, in uint2
  const int64_t* lengths;       // or null
  const void* h_0;              // or null
  const float* c_0;             // or null
  float cell_clip, proj_clip;   // infinity: off
  void* output;
  int64_t output_strides[2];
  void* h_n;
  float* c_n;
  float* cells;    // or null
  uint4* h_slots;  // [directions][kSlots][pairs][kTiles][32]
  uint4* m_slots;  // [directions][kSlots][cell_pairs][kTiles][32]
};

CTXFAST_DEVICE uint32_t filled(uint32_t word) { return word == kEmpty ? 0x7FFF7FFFu : word; }
CTXFAST_DEVICE uint4 filled(uint4 v) { return make_uint4(filled(v.x), filled(v.y), filled(v.z), filled(v.w)); }
CTXFAST_DEVICE bool is_filled(uint4 v) { return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty; }

// Waits for the first `count` of N vectors, address(i). All loads are under way before the first is looked at: one
// after another they cost 1.7 us a step at B = 32 (H100).
template <int N, typename Address>
CTXFAST_DEVICE void wait_for(uint4 (&v)[N], int count, Address address) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    v[i] = make_uint4(0, 0, 0, 0);
    if (i < count) v[i] = load_relaxed(address(i));
  }
  for (int spins = 0;; ++spins) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) all = all && is_filled(v[i]);
    if (all) return;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!is_filled(v[i])) v[i] = load_relaxed(address(i));
    }
    if (spins > kSpins) {
      trap_with(1, count);
      __builtin_unreachable();  // so that nothing is saved for after it
    }
  }
}

// A slot's uint4 of 8 consecutive k (k8 = k / 8) of one row of a tile. For mma: lane 4 row + k8 % 4 of a warp reads 8
// k, word j of which is register j % 2 of k-step j / 2 of a pair; the other operand's k are permuted alike: k = 32 pair
// + 8 (lane % 4) + 4 step + 2 register + element. For wgmma: 8 x 8 core matrices.
template <int kTiles, bool kForMma>
CTXFAST_DEVICE int slot_place(int k8, int tile, int row) {
  return kForMma ? (((k8 >> 2) * kTiles + tile) * 8 + row) * 4 + (k8 & 3) : (k8 * kTiles + tile) * 8 + row;
}

// Where a warp, or a warpgroup, stands in the product: `row` of the rows' groups, K group `k` of `k_groups`.
struct Part {
  int row, k, k_groups;
};

template <int kTiles>
CTXFAST_DEVICE Part part_of(int row_tiles, int warp) {
  // The shuffle tells the compiler that a warp's lanes agree: wgmma runs on only where it is sure of that.
  const int rows = row_tiles / 4, unit = shuffle(kTiles == 1 ? warp : warp >> 2, 0);
  return {unit & (rows - 1), unit / rows, (kTiles == 1 ? kWarps : kWarps / 4) / rows};
}

// The weights that stay: registers `w`, and what is left in shared memory.
template <int kTiles, bool kInRegisters>
CTXFAST_DEVICE void load_weights(const KernelParams& p, uint4 (&w)[kRegisterFragments], int direction, int block) {
  const int thread = thread_index(), warp = warp_index(), lane = lane_index();
  uint4* shared = reinterpret_cast<uint4*>(shared_memory());
  const Part part = part_of<kTiles>(p.row_tiles, warp);
  const int64_t block_vectors = static_cast<int64_t>(p.row_tiles) * p.pairs * 64;
  const uint4* weights = p.packed[direction] + block * block_vectors;
  if constexpr (kTiles == 1) {
    // [tile][pair][step][lane]
    const int left = (p.pairs + part.k_groups - 1) / part.k_groups - 2;  // of the warp with most, in shared memory
    const auto from = [&](int i, int t, int step) {
      return weights[(((part.row * kMmaTiles + t) * p.pairs + part.k + i * part.k_groups) * 2 + step) * 32 + lane];
    };
#pragma unroll
    for (int f = 0; f < kRegisterFragments; ++f) {
      w[f] = make_uint4(0, 0, 0, 0);
      if (part.k + (f >> 3) * part.k_groups < p.pairs) w[f] = from(f >> 3, (f >> 1) & 3, f & 1);
    }
    for (int i = 2; part.k + i * part.k_groups < p.pairs; ++i) {
      for (int f = 0; f < 8; ++f) shared[((warp * left + i - 2) * 8 + f) * 32 + lane] = from(i, f >> 1, f & 1);
    }
  } else {
    // [64 rows][k-step] of 2 KB: registers' order for the first steps if they are kept there, else core matrices
    constexpr int kept = kInRegisters ? kRegisterFragments : 0;
    const int steps = 2 * p.pairs, vectors = (steps - kept) * 128;
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kept; ++k) w[k] = weights[(part.row * steps + k) * 128 + (warp & 3) * 32 + lane];
    }
    for (int group = 0; group < p.row_tiles / 4; ++group) {
      for (int i = thread; i < vectors; i += kThreads) {
        shared[group * vectors + i] = weights[(group * steps + kept) * 128 + i];
      }
    }
  }
  if (8 * block < p.size && p.cell_pairs > 0) {
    uint4* to = reinterpret_cast<uint4*>(shared_memory() + p.at.projection);
    const uint4* from = p.packed[direction] + p.hidden / (4 * p.row_tiles) * block_vectors;
    for (int i = thread; i < p.cell_pairs * 32; i += kThreads) to[i] = from[block * p.cell_pairs * 32 + i];
  }
}

CTXFAST_DEVICE uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Four row tiles times 16 of K.
template <typename T>
CTXFAST_DEVICE void multiply_step(float (&sums)[kMmaTiles][4], const uint4 (&w)[kMmaTiles], uint32_t low,
                                  uint32_t high) {
  const uint32_t b[2] = {low, high};
#pragma unroll
  for (int t = 0; t < kMmaTiles; ++t) {
    const uint32_t a[4] = {w[t].x, w[t].y, w[t].z, w[t].w};
    mma_16x8x16<T>(sums[t], a, b);
  }
}

// Products of mma.sync: h from its slot straight into registers; partial sums to shared memory.
template <typename T>
CTXFAST_DEVICE void product_mma(const KernelParams& p, const uint4 (&w)[kRegisterFragments], const uint4* h) {
  const int warp = warp_index(), lane = lane_index();
  const Part part = part_of<1>(p.row_tiles, warp);
  const int count = part.k < p.pairs ? (p.pairs - part.k + part.k_groups - 1) / part.k_groups : 0;
  const int left = (p.pairs + part.k_groups - 1) / part.k_groups - 2;
  const uint4* shared = reinterpret_cast<const uint4*>(shared_memory()) + warp * left * 256 + lane;
  float sums[kMmaTiles][4] = {};
  const auto address = [&](int i) { return h + (part.k + i * part.k_groups) * 32 + lane; };
  constexpr int kAtOnce = 4;
  for (int first = 0; first < count; first += kAtOnce) {
    uint4 v[kAtOnce];
    wait_for(v, count - first, [&](int i) { return address(first + i); });
    warp_sync();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= count) continue;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint4 a[kMmaTiles];
#pragma unroll
        for (int t = 0; t < kMmaTiles; ++t) {
          if (i < 2 && first == 0) {
            a[t] = w[(i & 1) * 8 + 2 * t + step];
          } else {
            a[t] = shared[((first + i - 2) * 8 + 2 * t + step) * 32];
          }
        }
        multiply_step<T>(sums, a, word(v[i], 2 * step), word(v[i], 2 * step + 1));
      }
    }
  }
  float4* partial = reinterpret_cast<float4*>(shared_memory() + p.at.partial);
#pragma unroll
  for (int t = 0; t < kMmaTiles; ++t) {
    partial[(part.k * p.row_tiles + part.row * kMmaTiles + t) * 32 + lane] =
        make_float4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
  }
}

// Products of wgmma: h, or the K group's part of it, by way of shared memory. Partial sums go to shared memory if there
// are several K groups.
template <typename T, int kTiles, bool kInRegisters>
CTXFAST_DEVICE void product_wgmma(const KernelParams& p, const uint4 (&w)[kRegisterFragments], const uint4* h,
                                  float (&sums)[kTiles][4]) {
  constexpr int kept = kInRegisters ? kRegisterFragments : 0;
  constexpr int kAtOnce = kInRegisters ? kTiles : 8;
  const int warp = warp_index(), lane = lane_index();
  const Part part = part_of<kTiles>(p.row_tiles, warp);
  const int members = kThreads / part.k_groups, member = part.row * 128 + (thread_index() & 127);
  const int share = p.pairs / part.k_groups, begin = share * part.k;
  unsigned char* at_h = shared_memory() + p.at.h;
  uint4* shared_h = reinterpret_cast<uint4*>(at_h);
  const int vectors = share * kTiles * 32;
  for (int first = member, pass = 0; pass == 0 || first < vectors; first += kAtOnce * members, ++pass) {
    uint4 v[kAtOnce];
    const int count = first < vectors ? (vectors - first + members - 1) / members : 0;
    const uint4* from = h + begin * kTiles * 32 + first;
    wait_for(v, count, [&](int i) { return from + i * members; });
    if (p.shares_h && pass == 0) block_sync();  // the sums of the step before have been read
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i < count) shared_h[begin * kTiles * 32 + first + i * members] = v[i];
    }
  }
  shared_written();
  barrier_sync(1 + part.k, members);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
  const uint64_t b = wgmma_descriptor(at_h, kTiles * 128, 128);
  const uint64_t a = wgmma_descriptor(shared_memory() + part.row * (2 * p.pairs - kept) * 2048, 1024, 128);
  wgmma_fence();
  if constexpr (kInRegisters) {
#pragma unroll
    for (int k = 0; k < kept; ++k) wgmma_rs<T, 8 * kTiles>(sums, w[k], b + k * (kTiles * 256 >> 4));
  }
  const int first_step = 2 * begin + kept;
  for (int k = 0; k < 2 * share - kept; k += 2) {
    wgmma_fence();  // else the compiler adds one before every product
#pragma unroll
    for (int i = k; i < k + 2; ++i) {
      wgmma_ss<T, 8 * kTiles>(sums, a + (first_step - kept + i) * (2048 >> 4), b + (first_step + i) * (kTiles * 256 >> 4));
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  if (part.k_groups > 1) {
    float4* partial = reinterpret_cast<float4*>(shared_memory() + p.at.partial);
    const int row_tile = part.row * 4 + (warp & 3);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      partial[((part.k * p.row_tiles + row_tile) * kTiles + n) * 32 + lane] =
          make_float4(sums[n][0], sums[n][1], sums[n][2], sums[n][3]);
    }
  }
}

// 8 rows of W_proj times all m, gathered from their slot; the warps' sums to shared memory:
// [tile][half of the lanes][warp][16] of float2: row of the batch lane / 4, rows 2 (lane % 4) and the next of W_proj.
template <typename T, int kTiles>
CTXFAST_DEVICE void project(const KernelParams& p, const uint4* m) {
  const int warp = warp_index(), lane = lane_index();
  constexpr int kAtOnce = 8 / kTiles;  // pairs
  constexpr int kHalves = kTiles == 1 ? 1 : kTiles / 2;
  const uint4* weights = reinterpret_cast<const uint4*>(shared_memory() + p.at.projection) + lane;
  const int count = warp < p.cell_pairs ? (p.cell_pairs - warp + kWarps - 1) / kWarps : 0;
  float sums[kHalves][4] = {};
  for (int first = 0; first < count; first += kAtOnce) {
    uint4 v[kAtOnce * kTiles];
    const uint4* from = m + (warp + first * kWarps) * kTiles * 32 + lane;
    wait_for(v, (count - first) * kTiles,
             [&](int i) { return from + ((i / kTiles) * kWarps * kTiles + i % kTiles) * 32; });
    warp_sync();
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= count) continue;
      const uint4 f = weights[(warp + (first + i) * kWarps) * 32];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t b[2] = {word(f, 2 * step), word(f, 2 * step + 1)};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          // Two tiles of 8 batch rows are the 16 rows of the product; one leaves half of it empty.
          const uint4& low = v[i * kTiles + 2 * half];
          uint32_t a[4] = {word(low, 2 * step), 0, word(low, 2 * step + 1), 0};
          if constexpr (kTiles > 1) {
            const uint4& high = v[i * kTiles + 2 * half + 1];
            a[1] = word(high, 2 * step);
            a[3] = word(high, 2 * step + 1);
          }
          mma_16x8x16<T>(sums[half], a, b);
        }
      }
    }
  }
  float2* to = reinterpret_cast<float2*>(shared_memory() + p.at.sums);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    to[((2 * n + (lane >> 4)) * kWarps + warp) * 16 + (lane & 15)] =
        make_float2(sums[n >> 1][2 * (n & 1)], sums[n >> 1][2 * (n & 1) + 1]);
  }
}

template <typename T>
CTXFAST_DEVICE T initial_h(const KernelParams& p, int direction, int row, int k) {
  if (p.h_0 == nullptr || row >= p.batch) return from_float<T>(0);
  return static_cast<const T*>(p.h_0)[(static_cast<int64_t>(direction) * p.batch + row) * p.size + k];
}
// N: uint4 or uint32_t, 8 or 2 values from k on.
template <typename T, typename N>
CTXFAST_DEVICE N initial_h_of(const KernelParams& p, int direction, int row, int k) {
  if (p.h_0 == nullptr || row >= p.batch) return N{};
  const T* at = static_cast<const T*>(p.h_0) + (static_cast<int64_t>(direction) * p.batch + row) * p.size + k;
  return *reinterpret_cast<const N*>(at);
}

// NaN stays NaN.
CTXFAST_DEVICE float clipped(float x, float bound) { return x > bound ? bound : x < -bound ? -bound : x; }

template <typename T, int kTiles, bool kProjected, bool kInRegisters>
__global__ void __launch_bounds__(kThreads, 1) lstm_persistent_forward_kernel(const __grid_constant__ KernelParams p) {
  constexpr bool kMma = kTiles == 1;
  const int thread = thread_index(), warp = warp_index(), lane = lane_index();
  const int direction = block_index() % p.directions, block = block_index() / p.directions;
  const int cells = 4 * p.row_tiles, first_cell = block * cells;
  const bool projects = kProjected && 8 * block < p.size;
  const int k_groups = (kMma ? 64 : 16) / p.row_tiles;

  uint4 w[kRegisterFragments];
  load_weights<kTiles, kInRegisters>(p, w, direction, block);

  uint4* const h_slots = p.h_slots + direction * kSlots * p.pairs * kTiles * 32;
  uint4* const m_slots = p.m_slots + direction * kSlots * p.cell_pairs * kTiles * 32;
  const auto h_slot = [&](int round) { return h_slots + (round & (kSlots - 1)) * p.pairs * kTiles * 32; };
  const auto m_slot = [&](int round) { return m_slots + (round & (kSlots - 1)) * p.cell_pairs * kTiles * 32; };

  int* lengths = reinterpret_cast<int*>(shared_memory() + p.at.lengths);
  const float4* partial = reinterpret_cast<const float4*>(shared_memory() + p.at.partial);
  T* published = reinterpret_cast<T*>(shared_memory() + p.at.published);  // [cell / 8][tile][row][8]

  // The thread's pieces of work. In `cells`: pair j of (row tile, batch tile), one cell, one row.
  const int tile_row = 2 * (lane & 3) + (lane >> 4);
  const auto row_tile_of = [&](int j) { return (16 * j + warp) & (p.row_tiles - 1); };
  const auto batch_tile_of = [&](int j) { return (16 * j + warp) / p.row_tiles; };
  const auto has_pair = [&](int j) { return 16 * j + warp < p.row_tiles * kTiles; };
  const auto cell_of = [&](int j) { return 4 * row_tile_of(j) + ((lane >> 2) & 3); };
  const auto row_of = [&](int j) { return 8 * batch_tile_of(j) + tile_row; };
  // Publishing the block's cells: warps 8-15, one uint4 of 8 cells (`from8`) and a row each, in the slot's order.
  const int vector = thread - kThreads / 2;
  const bool publishes = vector >= 0 && vector < cells / 8 * kTiles * 8;
  constexpr bool kForMma = kMma || kProjected;
  int from8 = 0, from_tile = 0, from_row = 0;
  if (publishes) {
    if constexpr (kForMma) {
      const int group = cells < 32 ? cells / 8 : 4, rest = vector / group;  // of 8 cells within a pair
      from8 = vector % group + rest / (8 * kTiles) * 4;
      from_row = rest % 8;
      from_tile = rest / 8 % kTiles;
    } else {
      from8 = vector / (8 * kTiles);
      from_tile = vector / 8 % kTiles;
      from_row = vector % 8;
    }
  }
  const int from_k8 = first_cell / 8 + from8;
  const int to_vector = slot_place<kTiles, kForMma>(from_k8, from_tile, from_row);
  // Finishing kProjected h: warp 2 n + e sums half e of tile n; lanes 0-15 then have two values of one row.
  const bool finishes = projects && warp < 2 * kTiles;
  const int role = (warp & 1) * 16 + (lane & 15);
  const int h_row = 8 * (warp >> 1) + (role >> 2), h_k = 8 * block + 2 * (role & 3);
  const int h_word = finishes ? 4 * slot_place<kTiles, kMma>(block, warp >> 1, role >> 2) + (role & 3) : 0;

  // Round -1: h_0.
  if (kProjected) {
    if (finishes && lane < 16) {
      store_relaxed(reinterpret_cast<uint32_t*>(h_slot(-1)) + h_word,
                    filled(initial_h_of<T, uint32_t>(p, direction, h_row, h_k)));
    }
  } else if (publishes) {
    store_relaxed(h_slot(-1) + to_vector,
                  filled(initial_h_of<T, uint4>(p, direction, 8 * from_tile + from_row, 8 * from_k8)));
  }

  int round = 0;
  for (int tile = 0; tile < p.batch_tiles; ++tile) {
    const int base = tile * 8 * kTiles;
    block_sync();
    if (thread < 8 * kTiles) {
      int length = 0;
      if (base + thread < p.batch) {
        length = p.steps;
        if (p.lengths != nullptr) {
          const int64_t given = p.lengths[base + thread];
          length = given < 0 ? 0 : given > p.steps ? p.steps : static_cast<int>(given);
        }
      }
      lengths[thread] = length;
    }
    shared_written();  // of the weights
    block_sync();
    float c[kTiles], kept_h[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      c[j] = kept_h[j] = 0;
      if (has_pair(j) && base + row_of(j) < p.batch) {
        const int64_t state = static_cast<int64_t>(direction) * p.batch + base + row_of(j);
        if (p.c_0 != nullptr) c[j] = p.c_0[state * p.hidden + first_cell + cell_of(j)];
        if (!kProjected) kept_h[j] = to_float(initial_h<T>(p, direction, base + row_of(j), first_cell + cell_of(j)));
      }
    }
    uint32_t kept_word = finishes ? initial_h_of<T, uint32_t>(p, direction, base + h_row, h_k) : 0;

    for (int step = 0; step < p.steps; ++step, ++round) {
      const bool last = step + 1 == p.steps, very_last = last && tile + 1 == p.batch_tiles;
      // Where a row of this length stands in time; past its end every later place once.
      const auto time_of = [&](int length) { return direction == 1 && step < length ? length - 1 - step : step; };

      uint2 gates[kTiles];  // loads under way while h is waited for
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        gates[j] = make_uint2(0, 0);
        if (!has_pair(j)) continue;
        const int length = lengths[row_of(j)];
        if (step < length) {
          gates[j] = load_streaming(p.gates[direction] + (base + row_of(j)) * p.gates_strides[direction][0] +
                                    time_of(length) * p.gates_strides[direction][1] + first_cell + cell_of(j));
        }
      }

      float sums[kTiles][4];
      if constexpr (kMma) {
        product_mma<T>(p, w, h_slot(round - 1));
      } else {
        product_wgmma<T, kTiles, kInRegisters>(p, w, h_slot(round - 1), sums);
      }
      block_sync();
      if (!kProjected && warp >= 8) fence();

#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (!has_pair(j)) continue;
        float4 z;
        if (!kMma && k_groups == 1) {
          z = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
        } else {
          z = make_float4(0, 0, 0, 0);
          const float4* from = partial + (row_tile_of(j) * kTiles + batch_tile_of(j)) * 32 + lane;
#pragma unroll 4
          for (int k = 0; k < k_groups; ++k) {
            const float4 part = from[k * p.row_tiles * kTiles * 32];
            z.x += part.x, z.y += part.y, z.z += part.z, z.w += part.w;
          }
        }
        // Lanes 0-15 hold i and g, the others f and o, of two rows of the batch; each takes one row.
        const bool low = lane < 16;
        const float other0 = shuffle_xor(low ? z.y : z.x, 16), other1 = shuffle_xor(low ? z.w : z.z, 16);
        const float2 given_if = unpack2<T>(gates[j].x), given_go = unpack2<T>(gates[j].y);
        const float i = given_if.x + (low ? z.x : other0), f = given_if.y + (low ? other0 : z.y);
        const float g = given_go.x + (low ? z.z : other1), o = given_go.y + (low ? other1 : z.w);
        const float new_c = clipped(sigmoid_fast(i) * tanh_fast(g) + sigmoid_fast(f) * c[j], p.cell_clip);
        float m = sigmoid_fast(o) * tanh_fast(new_c);
        const int length = lengths[row_of(j)];
        const bool active = step < length;
        if (active) c[j] = new_c;
        if (!kProjected) {
          if (active) kept_h[j] = to_float(from_float<T>(clipped(m, p.proj_clip)));
          m = kept_h[j];
        }
        const int cell = cell_of(j), row = base + row_of(j);
        published[(((cell >> 3) * kTiles + batch_tile_of(j)) * 8 + tile_row) * 8 + (cell & 7)] = from_float<T>(m);
        if (row < p.batch) {
          const int64_t state = static_cast<int64_t>(direction) * p.batch + row;
          if (p.cells != nullptr) {
            p.cells[(state * p.steps + time_of(length)) * p.hidden + first_cell + cell] = active ? new_c : 0.0f;
          }
          if (last) p.c_n[state * p.hidden + first_cell + cell] = c[j];
        }
      }
      block_sync();

      if (warp < 8) {
        fence();
      } else if (publishes) {
        const uint4 v = reinterpret_cast<const uint4*>(published)[(from8 * kTiles + from_tile) * 8 + from_row];
        const uint4 nothing = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
        if (kProjected) {
          store_relaxed(m_slot(round) + to_vector, filled(v));
          if (round > 0) store_relaxed(m_slot(round - 1) + to_vector, nothing);
        } else {
          const int row = base + 8 * from_tile + from_row;
          if (!very_last) {
            const uint4 next = last ? initial_h_of<T, uint4>(p, direction, row + 8 * kTiles, 8 * from_k8) : v;
            store_relaxed(h_slot(round) + to_vector, filled(next));
          }
          if (round > 0) store_relaxed(h_slot(round - 2) + to_vector, nothing);
          if (row < p.batch) {
            const int length = lengths[row - base];
            T* to = static_cast<T*>(p.output) + row * p.output_strides[0] + time_of(length) * p.output_strides[1] +
                    direction * p.size + 8 * from_k8;
            *reinterpret_cast<uint4*>(to) = step < length ? v : make_uint4(0, 0, 0, 0);
            if (last) {
              T* state = static_cast<T*>(p.h_n) + (static_cast<int64_t>(direction) * p.batch + row) * p.size;
              *reinterpret_cast<uint4*>(state + 8 * from_k8) = v;
            }
          }
        }
      }
      if constexpr (!kProjected) continue;

      if (projects) {
        project<T, kTiles>(p, m_slot(round));
        block_sync();
      }
      if (finishes) {
        const float2* from = reinterpret_cast<const float2*>(shared_memory() + p.at.sums) + warp * kWarps * 16;
        float2 sum = make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < kWarps / 2; ++i) {
          const float2 part = from[((lane >> 4) * (kWarps / 2) + i) * 16 + (lane & 15)];
          sum.x += part.x, sum.y += part.y;
        }
        sum.x += shuffle_xor(sum.x, 16);
        sum.y += shuffle_xor(sum.y, 16);
        const uint32_t h = pack2<T>(clipped(sum.x, p.proj_clip), clipped(sum.y, p.proj_clip));
        const int length = lengths[h_row], row = base + h_row;
        if (step < length) kept_word = h;
        if (lane < 16) {
          uint32_t* slot = reinterpret_cast<uint32_t*>(h_slot(round)) + h_word;
          if (!very_last) {
            const uint32_t next = last ? initial_h_of<T, uint32_t>(p, direction, row + 8 * kTiles, h_k) : kept_word;
            store_relaxed(slot, filled(next));
          }
          store_relaxed(reinterpret_cast<uint32_t*>(h_slot(round - 1)) + h_word, kEmpty);
          if (row < p.batch) {
            T* to = static_cast<T*>(p.output) + row * p.output_strides[0] + time_of(length) * p.output_strides[1] +
                    direction * p.size + h_k;
            *reinterpret_cast<uint32_t*>(to) = step < length ? h : 0;
            if (last) {
              T* state = static_cast<T*>(p.h_n) + (static_cast<int64_t>(direction) * p.batch + row) * p.size;
              *reinterpret_cast<uint32_t*>(state + h_k) = kept_word;
            }
          }
        }
      }
      if (warp >= 8) fence();
    }
  }
}

}  // namespace ctxfast::lstm_forward
