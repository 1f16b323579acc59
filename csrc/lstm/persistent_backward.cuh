// SPDX-License-Identifier: Apache-2.0
// The recurrence of `lstm` backwards, all steps in one cooperative launch.
//
// Who owns what. A direction has `blocks` blocks of 256 threads, one per multiprocessor, arranged as row groups x K
// groups. A block owns cells (64 with a projection, 16 without): it keeps their dc and forms their dz. Block (r, k)
// also owns the slice of Wh^T that takes the dz of K group k (an equal part of all cells) to the rows of group r of dh.
// The weights stay on chip: in shared memory, with a first part in registers where they do not fit (kRegisters).
//
// One step, last to first, of a tile of 8 kColumns rows of the batch:
//   collect   partial sums of dh from the K groups meet, in fixed order; + grad_output; the clip of h. With a
//             projection a block finishes some rows and publishes them (X); without, dh is of its own cells.
//   cells     with a projection: dm = Wp^T dh of the block's cells. Then dz and dc; publishes dz (D) and stores it.
//   rows      the block's part of dh of the step before, Wh^T dz, published as fp32 partial sums (S). With a single K
//             group nothing is partial and it stays in shared memory.
//
// kTiles tiles take turns phase by phase, so that one tile's waiting is the other's work.
//
// Exchange. Everything lies in the layout that its reader's matrix instruction wants, and is its own flag: a word reads
// kEmpty until it is written. kEmpty is a NaN that arithmetic does not make (it makes 0x7FFF, 0x7FFFFFFF) and that
// `published` maps away. Slot n % kSlots carries iteration n. The thread that wrote a word clears it, in iteration
// n + 2, after it has published its dz of that iteration; in iteration n + 3 the block announces in its `cleared` word,
// by a release, that iterations < n + 1 are cleared. Before iteration m every block acquires, from all blocks of its
// direction, that iterations <= m - kSlots are cleared. All that need not be done at once is done while words are
// under way that have been asked for: clears, the announcement, dz to memory, what the next products' epilogues read.
//
// Why that is safe:
// 1. A word is cleared only after every reader has read it. Let a block be past `collect` of iteration n + 2 in the
//    threads that clear. (a) With a projection it has seen X of n + 2 of all blocks (block_sync joins its threads):
//    each was published after its block had read S of n + 1, hence after all its own reads of iteration n. (b) With K
//    groups and no projection, it has seen S of n + 1 of all K groups of its row group: published after their blocks
//    had read D of n + 1 of their K group, together D of n + 1 of all blocks; each of those was published after its
//    block had read S of n, and S of n of every row group was published after D of n was read. (c) With one K group it
//    has read D of n + 1 of all blocks, published after they had read D of n. Every "published after it had read" is
//    program order with a dependency (the value, or the loop that could not end before), block_sync, or both.
// 2. A clear precedes the next write of its word: same thread, program order.
// 3. A reader of iteration m never sees the word of iteration m - kSlots: clear, block_sync, release by one thread;
//    acquire by a thread of the reader's block, block_sync, read: the clear happens before the read, so the read
//    returns the clear or what comes after it. Before the first kSlots iterations the launcher's clear on the stream
//    does this.
// 4. Nobody waits for ever: an announcement in iteration m waits for nothing of iteration m but what came before its
//    `rows`, those who wait for it are in iteration m + 1 or later, and what a block waits for in a phase was published
//    by phases before it, of blocks that are all resident (cooperative launch).
// Every spin ends by the clock and traps.
//
// Predicted, H100, 4096/512: 4 us a step at B <= 8 (three exchanges of 0.7 us; 256 KB of weights and sums through
// shared memory), 6 at B = 32 (5,100 cycles of shared memory, the waits of one tile behind the other's work). The
// machine code of B <= 8, walked by one warp of a scheduler with exchanges of 800 cycles: 8,580 cycles (4.3 us) before
// facts were read in the shadow of exchanges, 6,430 (3.2 us) since. Estimates all, 2026-12: it has run on no GPU.
//
// Numbers. Sums in fp32, in an order fixed by the sizes alone; no atomics. Partial sums and carried dh are fp32; dh at
// a step and dz are rounded to the weights' dtype where they enter a product, as a loop in that dtype rounds them. In
// fp16 a dz below 6e-8 is 0 and one above 65504 infinite: scaling the loss is the caller's, as with cuDNN; bf16 has
// fp32's range.
#pragma once

