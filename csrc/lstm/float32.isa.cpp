// SPDX-License-Identifier: Apache-2.0
// The float32 product: a word is one float.
//
// sets: generic avx2 avx512
#include "lstm/recurrence.h"
#include "lstm/recurrence_backward.h"

namespace ctxfast {
namespace {

struct Float32 {
  static constexpr bool kDirect = true, kScaled = false, kTiles = false;
  // AVX-512's 32 registers hold 6 x 4 sums, a weight and six broadcast h; 16 registers 3 x 4 sums, a weight and three.
  static constexpr int kRows = kLanes == 16 ? 6 : 3, kVectors = 4, kVectors1 = kLanes == 16 ? 4 : 8;
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

CTXFAST_KERNELS(LstmKernels, lstm_float32) = {&forward<Float32>, &backward<Float32>};
}  // namespace ctxfast
