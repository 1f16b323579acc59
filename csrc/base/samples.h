// SPDX-License-Identifier: Apache-2.0
// Whether a matrix still holds what it held at some places: how packed weights notice that their source has changed.
//
// Of each row `width` neighbours are looked at, which move on from row to row: ceil(columns / width) rows in a row look
// at every column. With width >= ceil(columns / rows) no row and no column is left out.
#pragma once

#include <cstdint>

namespace ctxfast {

// A matrix at `memory`, strides in bytes; elements of `size` bytes (1, 2, 4 or 8); 1 <= width <= columns. At `saved`,
// (rows, width), contiguous: what its samples were. Eight 64-bit words: callers may keep it as a row of integers.
struct Samples {
  const void* memory;
  int64_t rows, row_stride, columns, column_stride, size, width;
  const void* saved;
};
static_assert(sizeof(Samples) == 8 * 8, "no padding");

// Whether all `count` of them hold the bits they held, found out by at most `threads` threads. Allocates nothing.
bool same_samples(const Samples* samples, int64_t count, int64_t threads);

}  // namespace ctxfast
