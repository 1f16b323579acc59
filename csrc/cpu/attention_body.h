// SPDX-License-Identifier: Apache-2.0
// attention on vector registers. The including file sets CTXFAST_LANES and, for bfloat16 instructions it wants,
//   CTXFAST_DOT_BF16(sum, x, w)   Vec: sum + both products
//
// Per (sequence, head) keys are turned so that a row holds one term of many keys, and values copied together; then for
// some query rows at a time: scores, softmax, context. Both products are one function, of words broadcast from rows
// and vectors of words: a word is a float, or two bfloat16 terms of a sum, the first in the low half.
#pragma once

#include "attention_kernel.h"
#include "attention_vector.h"

namespace ctxfast {
namespace {

// Registers of a product: at most kVectors vectors of columns by rows_of(vectors) rows of sums.
constexpr int kVectors = kLanes == 16 ? 4 : 2;
constexpr int rows_of(int vectors) {
  return kLanes == 16 ? vectors == 4 ? 6 : vectors == 3 ? 8 : 12 : kLanes == 8 ? vectors == 2 ? 6 : 10 : 4;
}
// Words of a sum that stay in the nearest caches while rows pass over them. Each block is summed by itself, which also
// keeps long sums exact.
constexpr int64_t kBlock = 128;

struct Float32 {
  static constexpr int kTerms = 1;  // of a sum in a word
  static Vec spread(uint32_t word) { return (Vec)all_words(word); }
  static Vec dot(Vec sum, Vec x, Vec w) { return x * w + sum; }
};

#if defined(CTXFAST_DOT_BF16)
struct Bfloat16 {
  static constexpr int kTerms = 2;
  static Vec spread(uint32_t word) { return (Vec)all_words(word); }
  static Vec dot(Vec sum, Vec x, Vec w) { return CTXFAST_DOT_BF16(sum, x, w); }
};
#endif

// z[row][column] = (begin: 0; else z) + sum over words of x[row][word] w[word][column]. The order of a sum is the same
// for every kRows and kColumns.
template <class Kind, int kRows, int kColumns>
inline void tile(const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t words, bool begin, float* z,
                 int64_t ld_z) {
  Vec sum[kRows][kColumns] = {};
  for (int64_t k = 0; k < words; ++k, w += kColumns * kLanes) {
    Vec columns[kColumns];
#pragma GCC unroll 16
    for (int v = 0; v < kColumns; ++v) columns[v] = (Vec)load_words(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = Kind::spread(x[r * ld_x + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kColumns; ++v) sum[r][v] = Kind::dot(sum[r][v], value, columns[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kColumns; ++v) {
      float* const to = z + r * ld_z + v * kLanes;
      store(to, begin ? sum[r][v] : load(to) + sum[r][v]);
    }
  }
}

template <class Kind, int kColumns, int kRows>
void tile_rows(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t words, bool begin, float* z,
               int64_t ld_z) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_rows<Kind, kColumns, kRows - 1>(rows, x, ld_x, w, words, begin, z, ld_z);
  }
  tile<Kind, kRows, kColumns>(x, ld_x, w, words, begin, z, ld_z);
}

// Rows of memory that are asked for ahead of their use, some with every tile of a product: the way from memory takes
// longer than copying, and is hidden behind the arithmetic.
struct Ahead {
  static constexpr int kParts = 4;
  const char* part[kParts];
  int64_t step[kParts];  // bytes between rows
  int64_t bytes, left, at_once;

  void fetch_some() {
    for (int64_t row = less(at_once, left); row > 0; --row, --left) {
      for (int i = 0; i < kParts; ++i) {
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(part[i] + at, 0, 2);
        part[i] += step[i];
      }
    }
  }
};

template <class Kind, int kColumns>
void panel_rows(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, int64_t words, bool begin, float* z,
                int64_t ld_z, Ahead* ahead) {
  constexpr int kRows = rows_of(kColumns);
  const int64_t tiles = panels_of(rows, kRows);
  for (int64_t i = 0; i < tiles; ++i) {  // as even as can be: 8 rows are 4 + 4, not 6 + 2
    const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
    ahead->fetch_some();
    tile_rows<Kind, kColumns, kRows>(to - from, x + from * ld_x, ld_x, w, words, begin, z + from * ld_z, ld_z);
  }
}

// Columns in panels of at most kVectors vectors, as even as can be; a panel is [word][its columns].
struct Panels {
  int64_t vectors, count;
  explicit Panels(int64_t columns)
      : vectors(panels_of(columns, kLanes)), count(panels_of(panels_of(columns, kLanes), kVectors)) {}
  int64_t first(int64_t panel) const { return vectors * panel / count; }
  int64_t width(int64_t panel) const { return first(panel + 1) - first(panel); }
};

// z (rows, columns) = x (rows, words) times panels of `words` words each.
template <class Kind>
void product(int64_t rows, const uint32_t* x, int64_t ld_x, const uint32_t* w, const Panels& panels, int64_t words,
             float* z, int64_t ld_z, Ahead* ahead) {
  for (int64_t k = 0; k < words; k += kBlock) {
    const int64_t some = less(kBlock, words - k);
    for (int64_t panel = 0; panel < panels.count; ++panel) {
      const int64_t first = panels.first(panel) * kLanes, width = panels.width(panel);
      const uint32_t* const from = w + first * words + k * width * kLanes;
      float* const to = z + first;
      if (width == 1) panel_rows<Kind, 1>(rows, x + k, ld_x, from, some, k == 0, to, ld_z, ahead);
      if (width == 2) panel_rows<Kind, 2>(rows, x + k, ld_x, from, some, k == 0, to, ld_z, ahead);
      if constexpr (kVectors > 2) {
        if (width == 3) panel_rows<Kind, 3>(rows, x + k, ld_x, from, some, k == 0, to, ld_z, ahead);
        if (width == 4) panel_rows<Kind, 4>(rows, x + k, ld_x, from, some, k == 0, to, ld_z, ahead);
      }
    }
  }
}

inline int64_t offset(const AttentionJob& job, int64_t i) {
  return job.is_int64 ? static_cast<const int64_t*>(job.cu_seqlens)[i] : static_cast<const int32_t*>(job.cu_seqlens)[i];
}

// One (sequence, head) of a job: addresses, and this thread's workspace. kHalf: qkv, bias and y are bfloat16.
template <class Kind, bool kHalf>
struct Head {
  const AttentionJob& job;
  const int64_t start, length, head, size, padded_size;
  const int64_t size_words, key_words;  // words of a sum over head_dim, and over the keys
  const Panels keys_in, values_in;
  const int64_t ld_score;
  uint32_t *keys, *values, *rows, *queries;
  float *context, *scores;

  Head(const AttentionJob& job, int64_t start, int64_t length, int64_t head, char* scratch)
      : job(job),
        start(start),
        length(length),
        head(head),
        size(job.head_dim),
        padded_size(panels_of(size, kAttentionPad) * kAttentionPad),
        size_words(panels_of(size, Kind::kTerms)),
        key_words(panels_of(length, Kind::kTerms)),
        keys_in(length),
        values_in(size),
        // A line more: rows a power of two apart would share their place in a cache.
        ld_score((panels_of(length, kAttentionPad) + 1) * kAttentionPad) {
    const int64_t padded = panels_of(length, kAttentionPad) * kAttentionPad;
    keys = reinterpret_cast<uint32_t*>(scratch);
    values = keys + padded * padded_size;
    rows = values + padded * padded_size;
    queries = rows + kAttentionPad * padded_size;
    const int64_t most = less(kAttentionRows, length);
    context = reinterpret_cast<float*>(queries + most * padded_size);
    scores = context + most * padded_size;
  }

  // Where row i of queries (part 0), keys (1) or values (2) begins, and the same of the bias.
  int64_t bias_at(int64_t part) const { return (part * job.heads + head) * size; }
  int64_t row_at(int64_t part, int64_t i) const { return (start + i) * job.stride_qkv + bias_at(part); }

  // The rows of one part: what is loaded for every vector, apart from `this`, which stores might reach.
  struct Part {
    const void* const rows;
    const void* const bias;
    const int64_t bias_at, size;

    Vec value(int64_t row, int64_t at) const {
      const Vec x = load_typed<kHalf>(rows, row + at, size - at);
      return bias ? x + load_typed<kHalf>(bias, bias_at + at, size - at) : x;
    }
    HalfVec half(int64_t row, int64_t at) const {
      if (bias) return narrowed_fast(value(row, at));
      return load_half_lanes(static_cast<const uint16_t*>(rows) + row + at, size - at);
    }
  };
  Part part_of(int64_t which) const { return {job.qkv, job.bias, bias_at(which), size}; }

  // A row as words, padded with zeros to whole vectors.
  static void copy_row(const Part part, int64_t row, float sign, uint32_t* to) {
    if constexpr (Kind::kTerms == 2) {
      const HalfVec flip = halves_of(all_words(sign < 0 ? 0x8000u : 0u));
      for (int64_t at = 0; at < part.size; at += kLanes) {
        const HalfVec halves = part.half(row, at) ^ flip;
        __builtin_memcpy(reinterpret_cast<uint16_t*>(to) + at, &halves, sizeof halves);
      }
    } else {
      for (int64_t at = 0; at < part.size; at += kLanes) {
        const Vec x = part.value(row, at) * all(sign);
        __builtin_memcpy(to + at, &x, sizeof x);
      }
    }
  }

  // Words between rows of words.
  int64_t ld_row() const { return padded_size / Kind::kTerms; }

  // Keys past the end are the last one again: their scores are left out. Terms past the end, to the next multiple of
  // four, are written where the next panel will be, or into what the workspace is padded by.
  void turn_keys() const {
    const Part from = part_of(1);
    const int64_t ld = ld_row(), size_words = this->size_words;
    for (int64_t panel = 0; panel < keys_in.count; ++panel) {
      const int64_t first = keys_in.first(panel), width = keys_in.width(panel) * kLanes;
      for (int64_t vector = first; vector < keys_in.first(panel + 1); ++vector) {
        for (int64_t i = 0; i < kLanes; ++i) {
          copy_row(from, row_at(1, less(vector * kLanes + i, length - 1)), 1.0f, rows + i * ld);
        }
        uint32_t* const to = keys + first * kLanes * size_words + (vector - first) * kLanes;
        for (int64_t k = 0; k < size_words; k += 4) turn_four(rows + k, ld, to + k * width, width);
      }
    }
  }

  void copy_values() const {
    const Part from = part_of(2);
    for (int64_t panel = 0; panel < values_in.count; ++panel) {
      const int64_t first = values_in.first(panel) * kLanes, width = values_in.width(panel) * kLanes;
      uint32_t* to = values + first * key_words;
      int64_t row = row_at(2, 0) + first;
      const int64_t step = job.stride_qkv, whole = length / Kind::kTerms;
      const Part part = {from.rows, from.bias, from.bias_at + first, from.size - first};
      for (int64_t word = 0; word < whole; ++word, to += width, row += Kind::kTerms * step) {
        for (int64_t at = 0; at < width; at += kLanes) {
          WordVec words;
          if constexpr (Kind::kTerms == 2) {
            words = words_of(part.half(row, at)) | words_of(part.half(row + step, at)) << 16;
          } else {
            words = (WordVec)part.value(row, at);
          }
          __builtin_memcpy(to + at, &words, sizeof words);
        }
      }
      if constexpr (Kind::kTerms == 2) {
        for (int64_t at = 0; length % 2 && at < width; at += kLanes) {
          const WordVec words = words_of(part.half(row, at));
          __builtin_memcpy(to + at, &words, sizeof words);
        }
      }
    }
  }

  // Of a row of scores. NaN may be passed over here: it stays in the scores.
  float largest(const float* row) const {
    const int64_t whole = length / kLanes * kLanes;
    Vec most = all(-__builtin_inff());
    for (int64_t j = 0; j < whole; j += kLanes) most = larger(most, load(row + j));
    if (whole < length) most = larger(most, first_lanes(load(row + whole), length - whole, most));
    return largest_lane(most);
  }

  // A row of scores becomes 2^(step (score - largest)), as words; returns the sum.
  float weigh(float* row, float largest, float step) const {
    const Vec top = all(largest);
    const int64_t whole = length / kLanes * kLanes;
    Vec sum = {};
    const auto put = [row](int64_t j, Vec e) {
      if constexpr (Kind::kTerms == 2) {
        // In place: what is written lies before what is still to be read.
        const HalfVec halves = narrowed_fast(e);
        __builtin_memcpy(reinterpret_cast<uint16_t*>(row) + j, &halves, sizeof halves);
      } else {
        store(row + j, e);
      }
    };
    for (int64_t j = 0; j < whole; j += kLanes) {
      const Vec e = exp2_scaled<kHalf>(load(row + j) - top, step);
      sum += e;
      put(j, e);
    }
    if (whole < length) {
      const Vec e = first_lanes(exp2_scaled<kHalf>(load(row + whole) - top, step), length - whole, Vec{});
      sum += e;
      put(whole, e);
    }
    return sum_of_lanes(sum);
  }

  // What the next item reads and writes.
  Ahead ahead(int64_t token, int64_t head, int64_t tokens) const {
    constexpr int64_t kBytes = kHalf ? 2 : 4;
    const int64_t step = job.stride_qkv * kBytes, step_y = job.stride_y * kBytes;
    const char* const row = static_cast<const char*>(job.qkv) + token * step + head * size * kBytes;
    const int64_t part = job.heads * size * kBytes;
    const char* const y = static_cast<const char*>(job.y) + token * step_y + head * size * kBytes;
    const int64_t tiles = panels_of(length, rows_of(kVectors)) * (keys_in.count + values_in.count);
    return {{row, row + part, row + 2 * part, y},
            {step, step, step, step_y},
            size * kBytes,
            tokens,
            panels_of(tokens, tiles)};
  }

  void attend(int64_t from, int64_t to, Ahead* ahead) const {
    const int64_t n = to - from;
    // exp(scale s) = 2^(step |s|): a negative scale turns the queries' signs, so that the largest is the largest.
    const float sign = job.scale < 0 ? -1.0f : 1.0f, step = sign * job.scale * 1.44269504f;
    const Part part = part_of(0);
    for (int64_t i = 0; i < n; ++i) copy_row(part, row_at(0, from + i), sign, queries + i * ld_row());
    product<Kind>(n, queries, ld_row(), keys, keys_in, size_words, scores, ld_score, ahead);
    float most[kAttentionRows], sums[kAttentionRows];
    for (int64_t i = 0; i < n; ++i) most[i] = largest(scores + i * ld_score);
    for (int64_t i = 0; i < n; ++i) sums[i] = weigh(scores + i * ld_score, most[i], step);
    product<Kind>(n, reinterpret_cast<const uint32_t*>(scores), ld_score, values, values_in, key_words, context,
                  padded_size, ahead);
    for (int64_t i = 0; i < n; ++i) {
      const Vec share = all(1.0f / sums[i]);
      const int64_t out = (start + from + i) * job.stride_y + head * size;
      for (int64_t at = 0; at < size; at += kLanes) {
        store_typed<kHalf, true>(job.y, out + at, load(context + i * padded_size + at) * share, size - at);
      }
    }
  }
};

// What a query row of a sequence costs, in keys it meets: some for its own way in and out, and for a row of keys.
inline int64_t cost_of_row(int64_t length) { return length + 16; }

// Items are blocks of query rows of a (sequence, head), in order; a thread takes those whose cost before them falls
// into its part of the whole.
template <class Kind, bool kHalf>
void forward(const AttentionJob& job, int index, int count) {
  int64_t whole = 0;
  for (int64_t s = 0; s < job.sequences; ++s) {
    const int64_t length = offset(job, s + 1) - offset(job, s);
    whole += length * cost_of_row(length) * job.heads;
  }
  const Share share(whole, index, count);
  char* const scratch = job.scratch + index * job.scratch_bytes;
  int64_t before = 0;
  for (int64_t s = 0; s < job.sequences && before < share.to; ++s) {
    const int64_t start = offset(job, s), length = offset(job, s + 1) - start, row = cost_of_row(length);
    const int64_t first = before, after = before + length * row * job.heads;
    before = after;
    if (length == 0 || after <= share.from) continue;
    const int64_t blocks = panels_of(length, kAttentionRows);
    for (int64_t head = 0; head < job.heads; ++head) {
      const Head<Kind, kHalf> item(job, start, length, head, scratch);
      // The same rows of the next head, or those of the next sequence's first.
      const bool is_last = head + 1 == job.heads, is_end = is_last && s + 1 == job.sequences;
      const int64_t next = is_end ? 0 : is_last ? offset(job, s + 2) - offset(job, s + 1) : length;
      Ahead ahead = item.ahead(is_last ? start + length : start, is_last ? 0 : head + 1, next);
      bool is_ready = false;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = length * block / blocks, to = length * (block + 1) / blocks;
        const int64_t at = first + (head * length + from) * row;
        if (at < share.from || at >= share.to) continue;
        if (!is_ready) item.turn_keys(), item.copy_values();
        is_ready = true;
        item.attend(from, to, &ahead);
      }
    }
  }
}

}  // namespace
}  // namespace ctxfast
