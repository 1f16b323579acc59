// SPDX-License-Identifier: Apache-2.0
// The float32 product, over x held as tiles.
//
// sets: generic avx2 avx512
#include "linear_act/product.h"

namespace ctxfast {
namespace {

struct Float32 {
  static constexpr bool kScaled = false, kFast = true;
  static constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 2 : 1;
  typedef Vec Sum, Spread;
  static void enter() {}
  static void leave() {}
  static Spread spread(uint32_t word) { return (Vec)all_words(word); }
  static Sum dot(Sum sum, Spread x, WordVec w) {
#if CTXFAST_LANES > 4
    return fma(x, (Vec)w, sum);
#else
    return x * (Vec)w + sum;  // a fused product without the instruction takes a hundred times as long
#endif
  }
  static Vec value(const LinearActJob&, const float* z, int64_t, float, Vec bias) { return load(z) + bias; }

  static void prepare(const LinearActJob& job, int64_t row, int64_t at) {
    const float* const from = static_cast<const float*>(job.x) + row * job.stride_x;
    uint32_t* to = tile_row<kTileRows>(job, at);
    for (int64_t k = 0; k < job.in; k += kTileWords, to += kTile) {
      const int64_t n = min(kTileWords, job.in - k);
      if (n < kTileWords) __builtin_memset(to, 0, 4 * kTileWords);  // what is beyond could be NaN
      __builtin_memcpy(to, from + k, 4 * n);
    }
  }
};

}  // namespace

CTXFAST_KERNELS(LinearActKernel, linear_act_float32) = &forward<Vectors<Float32>>;
}  // namespace ctxfast
