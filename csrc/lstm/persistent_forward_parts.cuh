// SPDX-License-Identifier: Apache-2.0
// The persistent forward recurrence: parameters, exchange between blocks, products. The whole: persistent_forward.cuh.
#pragma once

#include <type_traits>

#include "base/device.cuh"

namespace ctxfast::lstm_forward {

constexpr int kThreads = 512, kWarps = 16;
constexpr int kSlots = 4;
constexpr int kNearSlots = 2;  // for what the blocks of a pair send each other
constexpr uint32_t kEmpty = 0xFFFFFFFFu;
// k-steps of 16 whose weights a warp (its 16 or 64 gate rows) keeps in registers: 64 of them.
constexpr int kRegisterFragments = 16;
constexpr int kMmaTiles = 4;  // row tiles of a warp, mma.sync
constexpr int kMmaPairs = 5;  // kpairs of a warp at most: more would not fit into shared memory

// Bytes from the start of shared memory.
struct SharedPlaces {
  int projection, h, partial, published, sums, parked, near, lengths, end;
};

// What the sizes and the rows of a tile decide, tiles of 8 rows at once.
constexpr SharedPlaces places_of(int hidden, int size, bool projected, int cells, int tiles, bool in_registers,
                                 bool in_pairs) {
  constexpr int kVector = 16;  // bytes
  const int pairs = size / 32, cell_pairs = projected ? hidden / 32 : 0;
  const int groups = (tiles == 1 ? 64 : 16) * 4 / cells;  // K groups
  SharedPlaces at = {};
  int end = 0;
  const auto place = [&end](int bytes) {
    const int here = end;
    end += (bytes + 127) / 128 * 128;
    return here;
  };
  const int published = cells * tiles * kVector;
  const int sums = projected ? tiles * kWarps * 32 * 8 : 0;
  if (tiles == 1) {
    const int left = (pairs + groups - 1) / groups - 2;  // of the warp with most, beside its registers
    place((left > 0 ? left : 0) * kWarps * 8 * 32 * kVector);
  } else {
    place((2 * pairs - (in_registers ? kRegisterFragments : 0)) * (cells / 16) * 128 * kVector);
  }
  at.projection = place(cell_pairs * 32 * kVector);
  if (tiles == 1) {
    // The sums of warp e's half lie where warp e writes its own partial sums, after it has read them.
    at.partial = at.sums = place(kWarps * kMmaTiles * 32 * kVector);
    at.published = place(published);
  } else {  // with a projection, published values and sums lie where h lay
    const int parked = in_registers ? kThreads * (tiles + 1) * 4 : 0;
    const int h = pairs * tiles * 32 * kVector, instead = projected ? published + sums + parked : 0;
    at.h = place(h > instead ? h : instead);
    at.partial = place(groups > 1 ? 16 * tiles * 32 * kVector : 0);
    at.published = projected ? at.h : place(published);
    at.sums = at.h + published, at.parked = at.sums + sums;
  }
  at.near = place(in_pairs ? kNearSlots * tiles * 32 * 8 : 0);
  at.lengths = place(tiles * 8 * 4);
  at.end = end;
  return at;
}

// Sizes of any layer.
struct AnySizes {
  int hidden, size;  // size: P, or H without projection
  int row_tiles;     // of a block: C / 4, a power of 2
  int row_shift;     // its logarithm: a division takes 100 cycles of a step, a shift one
  int pairs;         // 32s of K = P
  int cell_pairs;    // 32s of H with a projection, else 0
  SharedPlaces at;
};

// Those of ELMo's layer, as constants: no branch of a step depends on them, and addresses are stepped.
template <int kTiles, bool kInPairs>
struct ElmoSizes {
  static constexpr int hidden = 4096, size = 512, row_tiles = 16, row_shift = 4, pairs = 16, cell_pairs = 128;
  static constexpr bool in_registers = kTiles > 1;
  static constexpr SharedPlaces at = places_of(hidden, size, true, 64, kTiles, in_registers, kInPairs);
};

struct Tensors {
  int batch, steps, directions;
  const void* weight_hh[2];  // (4H, P)
  int64_t hh_stride[2];      // of a row; in elements
  const void* weight_proj[2];
  int64_t proj_stride[2];
  const void* gates[2];          // (B, T, 4H)
  uint32_t gates_strides[2][2];  // of B and T, in pairs of elements: 32 bits make an address one multiplication
  const int64_t* lengths;        // or null
  const void* h_0;               // or null
  const float* c_0;              // or null
  float cell_clip, proj_clip;    // infinity: off
  void* output;
  uint32_t output_strides[2];  // of B and T, in 8s of elements
  void* h_n;
  float* c_n;
  float* cells;    // or null
  uint4* h_slots;  // [directions][kSlots][pairs][kTiles][32]
  uint4* m_slots;  // [directions][kSlots][cell_pairs][kTiles][32]
};

template <typename Sizes>
struct KernelParams : Tensors, Sizes {};
template <typename Params>
constexpr bool is_constant = !std::is_base_of_v<AnySizes, Params>;

// The thread's index, but for the compiler a new number each time: what follows from it is computed anew where it is
// needed (a few instructions), not kept in registers over all steps.
CTXFAST_DEVICE int thread_anew() {
  int thread = thread_index();
  asm volatile("" : "+r"(thread));
  return thread;
}

CTXFAST_DEVICE uint32_t filled(uint32_t word) { return word == kEmpty ? 0x7FFF7FFFu : word; }
CTXFAST_DEVICE uint4 filled(uint4 v) { return make_uint4(filled(v.x), filled(v.y), filled(v.z), filled(v.w)); }
// The largest word of some vectors: kEmpty, the largest of all, if any word is. Two comparisons in an instruction.
template <int N>
CTXFAST_DEVICE uint32_t largest(const uint4* v) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) most = max3(max3(v[i].x, v[i].y, v[i].z), v[i].w, most);
  return most;
}

