// SPDX-License-Identifier: Apache-2.0
// The bfloat16 and int8 products. Compiled with -ffp-contract=off: then every instruction set rounds alike, and with
// exact sums (int8) or a fixed order of sums (bfloat16) gives the same bits.
//
// The including file sets CTXFAST_LANES and, for instructions it wants,
//   CTXFAST_DOT_BF16(sum, x, w)   Vec: sum + odd products, then + even products, as vdpbf16ps rounds
//   CTXFAST_DOT_INT8(sum, x, w)   WordVec: sum + four products of unsigned x and signed w
// Without them: plain arithmetic, and AVX2's vpmaddubsw where that is.
#pragma once

#include "base/int8.h"
#include "lstm/recurrence.h"

namespace ctxfast {
namespace {

inline int64_t padded_words(int64_t words) { return (words + kLstmTileWords - 1) / kLstmTileWords * kLstmTileWords; }

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
      const HalfVec halves = __builtin_convertvector(rounded >> 16, HalfVec);
      __builtin_memcpy(to + 2 * k, &halves, sizeof halves);
    }
  }
};

struct Int8 : Int8Dot {
  static constexpr int kRows = kIsOne ? kLanes == 16 ? 6 : 3 : 2, kVectors = kIsPlain ? 2 : 4;
  static constexpr int kVectors1 = kIsOne && kLanes != 16 ? 8 : 4;
  static constexpr bool kDirect = false, kScaled = true, kTiles = false;
  static constexpr int64_t kBlock = kLstmNarrowBlock, kHeader = kLstmInt8Header, kInputRows = kLstmInputRows;
  static int64_t words(int64_t size) { return padded_words((size + 3) / 4); }
  static Vec value(const float* z, const uint32_t* header, float scale) {
    IntVec sum = (IntVec)load(z);
    if (kBiased) sum -= (IntVec)load_words(header + kPanel);
    return __builtin_convertvector(sum, Vec) * (Vec)load_words(header) * all(scale);
  }
  static void add(float* z, const float* more) {
    const WordVec sum = (WordVec)load(z) + (WordVec)load(more);
    store(z, (Vec)sum);
  }
  static void enter() {}
  static void leave() {}

  static void prepare(const float* x, int64_t size, uint32_t* words, float* scale) {
    IntVec most = {};
    for (int64_t k = 0; k < size; k += kLanes) {
      const IntVec magnitude = (IntVec)load_some(x + k, size - k) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    const Int8Step step = int8_step(most);
    *scale = step.scale;
    char* to = reinterpret_cast<char*>(words);
    for (int64_t k = 0; k < size; k += kLanes) {
      const Vec values = step.there ? load_some(x + k, size - k) * all(step.steps) : Vec{};
      const IntVec whole = (IntVec)(values + all(kRounding)) - (IntVec)all(kRounding) + 128;
      const ByteVec bytes = __builtin_convertvector((WordVec)whole, ByteVec);
      __builtin_memcpy(to + k, &bytes, sizeof bytes);
    }
  }
};

}  // namespace
}  // namespace ctxfast
