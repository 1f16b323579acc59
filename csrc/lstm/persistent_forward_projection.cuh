// SPDX-License-Identifier: Apache-2.0
// The projection of the persistent forward recurrence: m gathered and multiplied, h finished. The whole:
// persistent_forward.cuh.
#pragma once

#include "lstm/persistent_forward_parts.cuh"

namespace ctxfast::lstm_forward {

// How the warps of a block divide the projection among them.
template <int kTiles, bool kInPairs>
struct Division {
  static_assert(!kInPairs || kTiles == 4, "pairs gain little with fewer rows");
  static constexpr int kBlocks = kInPairs ? 2 : 1;  // each with 8 rows of W_proj: all of them times that much less of m
  static constexpr int kShares = kInPairs ? 2 : 1;  // warps with the same part of K, for different rows of the batch
  static constexpr int kTilesEach = kTiles / kShares;
  static constexpr int kGroups = kWarps / kShares;  // of K
};

// Finishing projected h. A block alone: warp 2 n + e sums half e of tile n; its lanes 0-15 then hold two values of one
// row. In pairs: warp n sums tile n of the block's own 8 rows of W_proj, two values a lane, warp 4 + n that of the
// other block's, which it sends there.
template <int kTiles, bool kInPairs>
struct Finisher {
  bool works, sends;  // sends: for the other block
  int lane, warp, tile, tile_row, pair;
  template <typename Params>
  CTXFAST_DEVICE Finisher(const Params& p, int block) {
    const int thread = thread_anew();
    lane = thread & 31, warp = thread >> 5;
    works = 8 * block < p.size && warp < 2 * kTiles;
    sends = kInPairs && warp >= kTiles;
    const int role = kInPairs ? lane : (warp & 1) * 16 + (lane & 15);
    tile = kInPairs ? warp & (kTiles - 1) : warp >> 1, tile_row = role >> 2, pair = role & 3;
  }
  CTXFAST_DEVICE bool publishes() const { return kInPairs ? !sends : lane < 16; }  // if it works
  CTXFAST_DEVICE int row() const { return 8 * tile + tile_row; }
  CTXFAST_DEVICE int k(int block) const { return 8 * block + 2 * pair; }
  CTXFAST_DEVICE int word(int block) const { return 4 * slot_place<kTiles, kTiles == 1>(block, tile, tile_row) + pair; }
};

// 8 rows of W_proj times all m, or 16 times half of it, gathered from the slot; the warps' sums to shared memory. Each
// float2: row of the batch lane / 4, rows 2 (lane % 4) and the next of W_proj; [tile][half of the lanes][warp][16], or
// in pairs [own rows, other block's][tile][K group][32].
template <typename T, int kTiles, bool kInRegisters, bool kInPairs, typename Params>
CTXFAST_DEVICE void project(const Params& p, const uint4* m, int block) {
  using Of = Division<kTiles, kInPairs>;
  const int thread = thread_anew(), warp = thread >> 5, lane = thread & 31;
  constexpr int kTilesEach = Of::kTilesEach, kBlocks = Of::kBlocks, kGroups = Of::kGroups;
  constexpr int kAtOnce = (kInRegisters ? 4 : 8) / kTilesEach;  // pairs
  constexpr int kVectors = kAtOnce * kTilesEach;
  constexpr int kHalves = kTilesEach == 1 ? 1 : kTilesEach / 2;
  constexpr int kChains = kTiles == 4 || kInPairs ? 1 : 2;  // of products that wait for one another, each half
  const int group = kInPairs ? warp & (kGroups - 1) : warp, share = kInPairs ? warp / kGroups : 0;
  const int first = kInPairs ? (block & 1) * (p.cell_pairs >> 1) : 0;
  const uint4* weights =
      reinterpret_cast<const uint4*>(shared_memory() + p.at.projection) + group * kBlocks * 32 + lane;
  const uint4* from = m + ((first + group) * kTiles + share * kTilesEach) * 32 + lane;
  float sums[kBlocks][kHalves][kChains][4] = {};
  const auto place = [](int i) { return ((i / kTilesEach) * kGroups * kTiles + i % kTilesEach) * 32; };
  const auto multiply = [&](const uint4(&v)[kVectors], const uint4* of, int count) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (i >= count) continue;
#pragma unroll
      for (int r = 0; r < kBlocks; ++r) {
        const uint4 f = of[(i * kGroups * kBlocks + r) * 32];
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const uint32_t b[2] = {word(f, 2 * step), word(f, 2 * step + 1)};
#pragma unroll
          for (int half = 0; half < kHalves; ++half) {
            // Two tiles of 8 batch rows are the 16 rows of the product; one leaves half of it empty.
            const uint4& low = v[i * kTilesEach + 2 * half];
            uint32_t a[4] = {word(low, 2 * step), 0, word(low, 2 * step + 1), 0};
            if constexpr (kTiles > 1) {
              const uint4& high = v[i * kTilesEach + 2 * half + 1];
              a[1] = word(high, 2 * step);
              a[3] = word(high, 2 * step + 1);
            }
            mma_16x8x16<T>(sums[r][half][step % kChains], a, b);
          }
        }
      }
    }
  };
  const auto address = [&](int i) { return from + place(i); };
  constexpr int step = kAtOnce * kGroups * 32;
  if constexpr (is_constant<Params>) {
    constexpr int groups = Params::cell_pairs / kBlocks / kGroups / kAtOnce;
    static_assert(groups * kAtOnce * kGroups * kBlocks == Params::cell_pairs && (groups == 1 || groups % 2 == 0));
    uint4 v[kVectors];
    ask<kVectors>(v, kVectors, address);
    wait_for<kTiles == 1>(v, address);
    warp_sync();
    if constexpr (groups == 1) {
      multiply(v, weights, kAtOnce);
    } else {
      // A group is asked for before the one that came is multiplied, and not sooner: nvcc waits for all loads that are
      // under way as one, whichever it needs.
      const auto next = [&](int i) { return from + step * kTiles + place(i); };
#pragma unroll 1
      for (int group = 0; group < groups; group += 2) {
        uint4 u[kVectors];
        ask<kVectors>(u, kVectors, next);
        multiply(v, weights, kAtOnce);
        wait_for<false>(u, next);
        warp_sync();
        from += 2 * step * kTiles;
        const bool more = group + 2 < groups;
        if (more) ask<kVectors>(v, kVectors, address);
        multiply(u, weights + step * kBlocks, kAtOnce);
        weights += 2 * step * kBlocks;
        if (more) wait_for<false>(v, address);
        warp_sync();
      }
    }
  } else {
    const int pairs = p.cell_pairs / kBlocks;
    int count = group < pairs ? static_cast<int>(static_cast<unsigned>(pairs - group + kGroups - 1) / kGroups) : 0;
    for (; count > 0; count -= kAtOnce, from += step * kTiles, weights += step * kBlocks) {
      uint4 v[kVectors];
      ask<0>(v, count * kTilesEach, address);
      wait_for<kTiles == 1>(v, address);
      warp_sync();
      multiply(v, weights, count);
    }
  }
  float2* to = reinterpret_cast<float2*>(shared_memory() + p.at.sums);
