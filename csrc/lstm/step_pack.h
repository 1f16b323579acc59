// SPDX-License-Identifier: Apache-2.0
// Where the pieces of lstm_step's packed weights lie: what lstm_step_pack writes and the launchers of the steps read.
#pragma once

#include "lstm/step.h"

namespace ctxfast::lstm_step {

inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A packed matrix: tiles of 16 rows, K padded to pairs of products.
struct PackedSize {
  int64_t tiles = 0, k = 0;
  int64_t count() const { return tiles * 16 * k; }
};

// W_hh in tiles of 4 gates x 4 cells, or its transpose, K cell by cell.
inline PackedSize packed_hh(const LstmStepShape& s, bool backward) {
  if (backward) return {ceil_div(s.size, 16), round_up(4 * s.hidden, 32)};
  return {ceil_div(s.hidden, 4), round_up(s.size, 32)};
}
inline PackedSize packed_proj(const LstmStepShape& s, bool backward) {
  if (!s.has_proj) return {};
  if (backward) return {ceil_div(s.hidden, 16), round_up(s.size, 32)};
  return {ceil_div(s.size, 16), round_up(s.hidden, 32)};
}

// Of every row `width` neighbours are looked at, which move on from row to row through `windows` places.
struct SampleSize {
  int64_t rows = 0, columns = 0, width = 0, windows = 0;
  int64_t count() const { return rows * width; }
};
constexpr int64_t kWholeBytes = 160 << 10, kNeighbourBytes = 16;  // as ctxfast/ops/shared/weight_cache.py

inline SampleSize sample_of(int64_t rows, int64_t columns, int64_t bytes) {
  const int64_t some = ceil_div(columns, rows), neighbours = kNeighbourBytes / bytes;
  int64_t width = some > neighbours ? some : neighbours;
  if (rows * columns * bytes <= kWholeBytes || width > columns) width = columns;
  return {rows, columns, width, ceil_div(columns, width)};
}
inline SampleSize sample_hh(const LstmStepShape& s) { return sample_of(4 * s.hidden, s.size, element_bytes(s.dtype)); }
inline SampleSize sample_proj(const LstmStepShape& s) {
  return s.has_proj ? sample_of(s.size, s.hidden, element_bytes(s.dtype)) : SampleSize();
}

// In bytes from the start; the last entry is the size of all.
struct PackedPlaces {
  int64_t hh[2] = {}, proj[2] = {}, hh_sample[2] = {}, proj_sample[2] = {}, changed = 0, end = 0;
};

inline PackedPlaces packed_places(const LstmStepShape& s, bool backward) {
  PackedPlaces at;
  const auto take = [&](int64_t bytes) {
    const int64_t here = at.end;
    at.end += round_up(bytes, 256);
    return here;
  };
  const int64_t bytes = element_bytes(s.dtype);
  for (int64_t r = 0; r < s.directions; ++r) {
    at.hh[r] = take(packed_hh(s, backward).count() * bytes);
    at.proj[r] = take(packed_proj(s, backward).count() * bytes);
    at.hh_sample[r] = take(sample_hh(s).count() * bytes);
    at.proj_sample[r] = take(sample_proj(s).count() * bytes);
  }
  at.changed = take(4 * sizeof(uint32_t));
  return at;
}

}  // namespace ctxfast::lstm_step
