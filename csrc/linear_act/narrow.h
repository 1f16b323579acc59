// SPDX-License-Identifier: Apache-2.0
// The bfloat16 and int8 products, over x held as tiles. Compiled with -ffp-contract=off: with exact sums int8 gives the
// same bits on every instruction set.
//
// The including file sets CTXFAST_LANES and, for instructions it wants,
//   CTXFAST_DOT_BF16(sum, x, w)   Vec: sum + both products
//   CTXFAST_DOT_INT8(sum, x, w)   WordVec: sum + four products of unsigned x and signed w
#pragma once

#include "base/int8.h"
#include "linear_act/product.h"

namespace ctxfast {
namespace {

struct Bfloat16 {
  static constexpr bool kScaled = false, kFast = true;
  typedef Vec Sum;
#if defined(CTXFAST_DOT_BF16)
  static constexpr int kRows = 8;
  typedef WordVec Spread;
  static Spread spread(uint32_t word) { return all_words(word); }
  static Sum dot(Sum sum, Spread x, WordVec w) { return CTXFAST_DOT_BF16(sum, x, w); }
#else
  static constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 2 : 1;
  struct Spread {
    Vec even, odd;
  };
  static Spread spread(uint32_t word) { return {(Vec)all_words(word << 16), (Vec)all_words(word & 0xffff0000u)}; }
  static Sum dot(Sum sum, const Spread& x, WordVec w) {
    sum = fused(x.odd, (Vec)(w & 0xffff0000u), sum);
    return fused(x.even, (Vec)(w << 16), sum);
  }
#endif
  static void enter() {}
  static void leave() {}
  static Vec value(const LinearActJob&, const float* z, int64_t, float, Vec bias) { return load(z) + bias; }

  static void prepare(const LinearActJob& job, int64_t row, int64_t at) {
    const uint16_t* const from = static_cast<const uint16_t*>(job.x) + row * job.stride_x;
    uint32_t* to = tile_row<kTileRows>(job, at);
    for (int64_t k = 0; k < job.in; k += 2 * kTileWords, to += kTile) {
      const int64_t n = less(2 * kTileWords, job.in - k);
      if (n < 2 * kTileWords) __builtin_memset(to, 0, 4 * kTileWords);  // what is beyond could be NaN
      __builtin_memcpy(to, from + k, 2 * n);
    }
  }
};

struct Int8 : Int8Dot {
  static constexpr int kRows = kIsOne ? kLanes == 16 ? 8 : 2 : kIsPlain ? kLanes == 16 ? 4 : 1 : 2;
  static constexpr bool kScaled = true, kFast = false;
  static void enter() {}
  static void leave() {}
  static Vec value(const LinearActJob& job, const float* z, int64_t at, float x_scale, Vec bias) {
    WordVec sum = (WordVec)load(z);
    if (kBiased) sum -= load_words(reinterpret_cast<const uint32_t*>(job.sums) + at);
    return fused(__builtin_convertvector((IntVec)sum, Vec) * all(x_scale), load(job.scales + at), bias);
  }

  template <bool kHalf>
  static void prepare_as(const LinearActJob& job, int64_t row, int64_t at) {
    const int64_t from = row * job.stride_x;
    IntVec most = {};
    for (int64_t k = 0; k < job.in; k += kLanes) {
      const IntVec magnitude = (IntVec)load_typed<kHalf>(job.x, from + k, job.in - k) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    const Int8Step step = int8_step(most);
    job.x_scales[at] = step.scale;
    char* const to = reinterpret_cast<char*>(tile_row<kTileRows>(job, at));
    for (int64_t k = 0; k < job.in; k += kLanes) {
      const Vec x = step.there ? load_typed<kHalf>(job.x, from + k, job.in - k) : Vec{};
      const IntVec whole = (IntVec)(x * all(step.steps) + all(kRounding)) - (IntVec)all(kRounding) + 128;
      const ByteVec bytes = bytes_of((WordVec)whole);
      __builtin_memcpy(to + k / 64 * (4 * kTile) + k % 64, &bytes, sizeof bytes);
    }
  }

  static void prepare(const LinearActJob& job, int64_t row, int64_t at) {
    return job.is_half ? prepare_as<true>(job, row, at) : prepare_as<false>(job, row, at);
  }
};

}  // namespace
}  // namespace ctxfast
