// SPDX-License-Identifier: Apache-2.0
// The recurrence of `lstm` forwards, all steps in one cooperative launch, weights on chip. A
// predecessor (4096 cells, 512 projected, fp16) took 4.3 us a step at B = 8 on an H100, 8.2 at B = 32.
//
// Who owns what. A direction has `blocks` blocks of 512 threads, one per multiprocessor. Block i owns the cells
// [i C, (i + 1) C), C = 16, 32 or 64, as C / 4 tiles of 16 gate rows (row = 4 gate + cell); with a projection the first
// P / 8 blocks also own 8 rows of it each. The batch goes in tiles of 8 kTiles rows, one after the other; weights stay.
//
// One step (round) of a tile:
//   product   W_hh h. Tiles of 8 rows by mma.sync: a warp takes 4 row tiles and every KG-th 32 of K, reads its part of
//             h straight from L2 into registers. 16 and 32 rows by wgmma: a K group of 4 KG warps copies its part of h
//             to shared memory first. K groups meet in shared memory. The input's part of the gates comes meanwhile.
//   cells     a warp holds the four gates of 4 cells x 8 rows: c, m = o tanh(c). Published: h, or m with a projection.
//   project   8 rows of W_proj times all m, gathered as operands from L2, 8 vectors of a thread under way at once; 4
//             where weights fill the registers and 8 would spill, the next ones then asked for before these are
//             multiplied. The 16 warps' sums meet in shared memory without bank conflicts. Published: h.
//             In pairs (32 rows, where the device holds enough clusters of two blocks): each block of a cluster gathers
//             half of m, multiplies it by the 8 rows of W_proj of both, and sends the other one its sums, 1 KB, through
//             shared memory. A gather is as long as what L2 brings a multiprocessor, so half of it takes half as long.
// ELMo's layer (4096/512) has kernels of its own, in which all sizes are constants. What a step is estimated to take,
// phase by phase: docs/cycles.md.
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
//    clears h of n - 1 after its warps, joined, gathered m of n from all blocks (in pairs: from half of them, and took
//    what the other block sent after it gathered the rest); each published it after its warps, joined, had read h of n
//    -
//    1. Without: A clears h of n - 2 after its warps, joined, saw h of n - 1 of all blocks, each published after its
//    warps, joined, had read h of n - 2. A reader leaves its loop only with a value that is not kEmpty, so no order of
//    memory can let it see the clear of that very round.
// 2. No reader sees what a slot held kSlots rounds before. A word cleared in round r is polled next in round r + 3 or
//    later. A's warp that publishes (joined with the clears) executes a fence after them and before it publishes in
//    round r + 1: a release. The thread of Z that polls the word polls the same place of every slot, so it read what A
//    published in round r + 1, in round r + 1 (m) or r + 2 (h), and executes a fence after that and before it polls the
//    word: an acquire. So the clear happens before the read. Before the first rounds the launcher clears on the stream.
// 3. A word's clear and its next write are by the same thread, in program order.
//    Both are fences of release and acquire (fence.acq_rel.gpu), which is enough: the argument orders one clear before
//    one read by way of what was published in between (a clear, a fence, a publication that the reader saw, a fence, a
//    read: release pattern, observation, acquire pattern), never two unrelated words against each other, which alone
//    would need sequential consistency (__threadfence, dearer). That clears and publications go through relaxed
//    (strong) accesses at GPU scope and barriers of a block order its threads makes each chain one of the PTX model's
//    causality order.
// 4. Nobody waits for ever: round n waits only for what rounds <= n of blocks that are all resident publish or send.
// 5. In pairs, thread y of block B (warps 4-7) sends a word to place n % kNearSlots in block A's shared memory in round
//    n; thread x of A (warps 0-3) polls it there, its own flag again, and clears it. What x polled in round n - 2 is
//    gone: x cleared it, in program order (in the first rounds: before cluster_sync). And the clear happens before the
//    next word, of round n + 2: all of A's warps 4-7 are joined with x after it, execute their fence in round n + 1,
//    between publishing m and gathering, and then send (a release); B's warps 0-3 take that in round n + 1, execute
//    their fence in round n + 2 (an acquire), and are joined with y after it and before y sends. With one place instead
//    of two nothing would order the clear of a word before the next one.
//    A store to another block's shared memory needs a block that lives: cluster_sync before the first; and nothing is
//    under way to a block that ends, for it takes what it is sent in its last round, too.
// Every spin is bounded and traps. All blocks run all rounds, whatever the lengths.
//
// Numbers. fp32 sums in an order fixed by the sizes, kTiles and kInPairs alone, no atomics; fp32 cells; h and m rounded
// to the weights' type where they are published. tanh.approx: 2e-4 of relative error over 128 steps (H100).
#pragma once

