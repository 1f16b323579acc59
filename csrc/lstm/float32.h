// SPDX-License-Identifier: Apache-2.0
// The float32 product: a word is one float. CTXFAST_ROWS, CTXFAST_VECTORS, CTXFAST_VECTORS_1 size the register tile.
#pragma once

#include "lstm/recurrence.h"
#include "lstm/recurrence_backward.h"

namespace ctxfast {
namespace {

struct Float32 {
  static constexpr bool kDirect = true, kScaled = false, kTiles = false;
  static constexpr int kRows = CTXFAST_ROWS, kVectors = CTXFAST_VECTORS, kVectors1 = CTXFAST_VECTORS_1;
  static constexpr int64_t kBlock = kLstmBlock, kHeader = 0, kInputRows = kLstmInputRows;
  static int64_t words(int64_t size) { return size; }

  typedef Vec Sum;
  typedef Vec Spread;
  static Spread spread(uint32_t word) { return (Vec)all_words(word); }
  static Sum dot(Sum sum, Spread x, WordVec w) { return sum + x * (Vec)w; }
  static Vec value(const float* z, const uint32_t*, float) { return load(z); }
  static void add(float* z, const float* more) { store(z, load(z) + load(more)); }
  // Into rows of the workspace, whose distance suits the cache; h and m lie there already.
  static void prepare(const float* x, int64_t size, uint32_t* words, float*) {
    if (size > 0) __builtin_memcpy(words, x, sizeof(float) * size);  // x of no features may be null
  }
  static void enter() {}
  static void leave() {}
};

}  // namespace
}  // namespace ctxfast
