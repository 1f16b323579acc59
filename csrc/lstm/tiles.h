// SPDX-License-Identifier: Apache-2.0
// Products on AMX, where a source is compiled for it: a tile holds 16 rows of 16 words. One instruction multiplies 16
// rows of h by 16 words of 16 columns.
#pragma once

#if defined(__AMX_TILE__)
#include "base/amx.h"
#include "lstm/product.h"

namespace ctxfast {
namespace {

constexpr int64_t kPanelBytes = 4 * kPanel;
constexpr int64_t kFewRows = 4;

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Sums of 16 rows and 64 columns.
template <bool kInt8>
inline void one_by_four(const uint32_t* x, int64_t ld, const uint32_t* w, int64_t words, float* z) {
  zero_sums();
  for (int64_t k = 0; k < words; k += kLstmTileWords, w += kLstmTileWords * kPanel) {
    _tile_loadd(4, x + k, 4 * ld);
    _tile_loadd(5, w, kPanelBytes);
    CTXFAST_TILE_DOT(0, 4, 5);
    _tile_loadd(6, w + 16, kPanelBytes);
    CTXFAST_TILE_DOT(1, 4, 6);
    _tile_loadd(7, w + 32, kPanelBytes);
    CTXFAST_TILE_DOT(2, 4, 7);
    _tile_loadd(5, w + 48, kPanelBytes);
    CTXFAST_TILE_DOT(3, 4, 5);
  }
  _tile_stored(0, z, kPanelBytes);
  _tile_stored(1, z + 16, kPanelBytes);
  _tile_stored(2, z + 32, kPanelBytes);
  _tile_stored(3, z + 48, kPanelBytes);
}

// Sums of 32 rows and 32 columns.
template <bool kInt8>
inline void two_by_two(const uint32_t* x, int64_t ld, const uint32_t* w, int64_t words, float* z) {
  zero_sums();
  for (int64_t k = 0; k < words; k += kLstmTileWords, w += kLstmTileWords * kPanel) {
    _tile_loadd(4, x + k, 4 * ld);
    _tile_loadd(6, w, kPanelBytes);
    CTXFAST_TILE_DOT(0, 4, 6);
    _tile_loadd(5, x + 16 * ld + k, 4 * ld);
    CTXFAST_TILE_DOT(2, 5, 6);
    _tile_loadd(7, w + 16, kPanelBytes);
    CTXFAST_TILE_DOT(1, 4, 7);
    CTXFAST_TILE_DOT(3, 5, 7);
  }
  _tile_stored(0, z, kPanelBytes);
  _tile_stored(1, z + 16, kPanelBytes);
  _tile_stored(2, z + 16 * kPanel, kPanelBytes);
  _tile_stored(3, z + 16 * kPanel + 16, kPanelBytes);
}

template <class Base, bool kInt8>
struct Tiles : Base {
  static constexpr bool kTiles = true;
  static constexpr int64_t kInputRows = 2 * kLstmTileRows;

  static void enter() { enter_tiles(); }
  static void leave() { leave_tiles(); }

  // Memory of x and z reaches to a multiple of 16 rows.
  static void panel_product(int64_t rows, const uint32_t* x, int64_t ld, const uint32_t* panel, int64_t size,
                            int64_t first, int64_t last, const uint32_t* after, float* z) {
    if constexpr (kInt8) {
      // The same bits, and a few rows leave the tiles idle.
      if (rows <= kFewRows) return vector_product<Base>(rows, x, ld, panel, size, first, last, after, z);
    }
    const int64_t end = Base::words(size);
    // int8 sums are exact, so one pass; bfloat16 block sums are added up as everywhere.
    const int64_t step = kInt8 ? (last - first) * Base::kBlock : Base::kBlock;
    if (first >= last) fill_zero(z, rows * kPanel);
    for (int64_t from = first * Base::kBlock; from < min(last * Base::kBlock, end); from += step) {
      const int64_t words = min(step, end - from);
      const uint32_t* w = panel + Base::kHeader + from * kPanel;
      alignas(64) float block[2 * kLstmTileRows * kPanel];
      const bool begin = from == first * Base::kBlock;
      for (int64_t i = 0; i < rows; i += 2 * kLstmTileRows) {
        float* to = begin ? z + i * kPanel : block;
        if (rows - i > kLstmTileRows) {
          two_by_two<kInt8>(x + i * ld + from, ld, w, words, to);
          two_by_two<kInt8>(x + i * ld + from, ld, w + 32, words, to + 32);
        } else {
          one_by_four<kInt8>(x + i * ld + from, ld, w, words, to);
        }
        if (begin) continue;
        const int64_t count = min(rows - i, 2 * kLstmTileRows) * kPanel;
        for (int64_t j = 0; j < count; j += kLanes) Base::add(z + i * kPanel + j, block + j);
      }
    }
  }
};

}  // namespace
}  // namespace ctxfast
#endif