#pragma unroll
  for (int r = 0; r < kBlocks; ++r) {
#pragma unroll
    for (int n = 0; n < kTilesEach; ++n) {
      const float (&of)[kChains][4] = sums[r][n >> 1];
      float2 sum = make_float2(of[0][2 * (n & 1)], of[0][2 * (n & 1) + 1]);
      if constexpr (kChains == 2) sum.x += of[1][2 * (n & 1)], sum.y += of[1][2 * (n & 1) + 1];
      if constexpr (kInPairs) {
        to[((r * kTiles + share * kTilesEach + n) * kGroups + group) * 32 + lane] = sum;
      } else {
        to[((2 * n + (lane >> 4)) * kWarps + warp) * 16 + (lane & 15)] = sum;
      }
    }
  }
}

// N sums, `stride` apart, in the order of a tree.
template <int N>
CTXFAST_DEVICE float2 summed(const float2* from, int stride) {
  float2 part[N];
#pragma unroll
  for (int i = 0; i < N; ++i) part[i] = from[i * stride];
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) part[i].x += part[i + half].x, part[i].y += part[i + half].y;
  }
  return part[0];
}

// In pairs: [tile][lane], the other block's sums.
template <int kTiles, typename Params>
CTXFAST_DEVICE uint2* near_slot(const Params& p, int round) {
  return reinterpret_cast<uint2*>(shared_memory() + p.at.near) + (round & (kNearSlots - 1)) * kTiles * 32;
}

