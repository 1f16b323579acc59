// SPDX-License-Identifier: Apache-2.0
// attention on vector registers, forward.
//
// For each (sequence, head): keys are transposed, so that a row holds one term of many keys, and values gathered; then,
// for some query rows at a time, scores, softmax and context.
#pragma once

#include "attention/dropout.h"
#include "attention/kernels.h"
#include "attention/rows.h"

namespace ctxfast {
namespace {

inline int64_t offset(const AttentionJob& job, int64_t i) {
  return job.is_int64 ? static_cast<const int64_t*>(job.cu_seqlens)[i] : static_cast<const int32_t*>(job.cu_seqlens)[i];
}

// Floats of a row with an entry for each diagonal of a sequence's scores, of which vectors from any key on are loaded.
inline int64_t diagonals_of(int64_t length) { return (2 * ceil_div(length, kAttentionPad) + 1) * kAttentionPad; }

// The largest of a row of scores. NaN may be passed over here: it stays in the scores.
inline float row_max(const float* row, int64_t length) {
  const int64_t full = length / kLanes * kLanes;
  Vec most = all(-__builtin_inff());
  for (int64_t j = 0; j < full; j += kLanes) most = max(most, load(row + j));
  if (full < length) most = max(most, first_lanes(load(row + full), length - full, most));
  return max_lane(most);
}

// A row of scores becomes 2^(step (score - largest)), as words, with zeros up to a whole vector; returns the sum.
template <class Kind, bool kBf16>
float softmax_weights(float* row, int64_t length, float largest, float step) {
  const Vec top = all(largest);
  const int64_t full = length / kLanes * kLanes;
  Vec sum = {};
  const auto put = [row](int64_t j, Vec e) {
    if constexpr (Kind::kTerms == 2) {
      // In place: what is written lies before what is still to be read.
      const ShortVec shorts = to_bf16_fast(e);
      __builtin_memcpy(reinterpret_cast<uint16_t*>(row) + j, &shorts, sizeof shorts);
    } else {
      store(row + j, e);
    }
  };
  for (int64_t j = 0; j < full; j += kLanes) {
    const Vec e = exp2_scaled<kBf16>(load(row + j) - top, step);
    sum += e;
    put(j, e);
  }
  if (full < length) {
    const Vec e = first_lanes(exp2_scaled<kBf16>(load(row + full) - top, step), length - full, Vec{});
    sum += e;
    put(full, e);
  }
  return sum_lanes(sum);
}

// One (sequence, head) of a job: addresses, and this thread's workspace. kBf16: qkv, bias and y are bfloat16.
template <class Kind, bool kBf16>
struct Head {
  const AttentionJob& job;
  const int64_t start, length, head, kv_head, pair, size, padded_size;
  const int64_t size_words, key_words;  // words of a sum over head_dim, and over the keys
  const Panels keys_in, values_in;
  const int64_t ld_score;
  uint32_t *keys, *values, *rows, *queries;
  float *context, *scores, *shifts;
  uint16_t* draws;

  Head(const AttentionJob& job, int64_t sequence, int64_t start, int64_t length, int64_t head, char* scratch)
      : job(job),
        start(start),
        length(length),
        head(head),
        kv_head(head / (job.heads / job.kv_heads)),
        pair(sequence * job.heads + head),
        size(job.head_dim),
        padded_size(ceil_div(size, kAttentionPad) * kAttentionPad),
        size_words(ceil_div(size, Kind::kTerms)),
        key_words(ceil_div(length, Kind::kTerms)),
        keys_in(length),
        values_in(size),
        // A line more: rows a power of two apart would share their place in a cache.
        ld_score((ceil_div(length, kAttentionPad) + 1) * kAttentionPad) {
    const int64_t padded = ceil_div(length, kAttentionPad) * kAttentionPad;
    keys = reinterpret_cast<uint32_t*>(scratch);
    values = keys + padded * padded_size;
    rows = values + padded * padded_size;
    queries = rows + kAttentionPad * padded_size;
    const int64_t most = min(kAttentionRows, length);
    context = reinterpret_cast<float*>(queries + most * padded_size);
    scores = context + most * padded_size;
    shifts = scores + most * ld_score;
    draws = reinterpret_cast<uint16_t*>(shifts + (job.places.relative_bias ? diagonals_of(length) : 0));
  }

