// SPDX-License-Identifier: Apache-2.0
// Rows of queries, keys, values and gradients in the layouts that products of attention read.
#pragma once

#include "attention/product.h"

namespace ctxfast {
namespace {

// Rows of one part of a job, plus a bias; kHalf: both in bfloat16. Kept apart from the job, which stores might reach.
template <bool kHalf>
struct Part {
  const void* rows;
  const void* bias;  // may be null
  int64_t first;     // where the first row begins
  int64_t step;      // between rows
  int64_t bias_at, size;

  int64_t row(int64_t i) const { return first + i * step; }
  Part rows_from(int64_t i) const { return {rows, bias, row(i), step, bias_at, size}; }
  // The same rows from a column on.
  Part from(int64_t column) const { return {rows, bias, first + column, step, bias_at + column, size - column}; }

  Vec value(int64_t row, int64_t at) const {
    const Vec x = load_typed<kHalf>(rows, row + at, size - at);
    return bias ? x + load_typed<kHalf>(bias, bias_at + at, size - at) : x;
  }
  HalfVec half(int64_t row, int64_t at) const {
    if (bias) return narrowed_fast(value(row, at));
    return load_half_lanes(static_cast<const uint16_t*>(rows) + row + at, size - at);
  }
};

// A row as words, padded with zeros to whole vectors.
template <class Kind, bool kHalf>
void copy_row(const Part<kHalf> part, int64_t row, float sign, uint32_t* to) {
  if constexpr (Kind::kTerms == 2) {
    const HalfVec flip = halves_of(all_words(sign < 0 ? 0x8000u : 0u));
    for (int64_t at = 0; at < part.size; at += kLanes) {
      const HalfVec halves = part.half(row, at) ^ flip;
      __builtin_memcpy(reinterpret_cast<uint16_t*>(to) + at, &halves, sizeof halves);
    }
  } else {
    for (int64_t at = 0; at < part.size; at += kLanes) {
      const Vec x = part.value(row, at) * all(sign);
      __builtin_memcpy(to + at, &x, sizeof x);
    }
  }
}

// Rows become columns of panels: `to` is [panel][term][rows of the panel], `size_words` terms to a row. Rows past the
// end are the last one again. Terms past the end, to the next multiple of four, are written where the next panel will
// be, or into what `to` is padded by. `rows`: kLanes rows of `ld` words, for work.
template <class Kind, bool kHalf>
void turn_rows(const Part<kHalf> part, int64_t length, const Panels& panels, int64_t size_words, int64_t ld,
               uint32_t* rows, uint32_t* to) {
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = panels.first(panel), width = panels.width(panel) * kLanes;
    for (int64_t vector = first; vector < panels.first(panel + 1); ++vector) {
      for (int64_t i = 0; i < kLanes; ++i) {
        copy_row<Kind>(part, part.row(less(vector * kLanes + i, length - 1)), 1.0f, rows + i * ld);
      }
      uint32_t* const at = to + first * kLanes * size_words + (vector - first) * kLanes;
      for (int64_t k = 0; k < size_words; k += 4) turn_four(rows + k, ld, at + k * width, width);
    }
  }
}

// Rows as they are, cut into panels of columns: `to` is [panel][word of rows][columns of the panel].
template <class Kind, bool kHalf>
void gather_rows(const Part<kHalf> all_columns, int64_t length, const Panels& panels, uint32_t* to) {
  const int64_t words_of_panel = panels_of(length, Kind::kTerms), whole = length / Kind::kTerms;
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = panels.first(panel) * kLanes, width = panels.width(panel) * kLanes;
    const Part<kHalf> part = all_columns.from(first);
    uint32_t* at_word = to + first * words_of_panel;
    int64_t row = part.first;
    for (int64_t word = 0; word < whole; ++word, at_word += width, row += Kind::kTerms * part.step) {
      for (int64_t at = 0; at < width; at += kLanes) {
        WordVec words;
        if constexpr (Kind::kTerms == 2) {
          words = words_of(part.half(row, at)) | words_of(part.half(row + part.step, at)) << 16;
        } else {
          words = (WordVec)part.value(row, at);
        }
        __builtin_memcpy(at_word + at, &words, sizeof words);
      }
    }
    if constexpr (Kind::kTerms == 2) {
      for (int64_t at = 0; length % 2 && at < width; at += kLanes) {
        const WordVec words = words_of(part.half(row, at));
        __builtin_memcpy(at_word + at, &words, sizeof words);
      }
    }
  }
}

}  // namespace
}  // namespace ctxfast
