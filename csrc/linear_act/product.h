// SPDX-License-Identifier: Apache-2.0
// What all kernels of linear_act share: who does what, bias and activation.
#pragma once

#include "base/typed_vector.h"
#include "linear_act/kernels.h"

namespace ctxfast {
namespace {

constexpr int kWidth = 32;                 // columns of a panel
constexpr int kVectors = kWidth / kLanes;  // vectors across it
constexpr int kTileWords = 16;
constexpr int kPanelTile = kWidth * kTileWords;  // words of a panel's tile
constexpr int kTileRows = kLinearActTileRows;
constexpr int kTile = kTileRows * kTileWords;  // words of a tile of x

// Tiles of a panel that stay in L1 while the rows stream over them: 24 KB. 8 tiles, a power of two of bytes, take 15 %
// longer (Zen 4, 2026-11): their lines meet those of the sums in the same sets.
constexpr int64_t kBlock = 12;

// The normal distribution's Phi(x) = 1/2 + x P(x^2) / Q(x^2), fitted to 1.4e-8 for |x| <= 5.75; beyond it is 0 or 1
// to float32's last bit.
inline Vec gelu(Vec x) {
  constexpr float kP[] = {0.398942197f,    0.0352381028f,   0.00475887315f,
                          0.000182346656f, 6.38772217e-06f, 2.13121146e-08f};
  constexpr float kQ[] = {1.0f, 0.25499416f, 0.0294301873f, 0.00196140902f, 7.76751019e-05f, 1.15807774e-06f};
  const Vec s = x * x;
  Vec p = all(kP[5]), q = all(kQ[5]);
  for (int i = 4; i >= 0; --i) {
    p = fma(p, s, all(kP[i]));
    q = fma(q, s, all(kQ[i]));
  }
  Vec phi = fma(x, p / q, all(0.5f));
  phi = x > all(5.75f) ? all(1.0f) : phi;
  phi = x < all(-5.75f) ? all(0.0f) : phi;
  return x * phi;
}

inline Vec gelu_tanh(Vec x) {
  const Vec cube = x * x * x;
  return x * sigmoid(all(1.5957691216f) * fma(all(0.044715f), cube, x));
}

template <int kActivation>
inline Vec activated(Vec x) {
  if constexpr (kActivation == 1) return gelu(x);
  if constexpr (kActivation == 2) return gelu_tanh(x);
  if constexpr (kActivation == 3) return x < all(0.0f) ? all(0.0f) : x;
  if constexpr (kActivation == 4) return tanh(x);
  if constexpr (kActivation == 5) return x * sigmoid(x);
  return x;
}

// z (rows, 32): sums of one panel -> y. x_scales: of these rows.
template <class Product, int kActivation, bool kBf16>
void finish_as(const LinearActJob& job, int64_t row, int64_t rows, int64_t panel, const float* z,
               const float* x_scales) {
  const int64_t column = panel * kWidth;
  Vec bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = column + v * kLanes;
    bias[v] = job.bias && at < job.out ? load_typed<kBf16>(job.bias, at, job.out - at) : Vec{};
  }
  const int64_t width = min(kWidth, job.out - column);
  for (int64_t i = 0; i < rows; ++i, z += kWidth) {
    const float scale = x_scales ? x_scales[i] : 0.0f;
    const int64_t to = (row + i) * job.out + column;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t n = width - v * kLanes;
      if (n <= 0) break;
      const Vec sum = Product::value(job, z + v * kLanes, column + v * kLanes, scale, bias[v]);
      store_typed<kBf16, Product::kFast>(job.y, to + v * kLanes, activated<kActivation>(sum), n);
    }
  }
}

