// SPDX-License-Identifier: Apache-2.0
// Whether sampled elements of a matrix are unchanged: how packed weights notice that their source has changed.
//
// `width` adjacent elements of each row are sampled, the next ones in the next row: ceil(columns / width) consecutive
// rows cover every column. With width >= ceil(columns / rows) no row and no column is left out.
#pragma once

#include <cstdint>

namespace ctxfast {

// A matrix at `memory`, strides in bytes; elements of `size` bytes (1, 2, 4 or 8); 1 <= width <= columns. At `saved`,
// (rows, width), contiguous: its samples. Eight 64-bit words: callers may store it as a row of integers.
struct Samples {
  const void* memory;
  int64_t rows, row_stride, columns, column_stride, size, width;
  const void* saved;
};
static_assert(sizeof(Samples) == 8 * 8, "no padding");

// Whether all `count` matrices still hold the bits of their samples; on at most `threads` threads. Allocates nothing.
bool same_samples(const Samples* samples, int64_t count, int64_t threads);

}  // namespace ctxfast
