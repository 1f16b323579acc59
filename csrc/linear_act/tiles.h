// SPDX-License-Identifier: Apache-2.0
// Products on AMX, where a source is compiled for it: a tile holds 16 rows of 16 words. One instruction multiplies 16
// rows of x by 16 words of 16 columns.
#pragma once

#if defined(__AMX_TILE__)
#include "base/amx.h"
#include "linear_act/product.h"

namespace ctxfast {
namespace {

constexpr int kLine = 64, kRowBytes = 4 * kWidth;
// z (32, 32) (+)= sums of 32 rows (x and `below`, 16 each) and a panel over some tiles.
template <bool kInt8>
inline void two_by_two(const uint32_t* x, const uint32_t* below, const uint32_t* w, int64_t tiles, bool is_first,
                       bool is_new, float* z) {
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, z, kRowBytes);
    _tile_loadd(1, z + 16, kRowBytes);
    _tile_loadd(2, z + 16 * kWidth, kRowBytes);
    _tile_loadd(3, z + 16 * kWidth + 16, kRowBytes);
  }
  for (int64_t t = 0; t < tiles; ++t, x += kTile, below += kTile, w += kPanelTile) {
    if (is_new) fetch_tile(w);
    _tile_loadd(4, x, kLine);
    _tile_loadd(6, w, kLine);
    CTXFAST_TILE_DOT(0, 4, 6);
    _tile_loadd(7, w + kPanelTile / 2, kLine);
    CTXFAST_TILE_DOT(1, 4, 7);
    _tile_loadd(5, below, kLine);
    CTXFAST_TILE_DOT(2, 5, 6);
    CTXFAST_TILE_DOT(3, 5, 7);
  }
  _tile_stored(0, z, kRowBytes);
  _tile_stored(1, z + 16, kRowBytes);
  _tile_stored(2, z + 16 * kWidth, kRowBytes);
  _tile_stored(3, z + 16 * kWidth + 16, kRowBytes);
}

// The same for 16 rows.
template <bool kInt8>
inline void one_by_two(const uint32_t* x, const uint32_t* w, int64_t tiles, bool is_first, bool is_new, float* z) {
  if (is_first) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_loadd(0, z, kRowBytes);
    _tile_loadd(1, z + 16, kRowBytes);
  }
  for (int64_t t = 0; t < tiles; ++t, x += kTile, w += kPanelTile) {
    if (is_new) fetch_tile(w);
    _tile_loadd(4, x, kLine);
    _tile_loadd(6, w, kLine);
    CTXFAST_TILE_DOT(0, 4, 6);
    _tile_loadd(7, w + kPanelTile / 2, kLine);
    CTXFAST_TILE_DOT(1, 4, 7);
  }
  _tile_stored(0, z, kRowBytes);
  _tile_stored(1, z + 16, kRowBytes);
}

template <class Base, bool kInt8>
struct Tiles : Base {
  static void enter() { enter_tiles(); }
  static void leave() { leave_tiles(); }

  // x's tiles reach to a multiple of 16 rows.
  static void block(const LinearActJob& job, int64_t first, int64_t row, int64_t rows, int64_t panel) {
    alignas(64) float z[kLinearActMostRows * kWidth];
    const uint32_t* const panel_words = job.packed + panel * job.tiles * kPanelTile;
    for (int64_t from = 0; from < job.tiles; from += kBlock) {
      const int64_t tiles = min(kBlock, job.tiles - from);
      const uint32_t* const w = panel_words + from * kPanelTile;
      for (int64_t i = 0; i < rows; i += 2 * kTileRows) {
        const uint32_t* const x = tile_row<kTileRows>(job, row + i) + from * kTile;
        if (rows - i > kTileRows) {
          two_by_two<kInt8>(x, x + job.tiles * kTile, w, tiles, from == 0, i == 0, z + i * kWidth);
        } else {
          one_by_two<kInt8>(x, w, tiles, from == 0, i == 0, z + i * kWidth);
        }
      }
    }
    finish<Tiles>(job, first + row, rows, panel, z, kInt8 ? job.x_scales + row : nullptr);
  }
};

}  // namespace
}  // namespace ctxfast
#endif
