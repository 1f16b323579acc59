// SPDX-License-Identifier: Apache-2.0
// The int8 product, over x held as tiles: exact sums, and every float32 operation rounded on its own, so that all
// instruction sets give the same bits.
//
// sets: generic avx2 avxvnni avx512 avx512vnni amx
// flags: -ffp-contract=off
#include "base/int8.h"

#include "linear_act/product.h"
#include "linear_act/tiles.h"

namespace ctxfast {
namespace {

struct Int8 : Int8Dot {
  static constexpr int kRows = kIsOne ? kLanes == 16 ? 8 : 2 : kIsPlain ? kLanes == 16 ? 4 : 1 : 2;
  static constexpr bool kScaled = true, kFast = false;
  static void enter() {}
  static void leave() {}
  static Vec value(const LinearActJob& job, const float* z, int64_t at, float x_scale, Vec bias) {
    WordVec sum = (WordVec)load(z);
    if (kBiased) sum -= load_words(reinterpret_cast<const uint32_t*>(job.sums) + at);
    return fma(__builtin_convertvector((IntVec)sum, Vec) * all(x_scale), load(job.scales + at), bias);
  }

  template <bool kBf16>
  static void prepare_as(const LinearActJob& job, int64_t row, int64_t at) {
    const int64_t from = row * job.stride_x;
    IntVec most = {};
    for (int64_t k = 0; k < job.in; k += kLanes) {
      const IntVec magnitude = (IntVec)load_typed<kBf16>(job.x, from + k, job.in - k) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    const Int8Step step = int8_step(most);
    job.x_scales[at] = step.scale;
    char* const to = reinterpret_cast<char*>(tile_row<kTileRows>(job, at));
    for (int64_t k = 0; k < job.in; k += kLanes) {
      const Vec x = step.there ? load_typed<kBf16>(job.x, from + k, job.in - k) : Vec{};
      const IntVec quantized = (IntVec)(x * all(step.steps) + all(kRounding)) - (IntVec)all(kRounding) + 128;
      const ByteVec bytes = to_bytes((WordVec)quantized);
      __builtin_memcpy(to + k / 64 * (4 * kTile) + k % 64, &bytes, sizeof bytes);
    }
  }

  static void prepare(const LinearActJob& job, int64_t row, int64_t at) {
    return job.is_bf16 ? prepare_as<true>(job, row, at) : prepare_as<false>(job, row, at);
  }
};

}  // namespace

#if defined(__AMX_TILE__)
CTXFAST_KERNELS(LinearActKernel, linear_act_int8) = &forward<Tiles<Int8, true>>;
#else
CTXFAST_KERNELS(LinearActKernel, linear_act_int8) = &forward<Vectors<Int8>>;
#endif
}  // namespace ctxfast
