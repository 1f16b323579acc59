// SPDX-License-Identifier: Apache-2.0
// The bfloat16 product: every operation is rounded on its own and sums have a fixed order (odd products, then even
// ones, as vdpbf16ps adds them), so that all instruction sets give the same bits.
//
// sets: generic avx2 avx512 avx512bf16 amx
// flags: -ffp-contract=off
#include "lstm/recurrence.h"
#include "lstm/recurrence_backward.h"
#include "lstm/tiles.h"

namespace ctxfast {
namespace {

struct Bfloat16 {
  static constexpr bool kDirect = false, kScaled = false, kTiles = false;
  static constexpr int64_t kBlock = kLstmNarrowBlock, kHeader = 0, kInputRows = kLstmInputRows;
  static int64_t words(int64_t size) { return padded_words((size + 1) / 2); }
  typedef Vec Sum;
#if defined(CTXFAST_DOT_BF16)
  static constexpr int kRows = 6, kVectors = 4, kVectors1 = 4;
  typedef WordVec Spread;
  static Spread spread(uint32_t word) { return all_words(word); }
  static Sum dot(Sum sum, Spread x, WordVec w) { return CTXFAST_DOT_BF16(sum, x, w); }
#else
  static constexpr int kRows = kLanes == 16 ? 4 : 2, kVectors = 4, kVectors1 = 4;
  struct Spread {
    Vec even, odd;
  };
  static Spread spread(uint32_t word) { return {(Vec)all_words(word << 16), (Vec)all_words(word & 0xffff0000u)}; }
  static Sum dot(Sum sum, const Spread& x, WordVec w) {
    sum = sum + x.odd * (Vec)(w & 0xffff0000u);
    return sum + x.even * (Vec)(w << 16);
  }
#endif
  static Vec value(const float* z, const uint32_t*, float) { return load(z); }
  static void add(float* z, const float* more) { store(z, load(z) + load(more)); }
  static void enter() {}
  static void leave() {}

  // Nearest, ties to even; NaN stays NaN.
  static void prepare(const float* x, int64_t size, uint32_t* words, float*) {
    char* to = reinterpret_cast<char*>(words);
    for (int64_t k = 0; k < size; k += kLanes) {
      const WordVec bits = (WordVec)load_some(x + k, size - k);
      const WordVec nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
      const WordVec rounded = (IntVec)(bits & 0x7fffffffu) > 0x7f800000 ? bits | 0x400000u : nearest;
      const ShortVec shorts = __builtin_convertvector(rounded >> 16, ShortVec);
      __builtin_memcpy(to + 2 * k, &shorts, sizeof shorts);
    }
  }
};

}  // namespace

#if defined(__AMX_TILE__)
CTXFAST_KERNELS(LstmKernels, lstm_bfloat16) = {&forward<Tiles<Bfloat16, false>>, &backward<Bfloat16>};
#else
CTXFAST_KERNELS(LstmKernels, lstm_bfloat16) = {&forward<Bfloat16>, &backward<Bfloat16>};
#endif
}  // namespace ctxfast