#include "lstm/persistent_backward_facts.cuh"
#include "lstm/persistent_backward_parts.cuh"

namespace ctxfast::lstm_backward {

// Grid: directions x blocks, all resident. kColumns: tiles of 8 batch rows side by side. kRows: tiles of 16 rows of dh
// of a block, 4 with K groups and 1 without. Shared memory: see shape_of in persistent_backward_sm90a.cu.
template <typename T, int kColumns, int kTiles, bool kProjected, int kRows, int kRegisters>
__global__ void __launch_bounds__(kThreads, 1) lstm_persistent_backward_kernel(const __grid_constant__ KernelParams p) {
  static_assert(!kProjected || kRows == 4, "a projection comes with K groups");
  constexpr bool kPartial = kRows == 4;              // dh meets from several K groups
  constexpr int kFragments = kRows * kColumns * 32;  // of a block's rows of dh
  constexpr int kHeld = kRegisters > 0 ? kRegisters * 2 * kRows : 1;
  constexpr int kVectors = kRegisters > 0 ? 4 : 8;                        // see product
  constexpr int kTileRows = 8 * kColumns;                                 // of the batch
  constexpr int kKept = kProjected ? 2 : 1, kCells = kProjected ? 4 : 1;  // values of dh and dc of a thread
  constexpr int kBlockCells = kProjected ? 64 : 16;
  constexpr int kAhead = kProjected ? 1 : 2;  // steps: what is read a step ahead is prefetched two ahead
  const int direction = block_index() % p.directions, block = block_index() / p.directions;
  const int k_shift = kProjected ? p.k_shift : kPartial ? 2 : 0;

  auto* weights = reinterpret_cast<uint4*>(shared_memory());
  uint4* cell_weights = weights + (p.row_pairs - kRegisters * kWarps) * (2 * kRows * 32);
  auto* reduce = reinterpret_cast<float4*>(cell_weights + (kProjected ? p.cell_pairs * 256 : 0));
  int* length_of = reinterpret_cast<int*>(reduce + (kPartial ? 1 : kTiles) * kWarps * kFragments);

  // Weights, turned into fragments on the way in. A warp loads the kpairs it will use itself.
  uint4 held[kHeld];
  {
    uint4* stage = reinterpret_cast<uint4*>(reduce) + warp_index() * kRows * 32;
    const int stride = p.size / 8, first_pair = (block & ((1 << k_shift) - 1)) * p.row_pairs;
    const uint4* matrix = p.weight_hh[direction] + (block >> k_shift) * 2 * kRows;
    RawPair<kRows> raw;
    uint4 fragments[2][kRows];
#pragma unroll 1
    for (int i = kRegisters * kWarps + warp_index(); i < p.row_pairs; i += kWarps) {
      raw.load(matrix, stride, [&](int half, int k) { return row_of_hh(p.hidden, first_pair + i, half, k); });
      raw.to_fragments(fragments, stage);
      uint4* to = weights + (i - kRegisters * kWarps) * 2 * kRows * 32 + lane_index();
#pragma unroll
      for (int j = 0; j < 2 * kRows; ++j) to[j * 32] = fragments[j / kRows][j % kRows];
    }
    if constexpr (kProjected) {
#pragma unroll 1
      for (int i = warp_index(); i < p.cell_pairs; i += kWarps) {
        raw.load(p.weight_proj[direction] + block * 8, p.hidden / 8,
                 [&](int half, int k) { return row_of_proj(i, half, k); });
        raw.to_fragments(fragments, stage);
        uint4* to = cell_weights + i * 256 + lane_index();
#pragma unroll
        for (int j = 0; j < 2 * kRows; ++j) to[j * 32] = fragments[j / kRows][j % kRows];
      }
    }
    if constexpr (kRegisters > 0) {
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) {
        const int pair = first_pair + i * kWarps + warp_index();
        raw.load(matrix, stride, [&](int half, int k) { return row_of_hh(p.hidden, pair, half, k); });
        raw.to_fragments(fragments, stage);
#pragma unroll
        for (int j = 0; j < 2 * kRows; ++j) held[i * 2 * kRows + j] = fragments[j / kRows][j % kRows];
      }
    }
  }