#include "lstm/persistent_forward_projection.cuh"

namespace ctxfast::lstm_forward {

// A thread's work on cells: piece j is one cell and one row of (row tile, batch tile) number 16 j + warp.
// kElmo: of 16 row tiles each warp has one, and of it every batch tile.
template <int kTiles, bool kElmo>
struct Pieces {
  int lane, warp, row_tiles, row_shift;
  template <typename Params>
  CTXFAST_DEVICE explicit Pieces(const Params& p) : row_tiles(p.row_tiles), row_shift(p.row_shift) {
    const int thread = thread_anew();
    lane = thread & 31, warp = thread >> 5;
  }
  CTXFAST_DEVICE bool has(int j) const { return kElmo || 16 * j + warp < row_tiles * kTiles; }
  CTXFAST_DEVICE int row_tile(int j) const { return kElmo ? warp : (16 * j + warp) & (row_tiles - 1); }
  CTXFAST_DEVICE int batch_tile(int j) const { return kElmo ? j : (16 * j + warp) >> row_shift; }
  CTXFAST_DEVICE int tile_row() const { return 2 * (lane & 3) + (lane >> 4); }
  CTXFAST_DEVICE int row(int j) const { return 8 * batch_tile(j) + tile_row(); }
  CTXFAST_DEVICE int cell(int j) const { return 4 * row_tile(j) + (lane >> 2 & 3); }
};

// Publishing the block's cells: warps 8-15, 8 cells of a row each, in the order of the slot.
template <int kTiles, bool kForMma>
struct Publisher {
  bool works;
  int k8, tile, row;  // of 8 cells, in the block; row in the tile
  template <typename Params>
  CTXFAST_DEVICE explicit Publisher(const Params& p) {
    const int vector = thread_anew() - kThreads / 2, groups = p.row_tiles / 2;
    works = vector >= 0 && vector < groups * kTiles * 8;
    if (kForMma) {
      const int shift = groups < 4 ? 1 : 2, rest = vector >> shift;  // a pair: 2 or 4 of them
      k8 = (vector & ((1 << shift) - 1)) + rest / (8 * kTiles) * 4;
      tile = rest / 8 % kTiles;
      row = rest % 8;
    } else {
      k8 = vector / (8 * kTiles);
      tile = vector / 8 % kTiles;
      row = vector % 8;
    }
  }
  template <typename Params>
  CTXFAST_DEVICE int first_k8(const Params& p, int block) const {
    return block * (p.row_tiles / 2) + k8;
  }
  template <typename Params>
  CTXFAST_DEVICE int place(const Params& p, int block) const {
    return slot_place<kTiles, kForMma>(first_k8(p, block), tile, row);
  }
};

// The gates' part that does not depend on h: loads under way while h is, or the product. i, f, g, o as they lie, 16
// bits each.
template <typename T, int kTiles, typename Params>
CTXFAST_DEVICE void load_gates(const Params& p, const Walk& at, uint2 (&gates)[kTiles]) {
  const Pieces<kTiles, is_constant<Params>> pieces(p);
  const uint32_t strides[2] = {p.gates_strides[at.direction][0], p.gates_strides[at.direction][1]};
  const auto* all = static_cast<const uint32_t*>(p.gates[at.direction]);
  uint32_t loaded[kTiles][4];
  bool active[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int length = pieces.has(j) ? lengths_of(p)[pieces.row(j)] : 0;
    active[j] = at.step < length;
    if (kTiles == 1 && !active[j]) {  // a branch all the same: else nvcc puts these loads between those of h
      gates[j] = make_uint2(0, 0);
      return;
    }
    // Of several tiles without one, so that all are under way at once: where there is nothing, the tile's first row and
    // step.
    const uint32_t row = active[j] ? at.base + pieces.row(j) : at.base, time = active[j] ? at.time_of(length) : 0;
    const auto* from = reinterpret_cast<const uint16_t*>(all + static_cast<uint64_t>(row) * strides[0] +
                                                         static_cast<uint64_t>(time) * strides[1]) +
                       at.block * 4 * p.row_tiles + (active[j] ? pieces.cell(j) : 0);
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) loaded[j][gate] = from[gate * p.hidden];
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    gates[j] = make_uint2(loaded[j][0] | loaded[j][1] << 16, loaded[j][2] | loaded[j][3] << 16);
    if (!active[j]) gates[j] = make_uint2(0, 0);
  }
}