// The same gated: the panel's first half is activated and multiplied by its second.
template <class Product, int kActivation, bool kBf16>
void finish_gated(const LinearActJob& job, int64_t row, int64_t rows, int64_t panel, const float* z,
                  const float* x_scales) {
  constexpr int kHalf = kWidth / 2, kVectorsOfHalf = kVectors / 2;
  const int64_t size = job.out / 2, column = panel * kHalf, width = min(kHalf, size - column);
  Vec bias[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = column + v % kVectorsOfHalf * kLanes, half = v / kVectorsOfHalf * size;
    bias[v] = job.bias && at < size ? load_typed<kBf16>(job.bias, half + at, size - at) : Vec{};
  }
  for (int64_t i = 0; i < rows; ++i, z += kWidth) {
    const float scale = x_scales ? x_scales[i] : 0.0f;
    for (int v = 0; v < kVectorsOfHalf; ++v) {
      const int64_t n = width - v * kLanes;
      if (n <= 0) break;
      const int first = v * kLanes, second = kHalf + first;
      const Vec a = Product::value(job, z + first, panel * kWidth + first, scale, bias[v]);
      const Vec b = Product::value(job, z + second, panel * kWidth + second, scale, bias[kVectorsOfHalf + v]);
      const int64_t to = (row + i) * size + column + first;
      store_typed<kBf16, Product::kFast>(job.y, to, activated<kActivation>(a) * b, n);
    }
  }
}

template <class Product, int kActivation>
void finish_with(const LinearActJob& job, int64_t row, int64_t rows, int64_t panel, const float* z,
                 const float* x_scales) {
  if (job.is_gated) {
    const auto gated =
        job.is_bf16 ? finish_gated<Product, kActivation, true> : finish_gated<Product, kActivation, false>;
    gated(job, row, rows, panel, z, x_scales);
  } else if (job.is_bf16) {
    finish_as<Product, kActivation, true>(job, row, rows, panel, z, x_scales);
  } else {
    finish_as<Product, kActivation, false>(job, row, rows, panel, z, x_scales);
  }
}

template <class Product>
void finish(const LinearActJob& job, int64_t row, int64_t rows, int64_t panel, const float* z, const float* x_scales) {
  switch (job.activation) {
    case 1:
      return finish_with<Product, 1>(job, row, rows, panel, z, x_scales);
    case 2:
      return finish_with<Product, 2>(job, row, rows, panel, z, x_scales);
    case 3:
      return finish_with<Product, 3>(job, row, rows, panel, z, x_scales);
    case 4:
      return finish_with<Product, 4>(job, row, rows, panel, z, x_scales);
    case 5:
      return finish_with<Product, 5>(job, row, rows, panel, z, x_scales);
    default:
      return finish_with<Product, 0>(job, row, rows, panel, z, x_scales);
  }
}

// Calls block(first row of the chunk, rows, panel) for this thread's part of a chunk. A thread keeps a panel while it
// streams the rows over it; where there are few panels for the threads, rows are divided too.
template <class Block>
inline void for_blocks(const LinearActJob& job, int64_t rows, int index, int count, const Block& block) {
  const int64_t panels = ceil_div(job.out, kWidth), groups = ceil_div(rows, kLinearActRows);
  const int64_t wanted = panels >= 4 * count ? 1 : ceil_div(4 * count, panels);
  const int64_t splits = min(wanted, groups);
  const Share items(panels * splits, index, count);
  for (int64_t item = items.from; item < items.to; ++item) {
    const Share part(groups, static_cast<int>(item % splits), static_cast<int>(splits));
    const int64_t from = part.from * kLinearActRows, to = min(part.to * kLinearActRows, rows);
    if (from < to) block(from, to - from, item / splits);
  }
}

// Row `row` of the chunk, at tile 0; groups have `height` rows.
template <int height>
inline uint32_t* tile_row(const LinearActJob& job, int64_t row) {
  return job.x_tiles + (row / height * job.tiles * height + row % height) * kTileWords;
}

// Asked for ahead of a panel's tile: what the products take in the time memory needs to answer.
inline void fetch_tile(const uint32_t* w) {
  for (int64_t line = 0; line < kPanelTile; line += 16) __builtin_prefetch(w + kBlock * kPanelTile + line, 0, 3);
}