  // Exchange of this direction; a slot's tiles lie one behind the other.
  const int x_tile = p.cell_pairs * kColumns * 32, d_tile = p.hidden / 8 * kColumns * 32,
            s_tile = p.blocks * kFragments;
  // n iterations ago; `slot` is the iteration's own, of this direction and tile 0.
  int slot = direction * kSlots * kTiles;
  const auto slot_of = [&](int n, int tile) {
    constexpr int kRound = kSlots * kTiles;
    const int first = anew(direction) * kRound, at = anew(slot) - n * kTiles;
    return (at < first ? at + kRound : at) + tile;
  };
  const auto x_of = [&](int n, int tile) { return p.x + slot_of(n, tile) * x_tile; };
  const auto d_of = [&](int n, int tile) { return p.d + slot_of(n, tile) * d_tile; };
  const auto partial_of = [&](int n, int tile) { return p.s + slot_of(n, tile) * s_tile; };
  const auto finish_here = [&] {
    return finish_of<kProjected, kPartial, kColumns>(anew(thread_index()), anew(block), k_shift);
  };
  const auto form_here = [&] {
    return form_of<kProjected, kPartial, kColumns>(anew(thread_index()), anew(block), k_shift);
  };

  int iteration = 0;
  for (int b0 = 0; b0 < p.batch; b0 += kTileRows * kTiles) {
    block_sync();  // length_of is free
    if (thread_index() < kTileRows * kTiles) {
      const int b = b0 + thread_index();
      int length = 0;
      if (b < p.batch) {
        length = p.steps;
        if (p.lengths != nullptr && p.lengths[b] < p.steps) length = static_cast<int>(p.lengths[b]);
      }
      length_of[thread_index()] = length;
    }
    block_sync();
    float carried[kTiles][kKept], dc[kTiles][kCells];
    {
      const Finish finish = finish_here();
      const Form form = form_here();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int b = b0 + tile * kTileRows + finish.batch;
#pragma unroll
        for (int j = 0; j < kKept; ++j) {
          carried[tile][j] = finish.keeps && b < p.batch && p.grad_h_n != nullptr
                                 ? p.grad_h_n[(int64_t{anew(direction)} * p.batch + b) * p.size + finish.row + 8 * j]
                                 : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < kCells; ++j) {
          const int of = b0 + tile * kTileRows + form.batch + (j & 1), cell = form.cell + 8 * (j >> 1);
          dc[tile][j] = form.forms && of < p.batch && p.grad_c_n != nullptr
                            ? p.grad_c_n[(int64_t{anew(direction)} * p.batch + of) * p.hidden + cell]
                            : 0.0f;
        }
      }
    }

    // Without a projection `collect` may have nothing to wait for: what it reads is asked for a step ahead.
    [[maybe_unused]] HiddenFacts<T, kKept> hidden_ahead[kTiles] = {};
    [[maybe_unused]] CellFacts facts_ahead[kTiles][1];
    const auto look_ahead = [&](int t) {
      if constexpr (kProjected) return;
      if (t < 0 || t >= p.steps) return;
      const Finish finish = finish_here();
      if (!finish.keeps) return;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int column = tile * kTileRows + finish.batch, b = t < length_of[column] ? b0 + column : b0;
        load_hidden(p, anew(direction), b, t, finish.row, &hidden_ahead[tile]);
        load_cells<0>(p, anew(direction), b0, column, t, length_of, finish.row, facts_ahead[tile]);
      }
    };
    look_ahead(direction == 0 ? p.steps - 1 : 0);
    const auto prefetch = [&](int t) {
      const int row = kProjected ? (anew(block) >> k_shift) * 64 : anew(block) * kBlockCells;
      prefetch_facts<T, kBlockCells>(p, anew(direction), b0, kTileRows * kTiles, t, length_of,
                                     anew(block) * kBlockCells, row);
    };
    for (int i = 0; i < kAhead; ++i) prefetch(direction == 0 ? p.steps - 1 - i : i);

