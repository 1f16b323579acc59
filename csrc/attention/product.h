// SPDX-License-Identifier: Apache-2.0
// Products of attention. All are one function, of words broadcast from rows and vectors of words: a word is a float, or
// two bfloat16 terms of a sum, the first in the low half. As in base/vector.h everything is in an unnamed namespace.
#pragma once

#include "attention/vector.h"

namespace ctxfast {
namespace {

// Registers of a product: at most kVectors vectors of columns by rows_of(vectors) rows of sums.
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int rows_of(int vectors) {
  return kLanes == 16 ? vectors == 4 ? 6 : vectors == 3 ? 8 : 12 : kLanes == 8 ? vectors == 2 ? 6 : 10 : 4;
}
// Words of a sum that stay in the nearest caches while rows stream over them. Each block has a sum of its own, which
// also makes long sums more accurate.
constexpr int64_t kBlock = 128;

struct Float32 {
  static constexpr int kTerms = 1;  // of a sum in a word
  static Vec spread(uint32_t word) { return (Vec)all_words(word); }
  static Vec dot(Vec sum, Vec x, Vec w) { return x * w + sum; }
};

#if defined(CTXFAST_DOT_BF16)
struct Bfloat16 {
  static constexpr int kTerms = 2;
  static Vec spread(uint32_t word) { return (Vec)all_words(word); }
  static Vec dot(Vec sum, Vec x, Vec w) { return CTXFAST_DOT_BF16(sum, x, w); }
};
#endif

// z[row][column] = (begin: 0; else z) + sum over words of x[row][word] w[word][column]. The order of a sum is the same
// for every kRows and kColumns. kTransposed: x is [word][row], its words one float each.
template <class Kind, bool kTransposed, int kRows, int kColumns>
inline void tile(const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t words, bool begin, float* z,
                 int64_t ld_z) {
  Vec sum[kRows][kColumns] = {};
  for (int64_t k = 0; k < words; ++k, w += kColumns * kLanes) {
    Vec columns[kColumns];
#pragma GCC unroll 16
    for (int v = 0; v < kColumns; ++v) columns[v] = (Vec)load_words(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = Kind::spread(kTransposed ? x[k * ld_x + r] : x[r * ld_x + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kColumns; ++v) sum[r][v] = Kind::dot(sum[r][v], value, columns[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kColumns; ++v) {
      float* const to = z + r * ld_z + v * kLanes;
      store(to, begin ? sum[r][v] : load(to) + sum[r][v]);
    }
  }
}

template <class Kind, bool kTransposed, int kColumns, int kRows>
void tile_rows(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t words, bool begin, float* z,
               int64_t ld_z) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_rows<Kind, kTransposed, kColumns, kRows - 1>(rows, x, ld_x, w, words, begin, z, ld_z);
  }
  tile<Kind, kTransposed, kRows, kColumns>(x, ld_x, w, words, begin, z, ld_z);
}

// Rows prefetched ahead of their use, some with every tile of a product: memory latency, longer than the copy itself,
// hides behind the arithmetic.
struct Ahead {
  static constexpr int kParts = 4;
  const char* part[kParts];
  int64_t step[kParts];  // bytes between rows
  int64_t bytes, left, at_once;

  void fetch_some() {
    for (int64_t row = min(at_once, left); row > 0; --row, --left) {
      for (int i = 0; i < kParts; ++i) {
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(part[i] + at, 0, 2);
        part[i] += step[i];
      }
    }
  }
};

template <class Kind, bool kTransposed, int kColumns>
void panel_rows(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t words, bool begin, float* z,
                int64_t ld_z, Ahead* ahead) {
  constexpr int kRows = rows_of(kColumns);
  const int64_t tiles = ceil_div(rows, kRows);
  for (int64_t i = 0; i < tiles; ++i) {  // as even as can be: 8 rows are 4 + 4, not 6 + 2
    const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
    ahead->fetch_some();
    tile_rows<Kind, kTransposed, kColumns, kRows>(to - from, x + (kTransposed ? from : from * ld_x), ld_x, w, words,
                                                  begin, z + from * ld_z, ld_z);
  }
}

struct Span {
  int64_t from, to;
};

// Columns in panels of at most kVectors vectors, as even as can be; a panel is [word][its columns].
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t columns)
      : vectors(ceil_div(columns, kLanes)), count(ceil_div(ceil_div(columns, kLanes), kVectors)) {}
  int64_t first(int64_t panel) const { return vectors * panel / count; }
  int64_t width(int64_t panel) const { return first(panel + 1) - first(panel); }
  Span all() const { return {0, count}; }
  // Those that hold columns [from, to), at least one.
  Span spanning(int64_t from, int64_t to) const {
    Span found = {0, count};
    while (found.from + 1 < count && first(found.from + 1) * kLanes <= from) ++found.from;
    while (found.to - 1 > found.from && first(found.to - 1) * kLanes >= to) --found.to;
    return found;
  }
};

// What a product takes of a matrix in panels: some of them, and of each some words, from `word` on.
struct Cut {
  Span panels;
  int64_t word, words_of_panel;
};

// z (rows, columns) = (begins: 0; else z) + x (rows, words) times a cut of panels; see `tile`.
template <class Kind, bool kTransposed = false>
void product(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, const Panels& panels, const Cut& cut,
             int64_t words, float* z, int64_t ld_z, Ahead* ahead, bool begins = true) {
  for (int64_t k = 0; k < words; k += kBlock) {
    const int64_t some = min(kBlock, words - k);
    const bool begin = begins && k == 0;
    const uint32_t* const terms = x + (kTransposed ? k * ld_x : k);
    for (int64_t panel = cut.panels.from; panel < cut.panels.to; ++panel) {
      const int64_t first = panels.first(panel) * kLanes, width = panels.width(panel);
      const uint32_t* const from = w + first * cut.words_of_panel + (cut.word + k) * width * kLanes;
      float* const to = z + first;
      if (width == 1) panel_rows<Kind, kTransposed, 1>(rows, terms, ld_x, from, some, begin, to, ld_z, ahead);
      if (width == 2) panel_rows<Kind, kTransposed, 2>(rows, terms, ld_x, from, some, begin, to, ld_z, ahead);
      if constexpr (kVectors > 2) {
        if (width == 3) panel_rows<Kind, kTransposed, 3>(rows, terms, ld_x, from, some, begin, to, ld_z, ahead);
        if (width == 4) panel_rows<Kind, kTransposed, 4>(rows, terms, ld_x, from, some, begin, to, ld_z, ahead);
      }
    }
  }
}

// The same with all panels and all of their words.
template <class Kind, bool kTransposed = false>
void product(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, const Panels& panels, int64_t words,
             float* z, int64_t ld_z, Ahead* ahead, bool begins = true) {
  product<Kind, kTransposed>(rows, x, ld_x, w, panels, {panels.all(), 0, words}, words, z, ld_z, ahead, begins);
}

}  // namespace
}  // namespace ctxfast