// Rarely: c of this step and of the last.
template <int kTiles, typename Params>
CTXFAST_DEVICE void store_cells(const Params& p, const Walk& at, const float (&c)[kTiles]) {
  const Pieces<kTiles, is_constant<Params>> pieces(p);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int row = pieces.row(j);
    if (!pieces.has(j) || at.base + row >= p.batch) continue;
    const int64_t state = at.state(p, row);
    const int length = lengths_of(p)[row], cell = at.block * 4 * p.row_tiles + pieces.cell(j);
    if (p.cells != nullptr) {
      p.cells[(state * p.steps + at.time_of(length)) * p.hidden + cell] = at.step < length ? c[j] : 0.0f;
    }
    if (at.last(p)) p.c_n[state * p.hidden + cell] = c[j];
  }
}

// c and m, or h without projection, of the thread's pieces; m and h to shared memory: [cell / 8][tile][row][8].
template <typename T, int kTiles, bool kProjected, bool kInRegisters, typename Params>
CTXFAST_DEVICE void advance_cells(const Params& p, const Walk& at, const uint2 (&gates)[kTiles],
                                  const float (&sums)[kTiles][4], float (&c)[kTiles], float (&h)[kTiles]) {
  const Pieces<kTiles, is_constant<Params>> pieces(p);
  const int k_groups = (kTiles == 1 ? 64 : 16) >> p.row_shift;
  const int lane = pieces.lane;
  const float4* partial = reinterpret_cast<const float4*>(shared_memory() + p.at.partial);
  T* published = reinterpret_cast<T*>(shared_memory() + p.at.published);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    if (!pieces.has(j)) continue;
    float4 z;
    if (kInRegisters || (kTiles > 1 && k_groups == 1)) {  // registers: for blocks of 64 cells, one K group
      z = make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]);
    } else {
      z = make_float4(0, 0, 0, 0);
      const float4* from = partial + (pieces.row_tile(j) * kTiles + pieces.batch_tile(j)) * 32 + lane;
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
    const int row = pieces.row(j), length = lengths_of(p)[row], cell = pieces.cell(j);
    const bool active = at.step < length;
    if (active) c[j] = new_c;
    if (!kProjected) {
      if (active) h[j] = clipped(m, p.proj_clip);
      m = h[j];
    }
    published[(((cell >> 3) * kTiles + pieces.batch_tile(j)) * 8 + pieces.tile_row()) * 8 + (cell & 7)] =
        from_float<T>(m);
  }
  if (p.cells != nullptr || at.last(p)) store_cells<kTiles>(p, at, c);
}

