// SPDX-License-Identifier: Apache-2.0
// The int8 product: exact sums, and every float32 operation rounded on its own, so that all instruction sets give the
// same bits. AVX-512F alone has no wide byte arithmetic: such machines take AVX2's kernel.
//
// sets: generic avx2 avxvnni avx512vnni amx
// flags: -ffp-contract=off
#include "base/int8.h"

#include "lstm/recurrence.h"
#include "lstm/tiles.h"

namespace ctxfast {
namespace {

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
      const IntVec quantized = (IntVec)(values + all(kRounding)) - (IntVec)all(kRounding) + 128;
      const ByteVec bytes = __builtin_convertvector((WordVec)quantized, ByteVec);
      __builtin_memcpy(to + k, &bytes, sizeof bytes);
    }
  }
};

}  // namespace

#if defined(__AMX_TILE__)
CTXFAST_KERNELS(LstmKernels, lstm_int8) = {&forward<Tiles<Int8, true>>, nullptr};
#else
CTXFAST_KERNELS(LstmKernels, lstm_int8) = {&forward<Int8>, nullptr};
#endif
}  // namespace ctxfast
