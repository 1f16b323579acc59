// SPDX-License-Identifier: Apache-2.0
// Dropout of attention weights from a counter, as csrc/attention/attention.h lays it down: forward and backward
// draw the same bits, and neither stores them for the other. As in base/vector.h everything is in an unnamed namespace.
#pragma once

#include "attention/kernels.h"
#include "attention/product.h"
#include "base/philox.h"

namespace ctxfast {
namespace {

// Numbers of 16 bits from one row of draws to the next.
inline int64_t draws_of_row(int64_t length) { return ceil_div(length, kAttentionDraw) * kAttentionDraw; }

inline float dropped_share(int32_t threshold) { return static_cast<float>(threshold) / 65536; }

// The bits of query rows [from, to) and some keys of `length`.
inline void draw(const int64_t seeds[2], int64_t pair, int64_t from, int64_t to, int64_t length, Span keys,
                 uint16_t* draws) {
  WordVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  constexpr int kHalfOfDraw = kAttentionDraw / 2;
  const int64_t ld = draws_of_row(length);
  for (int64_t group = from / 4; group * 4 < to; ++group) {
    for (int64_t block = keys.from / kAttentionDraw; block * kAttentionDraw < keys.to; ++block) {
      for (int64_t at = 0; at < kHalfOfDraw; at += kLanes) {
        WordVec words[] = {lane + all_words(static_cast<uint32_t>(block * kHalfOfDraw + at)),
                           all_words(static_cast<uint32_t>(group)), all_words(static_cast<uint32_t>(pair)),
                           all_words(static_cast<uint32_t>(seeds[1]))};
        philox(words, static_cast<uint64_t>(seeds[0]));
        for (int64_t w = 0; w < 4; ++w) {
          const int64_t row = group * 4 + w;
          if (row < from || row >= to) continue;
          const ShortVec low = to_shorts(words[w] & 0xffffu), high = to_shorts(words[w] >> 16);
          uint16_t* const out = draws + (row - from) * ld + block * kAttentionDraw + at;
          __builtin_memcpy(out, &low, sizeof low);
          __builtin_memcpy(out + kHalfOfDraw, &high, sizeof high);
        }
      }
    }
  }
}

// `value` where a weight is kept, else 0.
inline Vec drop(Vec value, const uint16_t* draws, int32_t threshold) {
  ShortVec shorts;
  __builtin_memcpy(&shorts, draws, sizeof shorts);
  return (IntVec)to_words(shorts) >= threshold ? value : Vec{};
}

// Zeroes the dropped weights of a row, held as words of `Kind`.
template <class Kind>
void drop_row(float* row, const uint16_t* draws, int64_t length, int32_t threshold) {
  for (int64_t j = 0; j < length; j += kLanes) {
    if constexpr (Kind::kTerms == 2) {
      uint16_t* const shorts = reinterpret_cast<uint16_t*>(row) + j;
      const ShortVec rest = to_bf16_fast(drop(load_bf16(shorts, kLanes), draws + j, threshold));
      __builtin_memcpy(shorts, &rest, sizeof rest);
    } else {
      store(row + j, drop(load(row + j), draws + j, threshold));
    }
  }
}

}  // namespace
}  // namespace ctxfast
