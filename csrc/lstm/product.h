// SPDX-License-Identifier: Apache-2.0
// The matrix products of the LSTM on vector registers. A kind of product says how factors are held:
//
//   kDirect             the vectors' float32 rows are read as they are; else prepare() makes words of them
//   kRows, kVectors     a register tile: rows times vectors of columns; its sums must fit in registers
//   kVectors1           vectors of a tile of one row
//   kBlock, kHeader     words per block of a sum; words before a panel's own
//   words(size)         words of a column with `size` terms
//   Spread, spread(w)   one word of a row, in every lane
//   Sum, dot(s, x, w)   s + the products of one word of each column
//   value(z, header, scale)  columns' finished sums as floats
#pragma once

#include "base/typed_vector.h"
#include "lstm/kernels.h"

namespace ctxfast {
namespace {

constexpr int kCells = kLstmPanelCells;
constexpr int kPanel = kLstmPanel;

// Into an array of float32 or bfloat16.
inline void store_as(void* to, bool is_bf16, int64_t at, Vec value, int64_t n) {
  return is_bf16 ? store_typed<true, true>(to, at, value, n) : store_typed<false, true>(to, at, value, n);
}
inline void zero_as(void* to, bool is_bf16, int64_t at, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store_as(to, is_bf16, at + i, Vec{}, n - i);
}

inline int64_t padded_words(int64_t words) { return (words + kLstmTileWords - 1) / kLstmTileWords * kLstmTileWords; }

template <class Kind>
int64_t panel_size(int64_t size) {
  return Kind::kHeader + Kind::words(size) * kPanel;
}
template <class Kind>
int64_t blocks_of(int64_t size) {
  return (Kind::words(size) + Kind::kBlock - 1) / Kind::kBlock;
}

// z[row][column] = (begin: 0; else z) + sum over words of x[row][word] w[word][column], for kRows rows
// and kVectors vectors of columns. The order of the sum is the same for every kRows and kVectors. Every word fetches
// two lines at `ahead`.
template <class Kind, int kRows, int kVectors>
inline void tile(const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t count, const uint32_t* ahead, bool begin,
                 float* z) {
  typename Kind::Sum sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < count; ++k, w += kPanel, ahead += kPanel) {
    fetch(ahead);
    typename Kind::Spread value[kRows];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) value[r] = Kind::spread(x[r * ld_x + k]);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const WordVec weight = load_words(w + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) sum[r][v] = Kind::dot(sum[r][v], value[r], weight);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* to = z + r * kPanel + v * kLanes;
      if (!begin) {
        typename Kind::Sum before;
        __builtin_memcpy(&before, to, sizeof before);
        sum[r][v] = before + sum[r][v];
      }
      __builtin_memcpy(to, &sum[r][v], sizeof sum[r][v]);
    }
  }
}

template <class Kind, int kRows>
void tile_rows(int rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t count, const uint32_t* ahead,
               bool begin, float* z) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_rows<Kind, kRows - 1>(rows, x, ld_x, w, count, ahead, begin, z);
  }
  constexpr int kVectors = kRows == 1 ? Kind::kVectors1 : Kind::kVectors;
  for (int column = 0; column < kPanel; column += kVectors * kLanes) {
    tile<Kind, kRows, kVectors>(x, ld_x, w + column, count, ahead, begin, z + column);
  }
}

// One block of a panel; tiles as even as can be (8 rows are 4 + 4, not 6 + 2). `next` is the block that follows in
// memory and in time: the first two tiles fetch half of it each, so that its way from memory is hidden behind the
// arithmetic of this one; a single tile streams well enough without.
template <class Kind>
void block_product(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t count,
                   const uint32_t* next, bool begin, float* z) {
  const int64_t tiles = (rows + Kind::kRows - 1) / Kind::kRows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
    const uint32_t* ahead = i < 2 ? next + i * (kPanel / 2) : w;
    tile_rows<Kind, Kind::kRows>(static_cast<int>(to - from), x + from * ld_x, ld_x, w, count, ahead, begin,
                                 z + from * kPanel);
  }
}

// z (rows, 64) = x (rows, size) times blocks `first` to `last` of a panel; `after` is read next. AMX's kinds bring
// their own.
template <class Kind>
void vector_product(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* panel, int64_t size, int64_t first,
                    int64_t last, const uint32_t* after, float* z) {
  const int64_t words = Kind::words(size);
  if (first >= last) fill_zero(z, rows * kPanel);
  for (int64_t block = first; block < last; ++block) {
    const int64_t k = block * Kind::kBlock, count = min(words - k, Kind::kBlock);
    const uint32_t* w = panel + Kind::kHeader + k * kPanel;
    const uint32_t* next = block + 1 < last ? w + count * kPanel : after;
    block_product<Kind>(rows, x + k, ld_x, w, count, next, block == first, z);
  }
}

template <class Kind>
void panel_product(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* panel, int64_t size, int64_t first,
                   int64_t last, const uint32_t* after, float* z) {
  if constexpr (Kind::kTiles) {
    Kind::panel_product(rows, x, ld_x, panel, size, first, last, after, z);
  } else {
    vector_product<Kind>(rows, x, ld_x, panel, size, first, last, after, z);
  }
}

}  // namespace
}  // namespace ctxfast