// Warps 8-15: what advance_cells left in shared memory, to the other blocks; without projection it is h. What it needs
// beside that is computed before the barrier, at construction.
template <typename T, int kTiles, bool kProjected, typename Params>
struct CellsPublisher {
  Publisher<kTiles, kTiles == 1 || kProjected> of;
  const uint4* published;
  int place;
  CTXFAST_DEVICE CellsPublisher(const Params& p, const Walk& at) : of(p) {
    published =
        reinterpret_cast<const uint4*>(shared_memory() + p.at.published) + (of.k8 * kTiles + of.tile) * 8 + of.row;
    place = of.place(p, at.block);
  }
  CTXFAST_DEVICE void publish(const Params& p, const Walk& at) const {
    if (!of.works) return;
    const uint4 v = *published;
    const uint4 empty = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
    if (kProjected) {
      store_relaxed(m_slot<kTiles>(p, at, at.round) + place, filled(v));
      if (at.round > 0) store_relaxed(m_slot<kTiles>(p, at, at.round - 1) + place, empty);
      return;
    }
    const int row = 8 * of.tile + of.row, k = 8 * of.first_k8(p, at.block);
    if (!at.very_last(p, 8 * kTiles)) {
      const uint4 next = at.last(p) ? initial_h<T, uint4>(p, at, row + 8 * kTiles, k) : v;
      store_relaxed(h_slot<kTiles>(p, at, at.round) + place, filled(next));
    }
    if (at.round > 0) store_relaxed(h_slot<kTiles>(p, at, at.round - 2) + place, empty);
    if (at.base + row >= p.batch) return;
    const int length = lengths_of(p)[row];
    *reinterpret_cast<uint4*>(output_at<T>(p, at, row, length) + k) = at.step < length ? v : make_uint4(0, 0, 0, 0);
    if (at.last(p)) *reinterpret_cast<uint4*>(static_cast<T*>(p.h_n) + at.state(p, row) * p.size + k) = v;
  }
};

// Where weights fill the registers, the state lies in shared memory while m is gathered, so that two groups of m can be
// under way.
template <int kTiles, typename Params>
CTXFAST_DEVICE float* parked(const Params& p) {
  return reinterpret_cast<float*>(shared_memory() + p.at.parked) + thread_anew();
}
template <int kTiles, typename Params>
CTXFAST_DEVICE void park(const Params& p, const float (&c)[kTiles], uint32_t last_h) {
  float* const to = parked<kTiles>(p);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) to[j * kThreads] = c[j];
  reinterpret_cast<uint32_t*>(to)[kTiles * kThreads] = last_h;
}
template <int kTiles, typename Params>
CTXFAST_DEVICE void unpark(const Params& p, float (&c)[kTiles], uint32_t& last_h) {
  const float* const from = parked<kTiles>(p);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) c[j] = from[j * kThreads];
  last_h = reinterpret_cast<const uint32_t*>(from)[kTiles * kThreads];
}

// Round -1: h_0 of the first tile.
template <typename T, int kTiles, bool kProjected, bool kInPairs, typename Params>
CTXFAST_DEVICE void publish_initial(const Params& p, const Walk& at) {
  if (kProjected) {
    const Finisher<kTiles, kInPairs> finisher(p, at.block);
    if (!finisher.works || !finisher.publishes()) return;
    store_relaxed(reinterpret_cast<uint32_t*>(h_slot<kTiles>(p, at, -1)) + finisher.word(at.block),
                  filled(initial_h<T, uint32_t>(p, at, finisher.row(), finisher.k(at.block))));
  } else {
    const Publisher<kTiles, kTiles == 1> publisher(p);
    if (!publisher.works) return;
    store_relaxed(
        h_slot<kTiles>(p, at, -1) + publisher.place(p, at.block),
        filled(initial_h<T, uint4>(p, at, 8 * publisher.tile + publisher.row, 8 * publisher.first_k8(p, at.block))));
  }
}