  // Queries (0), keys (1) or values (2).
  Part<kBf16> part(int64_t which) const {
    const int64_t column = column_of(which);
    const Angles angles = {which < 2 ? job.places.rotary : nullptr, job.places.rotated / 2};
    return {job.qkv, job.bias, start * job.stride_qkv + column, job.stride_qkv, column, size, angles};
  }
  // Where it is in a token's row.
  int64_t column_of(int64_t which) const {
    return (which == 0 ? head : job.heads + (which - 1) * job.kv_heads + kv_head) * size;
  }

  // Words between rows of words.
  int64_t ld_row() const { return padded_size / Kind::kTerms; }

  void prepare() const {
    transpose_rows<Kind>(part(1), length, keys_in, size_words, ld_row(), rows, keys);
    gather_rows<Kind>(part(2), length, values_in, values);
  }

  // The relative bias of the head by diagonal: what a key `length` - 1 places before its query is given comes first.
  void spread_bias() const {
    const int64_t most = job.places.reach - 1;
    const float* const row = job.places.relative_bias + head * (2 * most + 1) + most;
    for (int64_t d = 0; d < diagonals_of(length); ++d) {
      const int64_t distance = d - (length - 1);
      shifts[d] = row[distance < -most ? -most : min(distance, most)];
    }
  }

  // The panels of keys that some of query rows [from, to) meet.
  Span panels_met(int64_t from, int64_t to) const {
    const int64_t window = job.places.window;
    if (window < 0) return keys_in.all();
    return keys_in.spanning(from > window ? from - window : 0, min(length, to + window));
  }
  // Their columns.
  Span keys_of(Span panels) const {
    return {keys_in.first(panels.from) * kLanes, min(length, keys_in.first(panels.to) * kLanes)};
  }

  bool has_places() const { return job.places.relative_bias || job.places.window >= 0; }
  // What a score is multiplied by for a base of 2, once `place_row` has seen it.
  float step_of(float step) const { return job.places.relative_bias ? 1.44269504f : step; }

  // Scores of query i, turned by the scale's sign, are scaled and shifted by the relative bias, and are -infinity
  // outside the window.
  void place_row(int64_t i, float* row, Span keys) const {
    const int64_t window = job.places.window;
    const bool has_bias = job.places.relative_bias;
    const Vec scale = all(job.scale < 0 ? -job.scale : job.scale);
    const float* const shift = shifts + (length - 1 - i);
    WordVec lane;
    for (int l = 0; l < kLanes; ++l) lane[l] = static_cast<uint32_t>(l);
    const IntVec widest = (IntVec)all_words(static_cast<uint32_t>(2 * window));
    for (int64_t j = keys.from; j < keys.to; j += kLanes) {
      Vec score = load(row + j);
      if (has_bias) score = fma(score, scale, load(shift + j));
      if (window >= 0) {
        const IntVec place = (IntVec)(lane + all_words(static_cast<uint32_t>(j - i + window)));
        score = (place >= 0) & (place <= widest) ? score : all(-__builtin_inff());
      }
      store(row + j, score);
    }
  }

  // What the next item reads and writes.
  Ahead ahead(int64_t token, int64_t head, int64_t tokens) const {
    constexpr int64_t kBytes = kBf16 ? 2 : 4;
    const int64_t step = job.stride_qkv * kBytes, step_y = job.stride_y * kBytes;
    const char* const row = static_cast<const char*>(job.qkv) + token * step;
    const int64_t query = head * size * kBytes, key = (job.heads + head / (job.heads / job.kv_heads)) * size * kBytes;
    const char* const y = static_cast<const char*>(job.y) + token * step_y + head * size * kBytes;
    const int64_t tiles = ceil_div(length, rows_of(kVectors)) * (keys_in.count + values_in.count);
    return {{row + query, row + key, row + key + job.kv_heads * size * kBytes, y},
            {step, step, step, step_y},
            size * kBytes,
            tokens,
            ceil_div(tokens, tiles)};
  }