// For each chunk of rows: x as tiles, then this thread's panels.
template <class Product>
void forward(const LinearActJob& job, int index, int count) {
  Product::enter();
  for (int64_t first = 0; first < job.rows; first += job.chunk) {
    const int64_t rows = min(job.chunk, job.rows - first);
    if (first > 0) linear_act_barrier(job.barrier, count);  // everybody has read the chunk before
    const Share share(rows, index, count);
    for (int64_t row = share.from; row < share.to; ++row) Product::prepare(job, first + row, row);
    linear_act_barrier(job.barrier, count);
    for_blocks(job, rows, index, count,
               [&](int64_t row, int64_t n, int64_t panel) { Product::block(job, first, row, n, panel); });
  }
  Product::leave();
}

// What the products read next: prefetched a little at a time, so that it arrives while they work.
struct Ahead {
  const uint32_t* from;  // null: nothing
  int64_t lines;         // with each tile

  void fetch() {
    for (int64_t line = 0; line < lines; ++line, from += 16) __builtin_prefetch(from, 0, 2);
  }
};

// z (+)= sums of kRows rows of x's tiles and a block of one panel's.
template <class Base, int kRows>
inline void vector_product(const uint32_t* x, const uint32_t* w, int64_t tiles, bool is_first, Ahead& ahead, float* z) {
  typename Base::Sum sums[kRows][kVectors] = {};
  for (int64_t tile = 0; tile < tiles; ++tile, x += kTile, w += kPanelTile) {
    ahead.fetch();
    for (int j = 0; j < kTileWords; ++j) {
      WordVec weights[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const int column = v * kLanes;
        weights[v] = load_words(w + (column / 16) * 256 + j * 16 + column % 16);
      }
      for (int i = 0; i < kRows; ++i) {
        const auto value = Base::spread(x[i * kTileWords + j]);
        for (int v = 0; v < kVectors; ++v) sums[i][v] = Base::dot(sums[i][v], value, weights[v]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* const to = z + i * kWidth + v * kLanes;
      store(to, (Vec)(is_first ? sums[i][v] : sums[i][v] + (typename Base::Sum)load(to)));
    }
  }
}

// A product on vectors. A block of a panel's tiles stays in L1 while strips of rows stream over it, the last strip as
// low as its rows allow. Sums are added up block by block, which keeps more of their digits than one long sum; a row's
// are the same whatever its strip.
template <class Base>
struct Vectors : Base {
  template <int kRows>
  static void strips(const uint32_t* x, int64_t group, int64_t row, int64_t rows, const uint32_t* w, int64_t tiles,
                     bool is_first, Ahead& ahead, float* z) {
    for (int64_t i = 0; i < rows; i += kRows) {
      const int64_t at = row + i, n = rows - i;
      if constexpr (kRows >= 4) {
        if (n <= kRows / 2) return strips<kRows / 2>(x, group, at, n, w, tiles, is_first, ahead, z + i * kWidth);
      }
      const uint32_t* const from = x + at / kTileRows * group + at % kTileRows * kTileWords;
      vector_product<Base, kRows>(from, w, tiles, is_first, ahead, z + i * kWidth);
    }
  }

  static void block(const LinearActJob& job, int64_t first, int64_t row, int64_t rows, int64_t panel) {
    alignas(64) float z[(kLinearActMostRows + kTileRows) * kWidth];
    const uint32_t* const panel_words = job.packed + panel * job.tiles * kPanelTile;
    const uint32_t* const end = job.packed + ceil_div(job.out, kWidth) * job.tiles * kPanelTile;
    const int64_t passes = ceil_div(rows, Base::kRows);
    for (int64_t from = 0; from < job.tiles; from += kBlock) {
      const int64_t tiles = min(kBlock, job.tiles - from);
      const uint32_t* const w = panel_words + from * kPanelTile;
      Ahead ahead = {w + kBlock * kPanelTile, ceil_div(kPanelTile / 16, passes)};
      if (ahead.from + tiles * passes * ahead.lines * 16 > end) ahead.lines = 0;
      strips<Base::kRows>(job.x_tiles + from * kTile, job.tiles * kTile, row, rows, w, tiles, from == 0, ahead, z);
    }
    finish<Vectors>(job, first + row, rows, panel, z, Base::kScaled ? job.x_scales + row : nullptr);
  }
};

}  // namespace
}  // namespace ctxfast
