// SPDX-License-Identifier: Apache-2.0
// AMX: eight tiles of 16 rows of 16 words, and the product of two.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ctxfast {
namespace {

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile numbers are part of the instruction; some compilers' intrinsics accept only literals.
#define CTXFAST_TILE_DOT(sum, x, w) \
  do {                              \
    if constexpr (kInt8) {          \
      _tile_dpbusd(sum, x, w);      \
    } else {                        \
      _tile_dpbf16ps(sum, x, w);    \
    }                               \
  } while (0)

// Each thread that multiplies calls these around its use of tiles.
inline void enter_tiles() {
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
}
inline void leave_tiles() { _tile_release(); }

}  // namespace
}  // namespace ctxfast