  void attend(int64_t from, int64_t to, Ahead* ahead) const {
    const int64_t n = to - from;
    // exp(scale s) = 2^(step |s|): a negative scale turns the queries' signs, so that the largest is the largest.
    const float sign = job.scale < 0 ? -1.0f : 1.0f, step = sign * job.scale * 1.44269504f;
    const Part<kBf16> asking = part(0);
    for (int64_t i = 0; i < n; ++i) copy_row<Kind>(asking, from + i, sign, queries + i * ld_row());
    const Span panels = panels_met(from, to), met = keys_of(panels);
    const int64_t count = met.to - met.from;
    product<Kind>(n, queries, ld_row(), keys, keys_in, {panels, 0, size_words}, size_words, scores, ld_score, ahead);
    if (has_places()) {
      for (int64_t i = 0; i < n; ++i) place_row(from + i, scores + i * ld_score, met);
    }
    // Of the keys that are met.
    float* const rows = scores + met.from;
    float most[kAttentionRows], sums[kAttentionRows];
    for (int64_t i = 0; i < n; ++i) most[i] = row_max(rows + i * ld_score, count);
    for (int64_t i = 0; i < n; ++i)
      sums[i] = softmax_weights<Kind, kBf16>(rows + i * ld_score, count, most[i], step_of(step));
    if (job.seeds) {
      draw(job.seeds, pair, from, to, length, met, draws);
      for (int64_t i = 0; i < n; ++i) {
        sums[i] *= 1 - dropped_share(job.threshold);
        drop_row<Kind>(rows + i * ld_score, draws + i * draws_of_row(length) + met.from, count, job.threshold);
      }
    }
    product<Kind>(n, reinterpret_cast<const uint32_t*>(rows), ld_score, values, values_in,
                  {values_in.all(), met.from / Kind::kTerms, key_words}, ceil_div(count, Kind::kTerms), context,
                  padded_size, ahead);
    for (int64_t i = 0; i < n; ++i) {
      const Vec share = all(1.0f / sums[i]);
      const int64_t out = (start + from + i) * job.stride_y + head * size;
      for (int64_t at = 0; at < size; at += kLanes) {
        store_typed<kBf16, true>(job.y, out + at, load(context + i * padded_size + at) * share, size - at);
      }
    }
  }
};

// What a query row of a sequence costs, in keys it meets: some for its own way in and out, and for a row of keys.
inline int64_t cost_of_row(const AttentionJob& job, int64_t length) {
  const int64_t window = job.places.window;
  return (window < 0 ? length : min(length, 2 * window + kAttentionRows)) + 16;
}

inline int64_t cost_of(const AttentionJob& job) {
  int64_t cost = 0;
  for (int64_t s = 0; s < job.sequences; ++s) {
    const int64_t length = offset(job, s + 1) - offset(job, s);
    cost += length * cost_of_row(job, length) * job.heads;
  }
  return cost;
}

// Items are blocks of query rows of a (sequence, head), in order; a thread takes those whose cost before them falls
// into its share of the sum.
template <class Kind, bool kBf16>
void forward(const AttentionJob& job, int index, int count) {
  const Share share(cost_of(job), index, count);
  char* const scratch = job.scratch + index * job.scratch_bytes;
  int64_t before = 0;
  for (int64_t s = 0; s < job.sequences && before < share.to; ++s) {
    const int64_t start = offset(job, s), length = offset(job, s + 1) - start, row = cost_of_row(job, length);
    const int64_t first = before, after = before + length * row * job.heads;
    before = after;
    if (length == 0 || after <= share.from) continue;
    const int64_t blocks = ceil_div(length, kAttentionRows);
    int64_t ready = -1;  // the head of keys and values in the workspace
    for (int64_t head = 0; head < job.heads; ++head) {
      const Head<Kind, kBf16> item(job, s, start, length, head, scratch);
      // The same rows of the next head, or those of the next sequence's first.
      const bool is_last = head + 1 == job.heads, is_end = is_last && s + 1 == job.sequences;
      const int64_t next = is_end ? 0 : is_last ? offset(job, s + 2) - offset(job, s + 1) : length;
      Ahead ahead = item.ahead(is_last ? start + length : start, is_last ? 0 : head + 1, next);
      bool is_first = true;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t from = length * block / blocks, to = length * (block + 1) / blocks;
        const int64_t at = first + (head * length + from) * row;
        if (at < share.from || at >= share.to) continue;
        if (item.kv_head != ready) item.prepare();
        if (is_first && job.places.relative_bias) item.spread_bias();
        ready = item.kv_head, is_first = false;
        item.attend(from, to, &ahead);
      }
    }
  }
}

}  // namespace
}  // namespace ctxfast