// Before the first round: the places for the other block's sums are empty, and it knows.
template <int kTiles, typename Params>
CTXFAST_DEVICE void begin_near(const Params& p) {
  const int thread = thread_anew();
  if (thread < kNearSlots * kTiles * 32)
    store_shared_relaxed(near_slot<kTiles>(p, 0) + thread, make_uint2(kEmpty, kEmpty));
  cluster_sync();
}

// The other block's sums of this place, and the place empty again.
CTXFAST_DEVICE float2 take_near(uint2* place) {
  uint2 v = load_shared_relaxed(place);
  for (const uint32_t began = spin_begins(); v.x == kEmpty || v.y == kEmpty;) {
    v = load_shared_relaxed(place);
    if (spun_out(began)) {
      trap_silently(2, 1);
      __builtin_unreachable();
    }
  }
  store_shared_relaxed(place, make_uint2(kEmpty, kEmpty));
  float2 sums;
  memcpy(&sums, &v, sizeof(sums));
  return sums;
}

// The warps that Finisher names: h of the block's rows of the projection, to the other blocks and the output. `last_h`:
// of a row, past its end too.
template <typename T, int kTiles, bool kInPairs, typename Params>
CTXFAST_DEVICE void finish_h(const Params& p, const Walk& at, uint32_t& last_h) {
  const Finisher<kTiles, kInPairs> finisher(p, at.block);
  if (!finisher.works) return;
  const int lane = finisher.lane;
  const float2* from = reinterpret_cast<const float2*>(shared_memory() + p.at.sums);
  float2 sum;
  if constexpr (kInPairs) {
    constexpr int groups = Division<kTiles, true>::kGroups;
    sum = summed<groups>(from + finisher.warp * groups * 32 + lane, 32);
    uint2* near = near_slot<kTiles>(p, at.round) + finisher.tile * 32 + lane;
    if (finisher.sends) {
      uint2 bits;
      memcpy(&bits, &sum, sizeof(bits));
      store_remote(near, (at.block & 1) ^ 1, make_uint2(filled(bits.x), filled(bits.y)));
      return;
    }
    const float2 other = take_near(near);
    sum.x += other.x, sum.y += other.y;
  } else {
    constexpr int each = kWarps / 2;
    sum = summed<each>(from + finisher.warp * kWarps * 16 + (lane >> 4) * each * 16 + (lane & 15), 16);
    sum.x += shuffle_xor(sum.x, 16);
    sum.y += shuffle_xor(sum.y, 16);
  }
  const uint32_t h = pack2<T>(clipped(sum.x, p.proj_clip), clipped(sum.y, p.proj_clip));
  const int row = finisher.row(), length = lengths_of(p)[row], k = finisher.k(at.block);
  if (at.step < length) last_h = h;
  if (!finisher.publishes()) return;
  const int word = finisher.word(at.block);
  if (!at.very_last(p, 8 * kTiles)) {
    const uint32_t next = at.last(p) ? initial_h<T, uint32_t>(p, at, row + 8 * kTiles, k) : last_h;
    store_relaxed(reinterpret_cast<uint32_t*>(h_slot<kTiles>(p, at, at.round)) + word, filled(next));
  }
  store_relaxed(reinterpret_cast<uint32_t*>(h_slot<kTiles>(p, at, at.round - 1)) + word, kEmpty);
  if (at.base + row >= p.batch) return;
  *reinterpret_cast<uint32_t*>(output_at<T>(p, at, row, length) + k) = at.step < length ? h : 0;
  if (at.last(p)) *reinterpret_cast<uint32_t*>(static_cast<T*>(p.h_n) + at.state(p, row) * p.size + k) = last_h;
}

}  // namespace ctxfast::lstm_forward