#pragma unroll 1
    for (int step = 0;; ++step, ++iteration) {
      const bool last = step == p.steps;
      const int t = direction == 0 ? p.steps - 1 - step : step;
      const bool collects = kColumns == 2 || warp_index() < 4;
      // The first partial sums are asked for before anything else.
      [[maybe_unused]] const auto partial_at = [&](const Finish& finish, int tile) {
        const int first = anew(block) >> k_shift << k_shift;
        return partial_of(1, tile) + (first + finish.part) * kFragments +
               (finish.tile * kColumns + finish.column) * 32 + finish.lane;
      };
      [[maybe_unused]] uint4 partial[kTiles] = {};
      if constexpr (kPartial) {
        if (collects && step > 0) {
          const Finish finish = finish_here();
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) partial[tile] = load_relaxed(partial_at(finish, tile));
        }
      }
      // With a projection: of the tile in hand. Zeros, or ptxas takes the last iteration's for alive until here.
      [[maybe_unused]] CellFacts facts[4] = {};
      [[maybe_unused]] uint2 dz[4] = {};
      [[maybe_unused]] const auto load_facts = [&](auto row, int tile) {
        const Form form = form_here();
        load_cells<row.value>(p, anew(direction), b0, tile * kTileRows + form.batch, t, length_of, form.cell, facts);
      };
      [[maybe_unused]] const auto store_dz = [&](int tile) {
        const Form form = form_here();
        if (form.forms) store_gates(p, anew(direction), b0 + tile * kTileRows + form.batch, t, form.cell, dz);
      };

      // collect
      if (collects) {
        const Finish finish = finish_here();
        HiddenFacts<T, kKept> hidden[kTiles] = {};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if constexpr (!kProjected) {
            hidden[tile] = hidden_ahead[tile];
          } else if (!last) {
            const int column = tile * kTileRows + finish.batch, b = t < length_of[column] ? b0 + column : b0;
            load_hidden(p, anew(direction), b, t, finish.row, &hidden[tile]);
          }
        }
        if constexpr (kProjected) {
          if (!last) load_facts(Row<0>(), 0);  // one row while S is under way, the other with X
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const int column = tile * kTileRows + finish.batch, b = b0 + column;
          const bool active = finish.keeps && t >= 0 && t < length_of[column];
          const bool active_before = step > 0 && (direction == 0 ? t + 1 : t - 1) < length_of[column];
          if (step > 0) {
            float4 sum;
            if constexpr (kPartial) {
              sum = floats_of(wait(partial[tile], partial_at(finish, tile)));
            } else {
              sum = reduced<kFragments, 2>(reduce + tile * kWarps * kFragments, 2 * finish.part, finish.fragment);
            }
            sum = sum_lanes(sum, kPartial ? 1 << k_shift : 4);
            const float low = finish.part & 1 ? sum.y : sum.x, high = finish.part & 1 ? sum.w : sum.z;
            if (active_before) {
              if constexpr (kProjected) {
                carried[tile][0] = low;
                carried[tile][1] = high;
              } else {
                carried[tile][0] = finish.part & 2 ? high : low;
              }
            }
          }
          if (last) continue;
          const float bound = to_float(from_float<T>(p.proj_clip));  // as a clipped h was rounded when it was stored
          float total[kKept];
#pragma unroll
          for (int j = 0; j < kKept; ++j) {
            total[j] =
                total_dh(to_float(hidden[tile].grad[j]), to_float(hidden[tile].h[j]), carried[tile][j], bound, active);
          }
          if constexpr (kProjected) {
            if (finish.keeps) {
              auto* to = reinterpret_cast<uint32_t*>(x_of(0, tile));
              store_relaxed(to + finish.x_word, published(pack2<T>(total[0], total[1])));
            }
          } else {
            const Form form = form_here();
            facts_ahead[tile][0].pack();
            const uint2 of_cell[1] = {
                cell_gradient<T>(facts_ahead[tile][0], active, total[0], p.cell_clip, &dc[tile][0])};
            const uint32_t if_8 = shuffle_xor(of_cell[0].x, 2), go_8 = shuffle_xor(of_cell[0].y, 2);
            if (form.publishes) {  // the other two gates' words: of the cell eight further
              store_relaxed(d_of(0, tile) + form.d_vector, make_uint4(of_cell[0].x, of_cell[0].y, if_8, go_8));
            }
            store_gates(p, anew(direction), b, t, form.cell, of_cell);
          }
          if (finish.keeps && b < p.batch && p.grad_hidden != nullptr) {
            T* to = static_cast<T*>(p.grad_hidden) + ((int64_t{anew(direction)} * p.batch + b) * p.steps + t) * p.size;
#pragma unroll
            for (int j = 0; j < kKept; ++j) to[finish.row + 8 * j] = from_float<T>(total[j]);
          }
        }
      }
      if (last) break;
      if constexpr (!kPartial) block_sync();  // `reduce` is free

      // cells
      if constexpr (kProjected) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          {
            float acc[4][kColumns][4];
            short_product<T>(acc, cell_weights, x_of(0, tile), p.cell_pairs, [&] {
              if (kColumns == 1 && warp_index() >= 4) return;  // it has no cells
              if (tile > 0) load_facts(Row<0>(), tile);
              load_facts(Row<1>(), tile);
#pragma unroll
              for (CellFacts& each : facts) each.pack();
            });
            store_fragments<4, kColumns>(reduce, acc);
          }
          block_sync();
          const Form form = form_here();
          if (form.forms) {
            const float4 sum = reduced<4 * kColumns * 32, kWarps>(reduce, 0, thread_index());
            const float dm[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const int column = tile * kTileRows + form.batch + (j & 1);
              dz[j] = cell_gradient<T>(facts[j], t < length_of[column], dm[j], p.cell_clip, &dc[tile][j]);
            }
            uint4* to = d_of(0, tile) + form.d_vector;
            store_relaxed(to, make_uint4(dz[0].x, dz[0].y, dz[2].x, dz[2].y));
            store_relaxed(to + 4, make_uint4(dz[1].x, dz[1].y, dz[3].x, dz[3].y));
          }
          if constexpr (kTiles > 1) store_dz(tile);
          block_sync();  // `reduce` is free
        }
      }

      // rows. What need not be done before is done while the dz of others are under way.
      const auto meanwhile = [&] {
        if constexpr (kProjected && kTiles == 1) store_dz(0);
        // This thread's words of two iterations ago: everybody has read them.
        if (iteration >= 2) {
          const uint4 empty = make_uint4(kEmpty, kEmpty, kEmpty, kEmpty);
          const Finish finish = finish_here();
          const Form form = form_here();
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            if (kProjected && finish.keeps) {
              store_relaxed(reinterpret_cast<uint32_t*>(x_of(2, tile)) + finish.x_word, kEmpty);
            }
            if (form.publishes) {
              uint4* to = d_of(2, tile) + form.d_vector;
              store_relaxed(to, empty);
              if (kProjected) store_relaxed(to + 4, empty);
            }
            if (kPartial && thread_index() < kFragments) {
              store_relaxed(partial_of(2, tile) + block * kFragments + thread_index(), empty);
            }
          }
        }
        look_ahead(direction == 0 ? t - 1 : t + 1);
        prefetch(direction == 0 ? t - kAhead : t + kAhead);
        if (iteration >= 3 && thread_index() == 32 * (kWarps - 3)) {  // of the iteration before: see block_sync since
          store_release(p.cleared + anew(direction * p.blocks + block), static_cast<uint32_t>(iteration - 2));
        }
        if (warp_index() >= kWarps - 2) {
          wait_cleared(p.cleared + direction * p.blocks, (warp_index() - (kWarps - 2)) * 32, p.blocks,
                       iteration + 2 - kSlots);
        }
      };
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        {
          float acc[kRows][kColumns][4];
          const int first_pair = (block & ((1 << k_shift) - 1)) * p.row_pairs;
          const uint4* from = d_of(0, tile) + first_pair * kColumns * 32;
          product<T, kRows, kColumns, kRegisters, kVectors>(acc, held, weights, from, p.row_pairs, [&] {
            if (tile == 0) meanwhile();
          });
          store_fragments<kRows, kColumns>(reduce + (kPartial ? 0 : tile * kWarps * kFragments), acc);
        }
        block_sync();
        if constexpr (kPartial) {
          if (thread_index() < kFragments) {
            const float4 sum = reduced<kFragments, kWarps>(reduce, 0, thread_index());
            const uint4 words = make_uint4(bits_of(sum.x), bits_of(sum.y), bits_of(sum.z), bits_of(sum.w));
            store_relaxed(partial_of(0, tile) + block * kFragments + thread_index(), published(words));
          }
          block_sync();  // `reduce` is free
        }
      }
      slot = slot_of(kSlots - 1, 0);
    }

    // What is left goes to the initial state.
    const Finish finish = finish_here();
    const Form form = form_here();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int b = b0 + tile * kTileRows + finish.batch;
      if (finish.keeps && b < p.batch) {
#pragma unroll
        for (int j = 0; j < kKept; ++j) {
          p.grad_h_0[(int64_t{anew(direction)} * p.batch + b) * p.size + finish.row + 8 * j] = carried[tile][j];
        }
      }
#pragma unroll
      for (int j = 0; j < kCells; ++j) {
        const int of = b0 + tile * kTileRows + form.batch + (j & 1), cell = form.cell + 8 * (j >> 1);
        if (form.forms && of < p.batch)
          p.grad_c_0[(int64_t{anew(direction)} * p.batch + of) * p.hidden + cell] = dc[tile][j];
      }
    }
  }
}

}  // namespace ctxfast::lstm_backward