// Lengths of a tile's rows to shared memory, states to registers.
template <typename T, int kTiles, bool kProjected, bool kInPairs, typename Params>
CTXFAST_DEVICE void begin_tile(const Params& p, const Walk& at, float (&c)[kTiles], float (&h)[kTiles],
                               uint32_t& last_h) {
  const int thread = thread_anew();
  block_sync();
  if (thread < 8 * kTiles) {
    int length = 0;
    if (at.base + thread < p.batch) {
      length = p.steps;
      if (p.lengths != nullptr) {
        const int64_t steps = p.lengths[at.base + thread];
        length = steps < 0 ? 0 : steps > p.steps ? p.steps : static_cast<int>(steps);
      }
    }
    lengths_of(p)[thread] = length;
  }
  shared_written();  // of the weights
  block_sync();
  const Pieces<kTiles, is_constant<Params>> pieces(p);
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    c[j] = h[j] = 0;
    if (!pieces.has(j) || at.base + pieces.row(j) >= p.batch) continue;
    const int cell = at.block * 4 * p.row_tiles + pieces.cell(j);
    if (p.c_0 != nullptr) c[j] = p.c_0[at.state(p, pieces.row(j)) * p.hidden + cell];
    if (!kProjected) {
      const uint32_t both = initial_h<T, uint32_t>(p, at, pieces.row(j), cell & ~1);
      h[j] = cell & 1 ? unpack2<T>(both).y : unpack2<T>(both).x;
    }
  }
  last_h = 0;
  const Finisher<kTiles, kInPairs> finisher(p, at.block);
  if (kProjected && finisher.works) last_h = initial_h<T, uint32_t>(p, at, finisher.row(), finisher.k(at.block));
}

// 8 kTiles rows of the batch at a time. kInPairs: launched in clusters of two blocks. kInRegisters: the first k-steps
// of wgmma's weights are kept there.
template <typename T, int kTiles, bool kProjected, bool kInRegisters, bool kInPairs, typename Sizes>
__global__ void __launch_bounds__(kThreads, 1)
    lstm_persistent_forward_kernel(const __grid_constant__ KernelParams<Sizes> p) {
  using Params = KernelParams<Sizes>;
  Walk at = {};
  at.take_place<kInPairs>(p);
  uint4 w[kRegisterFragments];
  load_weights<T, kTiles, kInRegisters, kInPairs>(p, w, at.direction, at.block);
  publish_initial<T, kTiles, kProjected, kInPairs>(p, at);
  if constexpr (kInPairs) begin_near<kTiles>(p);
  for (at.base = 0; at.base < p.batch; at.base += 8 * kTiles) {
    float c[kTiles], h[kTiles];  // h: without projection
    uint32_t last_h;             // h with projection
    begin_tile<T, kTiles, kProjected, kInPairs>(p, at, c, h, last_h);
    // While h is under way; a step ahead; or, where weights fill the registers, while the product runs.
    constexpr bool kAhead = kTiles > 1 && !kInRegisters;
    uint2 gates[kTiles];
    at.step = 0;
    if constexpr (kAhead) load_gates<T, kTiles>(p, at, gates);
    for (; at.step < p.steps; ++at.step, ++at.round) {
      float sums[kTiles][4];
      const uint4* before = h_slot<kTiles>(p, at, at.round - 1);
      if constexpr (kTiles == 1) {
        product_mma<T>(p, w, before, [&] { load_gates<T, kTiles>(p, at, gates); });
      } else {
        product_wgmma<T, kTiles, kInRegisters>(p, w, before, sums, [&] {
          if constexpr (!kAhead) load_gates<T, kTiles>(p, at, gates);
        });
      }
      block_sync();
      const bool upper = thread_anew() >= kThreads / 2;
      if (!kProjected && upper) fence();
      advance_cells<T, kTiles, kProjected, kInRegisters>(p, at, gates, sums, c, h);
      block_sync();
      if (!upper) fence();
      const CellsPublisher<T, kTiles, kProjected, Params> cells(p, at);
      cells.publish(p, at);
      if constexpr (kAhead) {  // while the others' cells or h are under way
        ++at.step;
        load_gates<T, kTiles>(p, at, gates);
        --at.step;
      }
      if constexpr (kProjected) {
        if (8 * at.block < p.size) {
          if constexpr (kInRegisters) park<kTiles>(p, c, last_h);
          project<T, kTiles, kInRegisters, kInPairs>(p, m_slot<kTiles>(p, at, at.round), at.block);
          block_sync();
          if constexpr (kInRegisters) unpark<kTiles>(p, c, last_h);
        }
        finish_h<T, kTiles, kInPairs>(p, at, last_h);
        if (upper) fence();
      }
    }
  }
}

}  // namespace ctxfast::lstm_forward
