// SPDX-License-Identifier: Apache-2.0
// The bfloat16 product, over x held as tiles.
//
// sets: generic avx2 avx512 avx512bf16 amx
// flags: -ffp-contract=off
#include "linear_act/product.h"
#include "linear_act/tiles.h"

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
    sum = fma(x.odd, (Vec)(w & 0xffff0000u), sum);
    return fma(x.even, (Vec)(w << 16), sum);
  }
#endif
  static void enter() {}
  static void leave() {}
  static Vec value(const LinearActJob&, const float* z, int64_t, float, Vec bias) { return load(z) + bias; }

  static void prepare(const LinearActJob& job, int64_t row, int64_t at) {
    const uint16_t* const from = static_cast<const uint16_t*>(job.x) + row * job.stride_x;
    uint32_t* to = tile_row<kTileRows>(job, at);
    for (int64_t k = 0; k < job.in; k += 2 * kTileWords, to += kTile) {
      const int64_t n = min(2 * kTileWords, job.in - k);
      if (n < 2 * kTileWords) __builtin_memset(to, 0, 4 * kTileWords);  // what is beyond could be NaN
      __builtin_memcpy(to, from + k, 2 * n);
    }
  }
};

}  // namespace

#if defined(__AMX_TILE__)
CTXFAST_KERNELS(LinearActKernel, linear_act_bfloat16) = &forward<Tiles<Bfloat16, false>>;
#else
CTXFAST_KERNELS(LinearActKernel, linear_act_bfloat16) = &forward<Vectors<Bfloat16>>;
#endif
}  // namespace ctxfast
