// SPDX-License-Identifier: Apache-2.0
// Rows from..to of a LayerNorm.
//
// sets: generic avx2 avx512
#include "layer_norm/kernels.h"

#include "base/typed_vector.h"

namespace ctxfast {
namespace {

constexpr int kSums = 4;  // running sums: more than one keeps adders busy

inline float total(const Vec* sums) {
  const Vec both = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += both[lane];
  return sum;
}

inline Vec only(Vec value, int64_t n) {
  for (int64_t lane = n; lane < kLanes; ++lane) value[lane] = 0.0f;
  return value;
}

template <bool kBf16, bool kSum>
void row(const LayerNormParams& p, int64_t i, float* sum) {
  int64_t at[kLayerNormSources] = {};
  for (int64_t s = 0; s < p.sources; ++s) {
    const LayerNormSource& source = p.source[s];
    const int64_t index = !source.ids       ? i
                          : source.is_int64 ? static_cast<const int64_t*>(source.ids)[i]
                                            : static_cast<const int32_t*>(source.ids)[i];
    at[s] = index * source.stride;
  }
  Vec sums[kSums] = {};
  for (int64_t k = 0, j = 0; k < p.size; k += kLanes, j = (j + 1) % kSums) {
    const int64_t n = p.size - k;
    Vec value = load_typed<kBf16>(p.source[0].rows, at[0] + k, n);
    if (p.shift) value += load_typed<kBf16>(p.shift, k, n);
    for (int64_t s = 1; s < p.sources; ++s) value += load_typed<kBf16>(p.source[s].rows, at[s] + k, n);
    if constexpr (kSum) {
      store_typed<kBf16, false>(p.sum, i * p.size + k, value, n);
      if constexpr (kBf16) value = load_typed<true>(p.sum, i * p.size + k, n);
    }
    store(sum + k, value);  // past the end zero
    sums[j] += value;
  }
  const float mean = p.is_rms ? 0.0f : total(sums) / static_cast<float>(p.size);
  for (Vec& each : sums) each = Vec{};
  for (int64_t k = 0, j = 0; k < p.size; k += kLanes, j = (j + 1) % kSums) {
    Vec off = load(sum + k) - all(mean);
    if (p.size - k < kLanes) off = only(off, p.size - k);
    sums[j] = fma(off, off, sums[j]);
  }
  const float scale = 1.0f / __builtin_sqrtf(total(sums) / static_cast<float>(p.size) + p.eps);
  for (int64_t k = 0; k < p.size; k += kLanes) {
    const int64_t n = p.size - k;
    const Vec value = (load(sum + k) - all(mean)) * all(scale);
    const Vec shift = p.bias ? load_typed<kBf16>(p.bias, k, n) : Vec{};
    const Vec y = fma(value, load_typed<kBf16>(p.weight, k, n), shift);
    store_typed<kBf16, false>(p.y, i * p.size + k, y, n);
  }
}

void rows(const LayerNormParams& p, int64_t from, int64_t to) {
  alignas(64) float sum[kLayerNormMaxSize + kLanes];
  const bool is_bf16 = p.io_dtype == DType::kBFloat16;
  const auto one =
      p.sum ? (is_bf16 ? row<true, true> : row<false, true>) : (is_bf16 ? row<true, false> : row<false, false>);
  for (int64_t i = from; i < to; ++i) one(p, i, sum);
}

}  // namespace

CTXFAST_KERNELS(LayerNormKernel, layer_norm) = &rows;
}  // namespace ctxfast