// Asks for the first `count` of N vectors, address(i), one right after the other: one after another's answer they cost
// 1.7 us a step at B = 32 (H100). kSure: so many there always are.
template <int kSure, int N, typename Address>
CTXFAST_DEVICE void ask(uint4 (&v)[N], int count, Address address) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < kSure) {
      v[i] = load_relaxed(address(i));
    } else {
      v[i] = make_uint4(0, 0, 0, 0);
      if (i < count) v[i] = load_relaxed(address(i));
    }
  }
}

// Waits until all that was asked for is there; what was not is asked for again.
template <bool kSpeaks, int N, typename Address>
CTXFAST_DEVICE void wait_for(uint4 (&v)[N], Address address) {
  for (const uint32_t began = spin_begins(); largest<N>(v) == kEmpty;) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (largest<1>(&v[i]) == kEmpty) v[i] = load_relaxed(address(i));
    }
    if (spun_out(began)) {
      if constexpr (kSpeaks) {
        trap_with(1, N);
      } else {
        trap_silently(1, N);
      }
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

// Where the walk stands. `round` counts on over the tiles of the batch.
struct Walk {
  int direction, block, base, step, round;  // base: first row of the tile
  // Neighbours in the grid are the same block of each direction; in pairs, two blocks of a direction.
  template <bool kInPairs, typename Params>
  CTXFAST_DEVICE void take_place(const Params& p) {
    const int rank = kInPairs ? block_index() & 1 : 0, rest = kInPairs ? block_index() >> 1 : block_index();
    direction = rest & (p.directions - 1);
    block = (rest >> (p.directions - 1)) * (kInPairs ? 2 : 1) + rank;
  }
  CTXFAST_DEVICE bool last(const Tensors& p) const { return step + 1 == p.steps; }  // of the tile
  CTXFAST_DEVICE bool very_last(const Tensors& p, int rows) const { return last(p) && base + rows >= p.batch; }
  CTXFAST_DEVICE int64_t state(const Tensors& p, int row) const {
    return static_cast<int64_t>(direction) * p.batch + base + row;
  }
  // Where a row of this length stands in time; past its end every later place once.
  CTXFAST_DEVICE int time_of(int length) const { return direction == 1 && step < length ? length - 1 - step : step; }
};

template <int kTiles, typename Params>
CTXFAST_DEVICE uint4* h_slot(const Params& p, const Walk& at, int round) {
  return p.h_slots + (at.direction * kSlots + (round & (kSlots - 1))) * p.pairs * kTiles * 32;
}
template <int kTiles, typename Params>
CTXFAST_DEVICE uint4* m_slot(const Params& p, const Walk& at, int round) {
  return p.m_slots + (at.direction * kSlots + (round & (kSlots - 1))) * p.cell_pairs * kTiles * 32;
}
template <typename Params>
CTXFAST_DEVICE int* lengths_of(const Params& p) {
  return reinterpret_cast<int*>(shared_memory() + p.at.lengths);
}

// V: the thread's uint4 or uint32_t of h_0, 8 or 2 values of a row from k on; zeros where there is none.
template <typename T, typename V, typename Params>
CTXFAST_DEVICE V initial_h(const Params& p, const Walk& at, int row, int k) {
  if (p.h_0 == nullptr || at.base + row >= p.batch) return V{};
  return *reinterpret_cast<const V*>(static_cast<const T*>(p.h_0) + at.state(p, row) * p.size + k);
}

template <typename T, typename Params>
CTXFAST_DEVICE T* output_at(const Params& p, const Walk& at, int row, int length) {
  uint4* const step = static_cast<uint4*>(p.output) + static_cast<uint64_t>(at.base + row) * p.output_strides[0] +
                      static_cast<uint64_t>(at.time_of(length)) * p.output_strides[1];
  return reinterpret_cast<T*>(step) + at.direction * p.size;
}

// Where a warp, or a warpgroup, stands in the product: `row` of the rows' groups, K group `k` of `k_groups`.
struct Part {
  int row, k, k_groups, k_shift;  // 2^k_shift = k_groups
};

template <int kTiles>
CTXFAST_DEVICE Part part_of(int row_shift, int warp) {
  // The shuffle tells the compiler that a warp's lanes agree: wgmma runs on only where it is sure of that.
  const int shift = row_shift - 2, unit = shuffle(kTiles == 1 ? warp : warp >> 2, 0);
  const int k_shift = (kTiles == 1 ? 4 : 2) - shift;
  return {unit & ((1 << shift) - 1), unit >> shift, 1 << k_shift, k_shift};
}

// The weights that stay: registers `w`, and what is left in shared memory. Read where they lie, 16 bytes at a time.
template <typename T, int kTiles, bool kInRegisters, bool kInPairs, typename Params>
CTXFAST_DEVICE void load_weights(const Params& p, uint4 (&w)[kRegisterFragments], int direction, int block) {
  const int warp = warp_index(), lane = lane_index(), q = lane >> 2, s = lane & 3;
  uint4* shared = reinterpret_cast<uint4*>(shared_memory());
  const Part part = part_of<kTiles>(p.row_shift, warp);
  // Row of a tile of 16: 4 gate + cell.
  const auto at = [&](int tile, int row, int k) {
    const int64_t of_all = static_cast<int64_t>(row >> 2) * p.hidden + (block * p.row_tiles + tile) * 4 + (row & 3);
    return static_cast<const T*>(p.weight_hh[direction]) + of_all * p.hh_stride[direction] + k;
  };
  const auto vector = [&](int tile, int row, int k) { return *reinterpret_cast<const uint4*>(at(tile, row, k)); };
  if constexpr (kTiles == 1) {
    const int left = (p.pairs + part.k_groups - 1) / part.k_groups - 2;  // of the warp with most, in shared memory
    for (int i = 2; part.k + i * part.k_groups < p.pairs; ++i) {
      for (int t = 0; t < kMmaTiles; ++t) {
        const int tile = part.row * kMmaTiles + t, k = 32 * (part.k + i * part.k_groups) + 8 * s;
        const uint4 low = vector(tile, q, k), high = vector(tile, q + 8, k);
        uint4* to = shared + ((warp * left + i - 2) * 8 + 2 * t) * 32 + lane;
        to[0] = make_uint4(low.x, high.x, low.y, high.y);
        to[32] = make_uint4(low.z, high.z, low.w, high.w);
      }
    }
#pragma unroll
    for (int f = 0; f < kRegisterFragments; f += 2) {
      const int pair = part.k + (f >> 3) * part.k_groups, tile = part.row * kMmaTiles + ((f >> 1) & 3);
      w[f] = w[f + 1] = make_uint4(0, 0, 0, 0);
      if (pair >= p.pairs) continue;
      const uint4 low = vector(tile, q, 32 * pair + 8 * s), high = vector(tile, q + 8, 32 * pair + 8 * s);
      w[f] = make_uint4(low.x, high.x, low.y, high.y);
      w[f + 1] = make_uint4(low.z, high.z, low.w, high.w);
    }
  } else {
    // Core matrices [64 rows][k-step][half of it][row][8], those of the first steps left out if they are in registers.
    // A warp copies 8 rows times 32 of K at once: whole sectors in, no bank conflicts out.
    constexpr int in_registers = kInRegisters ? kRegisterFragments : 0;
    const int steps = 2 * p.pairs - in_registers, pairs = p.pairs - in_registers / 2;
    for (int unit = warp; unit < p.row_tiles * 2 * pairs; unit += kWarps) {
      const int row = unit / pairs * 8 + (lane & 7), k8 = unit % pairs * 4 + (lane >> 3);
      shared[((row >> 6) * steps + (k8 >> 1)) * 128 + (k8 & 1) * 64 + (row & 63)] =
          vector(row >> 4, row & 15, 16 * in_registers + 8 * k8);
    }
    if constexpr (kInRegisters) {
      const auto pair_of = [&](int row, int k) { return *reinterpret_cast<const uint32_t*>(at(warp, row, k)); };
#pragma unroll
      for (int f = 0; f < in_registers; ++f) {
        const int k = 16 * f + 2 * s;
        w[f] = make_uint4(pair_of(q, k), pair_of(q + 8, k), pair_of(q, k + 8), pair_of(q + 8, k + 8));
      }
    }
  }
  if (p.cell_pairs > 0 && 8 * block < p.size) {
    // In pairs: half of K, the block's own 8 rows and the other block's.
    constexpr int shift = kInPairs ? 1 : 0;
    uint4* to = reinterpret_cast<uint4*>(shared_memory() + p.at.projection);
    const int first = kInPairs ? (block & 1) * (p.cell_pairs >> 1) : 0;
    for (int unit = warp; unit < p.cell_pairs; unit += kWarps) {
      const int row = 8 * (block ^ (unit & shift)) + q, k = 32 * (first + (unit >> shift)) + 8 * s;
      const T* from = static_cast<const T*>(p.weight_proj[direction]) + row * p.proj_stride[direction] + k;
      to[unit * 32 + lane] = *reinterpret_cast<const uint4*>(from);
    }
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
template <typename T, typename Params, typename Meanwhile>
CTXFAST_DEVICE void product_mma(const Params& p, const uint4 (&w)[kRegisterFragments], const uint4* h,
                                Meanwhile meanwhile) {
  const int thread = thread_anew(), warp = thread >> 5, lane = thread & 31;
  const Part part = part_of<1>(p.row_shift, warp);
  const int count = part.k < p.pairs ? (p.pairs - part.k + part.k_groups - 1) >> part.k_shift : 0;
  const int left = ((p.pairs + part.k_groups - 1) >> part.k_shift) - 2;
  const uint4* shared = reinterpret_cast<const uint4*>(shared_memory()) + warp * left * 256 + lane;
  float sums[kMmaTiles][4] = {};
  const uint4* from = h + part.k * 32 + lane;
  const auto address = [&](int i) { return from + (i << part.k_shift) * 32; };
  constexpr bool is_elmo = is_constant<Params>;
  constexpr int pairs = is_elmo ? 4 : kMmaPairs;
  uint4 v[pairs];
  ask<is_elmo ? pairs : 0>(v, count, address);
  meanwhile();
  wait_for<true>(v, address);
  warp_sync();
  // Pairs with weights in registers and in shared memory in turn: the latter come while the former are multiplied.
#pragma unroll
  for (int turn = 0; turn < pairs; ++turn) {
    const int i = is_elmo ? (turn & 1) * 2 + (turn >> 1) : turn;
    if (!is_elmo && i >= count) continue;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint4 a[kMmaTiles];
#pragma unroll
      for (int t = 0; t < kMmaTiles; ++t) {
        a[t] = i < 2 ? w[(i & 1) * 8 + 2 * t + step] : shared[((i - 2) * 8 + 2 * t + step) * 32];
      }
      multiply_step<T>(sums, a, word(v[i], 2 * step), word(v[i], 2 * step + 1));
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
template <typename T, int kTiles, bool kInRegisters, typename Params, typename Meanwhile>
CTXFAST_DEVICE void product_wgmma(const Params& p, const uint4 (&w)[kRegisterFragments], const uint4* h,
                                  float (&sums)[kTiles][4], Meanwhile meanwhile) {
  constexpr int in_registers = kInRegisters ? kRegisterFragments : 0;
  constexpr int kAtOnce = kInRegisters ? kTiles : 8;
  const int thread = thread_anew(), warp = thread >> 5, lane = thread & 31;
  const Part part = part_of<kTiles>(p.row_shift, warp);
  const int members = kThreads >> part.k_shift, member = part.row * 128 + (thread & 127);
  const int share = p.pairs >> part.k_shift, begin = share * part.k;
  unsigned char* at_h = shared_memory() + p.at.h;
  uint4* shared_h = reinterpret_cast<uint4*>(at_h);
  if constexpr (is_constant<Params>) {  // one K group, kTiles vectors a thread
    uint4 v[kTiles];
    const uint4* from = h + thread;
    const auto address = [&](int i) { return from + i * kThreads; };
    ask<kTiles>(v, kTiles, address);
    wait_for<false>(v, address);
    block_sync();  // the sums of the step before have been read
#pragma unroll
    for (int i = 0; i < kTiles; ++i) shared_h[thread + i * kThreads] = v[i];
  } else {
    const int vectors = share * kTiles * 32;
    for (int first = member, pass = 0; pass == 0 || first < vectors; first += kAtOnce * members, ++pass) {
      uint4 v[kAtOnce];
      const int count = first < vectors ? (vectors - first + members - 1) >> (9 - part.k_shift) : 0;
      const uint4* from = h + begin * kTiles * 32 + first;
      const auto address = [&](int i) { return from + i * members; };
      ask<0>(v, count, address);
      wait_for<false>(v, address);
      if (p.cell_pairs > 0 && pass == 0) block_sync();  // the sums of the step before have been read
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < count) shared_h[begin * kTiles * 32 + first + i * members] = v[i];
      }
    }
  }
  shared_written();
  barrier_sync(1 + part.k, members);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0;
  const uint64_t b = wgmma_descriptor(at_h, kTiles * 128, 128);
  const uint64_t a = wgmma_descriptor(shared_memory() + part.row * (2 * p.pairs - in_registers) * 2048, 1024, 128);
  wgmma_fence();
  if constexpr (kInRegisters) {
#pragma unroll
    for (int k = 0; k < in_registers; ++k) wgmma_rs<T, 8 * kTiles>(sums, w[k], b + k * (kTiles * 256 >> 4));
  }
  const auto pair = [&](int k) {
#pragma unroll
    for (int i = k; i < k + 2; ++i) {
      wgmma_ss<T, 8 * kTiles>(sums, a + (i - in_registers) * (2048 >> 4), b + i * (kTiles * 256 >> 4));
    }
  };
  // The sums must come from products when the loop begins, else the compiler waits for every product.
  int k = 2 * begin + in_registers;
  if constexpr (!kInRegisters) {
    pair(k);
    k += 2;
  }
  for (const int end = 2 * (begin + share); k < end; k += 2) {
    wgmma_fence();  // else the compiler adds one before every product
    pair(k);
  }
  wgmma_commit();
  meanwhile();
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

}  // namespace ctxfast::lstm_forward
