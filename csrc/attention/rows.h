// SPDX-License-Identifier: Apache-2.0
// Rows of queries, keys, values and gradients in the layouts that products of attention read.
#pragma once

#include "attention/attention.h"
#include "attention/product.h"

namespace ctxfast {
namespace {

// Cosines and sines of the angles of a sequence's places.
struct Angles {
  const float* table;  // (places, 2, half), null: nothing is rotated
  int64_t half;

  // Rotates the row at a place, dimension d together with d + half; back where `way` is -1.
  void turn(float* row, int64_t place, float way) const {
    const float *const cosines = table + place * 2 * half, *const sines = cosines + half;
    int64_t d = 0;
    for (; d + kLanes <= half; d += kLanes) {
      const Vec x = load(row + d), y = load(row + half + d), cosine = load(cosines + d),
                sine = load(sines + d) * all(way);
      store(row + d, x * cosine - y * sine);
      store(row + half + d, y * cosine + x * sine);
    }
    for (; d < half; ++d) {
      const float x = row[d], y = row[half + d], sine = sines[d] * way;
      row[d] = x * cosines[d] - y * sine;
      row[half + d] = y * cosines[d] + x * sine;
    }
  }
};

// Rows of one part of a job, plus a bias; kBf16: both in bfloat16. Kept apart from the job, which stores might reach.
template <bool kBf16>
struct Part {
  const void* rows;
  const void* bias;  // may be null
  int64_t first;     // where the first row begins
  int64_t step;      // between rows
  int64_t bias_at, size;
  Angles angles = {};
  int64_t place = 0;  // of the first row

  int64_t row(int64_t i) const { return first + i * step; }
  Part rows_from(int64_t i) const { return {rows, bias, row(i), step, bias_at, size, angles, place + i}; }
  // The same rows from a column on, not rotated.
  Part from(int64_t column) const { return {rows, bias, first + column, step, bias_at + column, size - column}; }

  Vec value(int64_t row, int64_t at) const {
    const Vec x = load_typed<kBf16>(rows, row + at, size - at);
    return bias ? x + load_typed<kBf16>(bias, bias_at + at, size - at) : x;
  }
  ShortVec bf16(int64_t row, int64_t at) const {
    if (bias) return to_bf16_fast(value(row, at));
    return load_shorts(static_cast<const uint16_t*>(rows) + row + at, size - at);
  }
};

// A rotated row as words.
template <class Kind, bool kBf16>
void copy_turned_row(const Part<kBf16> part, int64_t i, float sign, uint32_t* to) {
  const int64_t row = part.row(i);
  alignas(64) float wide[kAttentionMaxHeadDim];
  for (int64_t at = 0; at < part.size; at += kLanes) store(wide + at, part.value(row, at) * all(sign));
  part.angles.turn(wide, part.place + i, 1.0f);
  for (int64_t at = 0; at < part.size; at += kLanes) {
    const Vec x = load(wide + at);
    if constexpr (Kind::kTerms == 2) {
      const ShortVec shorts = to_bf16_fast(x);
      __builtin_memcpy(reinterpret_cast<uint16_t*>(to) + at, &shorts, sizeof shorts);
    } else {
      __builtin_memcpy(to + at, &x, sizeof x);
    }
  }
}

// Row i as words, padded with zeros to whole vectors.
template <class Kind, bool kBf16>
void copy_row(const Part<kBf16> part, int64_t i, float sign, uint32_t* to) {
  if (part.angles.table) return copy_turned_row<Kind>(part, i, sign, to);
  const int64_t row = part.row(i);
  if constexpr (Kind::kTerms == 2) {
    const ShortVec flip = to_shorts(all_words(sign < 0 ? 0x8000u : 0u));
    for (int64_t at = 0; at < part.size; at += kLanes) {
      const ShortVec shorts = part.bf16(row, at) ^ flip;
      __builtin_memcpy(reinterpret_cast<uint16_t*>(to) + at, &shorts, sizeof shorts);
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
template <class Kind, bool kBf16>
void transpose_rows(const Part<kBf16> part, int64_t length, const Panels& panels, int64_t size_words, int64_t ld,
                    uint32_t* rows, uint32_t* to) {
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = panels.first(panel), width = panels.width(panel) * kLanes;
    for (int64_t vector = first; vector < panels.first(panel + 1); ++vector) {
      for (int64_t i = 0; i < kLanes; ++i) {
        copy_row<Kind>(part, min(vector * kLanes + i, length - 1), 1.0f, rows + i * ld);
      }
      uint32_t* const at = to + first * kLanes * size_words + (vector - first) * kLanes;
      for (int64_t k = 0; k < size_words; k += 4) transpose4(rows + k, ld, at + k * width, width);
    }
  }
}

// Rows as they are, not rotated, cut into panels of columns: `to` is [panel][word of rows][columns of the panel].
template <class Kind, bool kBf16>
void gather_rows(const Part<kBf16> all_columns, int64_t length, const Panels& panels, uint32_t* to) {
  const int64_t words_of_panel = ceil_div(length, Kind::kTerms), full = length / Kind::kTerms;
  for (int64_t panel = 0; panel < panels.count; ++panel) {
    const int64_t first = panels.first(panel) * kLanes, width = panels.width(panel) * kLanes;
    const Part<kBf16> part = all_columns.from(first);
    uint32_t* at_word = to + first * words_of_panel;
    int64_t row = part.first;
    for (int64_t word = 0; word < full; ++word, at_word += width, row += Kind::kTerms * part.step) {
      for (int64_t at = 0; at < width; at += kLanes) {
        WordVec words;
        if constexpr (Kind::kTerms == 2) {
          words = to_words(part.bf16(row, at)) | to_words(part.bf16(row + part.step, at)) << 16;
        } else {
          words = (WordVec)part.value(row, at);
        }
        __builtin_memcpy(at_word + at, &words, sizeof words);
      }
    }
    if constexpr (Kind::kTerms == 2) {
      for (int64_t at = 0; length % 2 && at < width; at += kLanes) {
        const WordVec words = to_words(part.bf16(row, at));
        __builtin_memcpy(at_word + at, &words, sizeof words);
      }
    }
  }
}

}  // namespace
}  // namespace ctxfast
