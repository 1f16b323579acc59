// SPDX-License-Identifier: Apache-2.0
// attention on vector registers, backward: float32 throughout, whatever the rows are stored in.
//
// With P = softmax(scale Q K^T), its kept and scaled weights P' = dropout(P), and dP' = dY V^T:
//   dV = P'^T dY,  dS = scale P (dropout(dP') - the rows' sums of P' dP'),  dQ = dS K,  dK = dS^T Q.
// dS without the scale is the relative bias's gradient, summed over diagonals. Rotated queries and keys have rotated
// gradients, which are turned back. Nothing is saved by the forward: scores are recomputed for some query rows at a
// time. One thread does all of a (sequence, head of keys), so that sums over queries have one order.
#pragma once

#include "attention/forward.h"

namespace ctxfast {
namespace {

template <bool kBf16>
struct HeadBackward {
  const Head<Float32, kBf16> item;  // its layout and its workspace; `values` holds keys as they are
  const AttentionJob& job;
  const int64_t most, ld;  // query rows at a time; floats of a row of head_dim
  uint32_t *values_transposed, *d_rows, *query_panels, *d_panels;
  float *d_keys, *d_values, *d_scores, *diagonals;

  HeadBackward(const AttentionJob& job, int64_t sequence, int64_t start, int64_t length, int64_t head, char* scratch)
      : item(job, sequence, start, length, head, scratch),
        job(job),
        most(min(kAttentionRows, length)),
        ld(item.padded_size) {
    const int64_t padded = ceil_div(length, kAttentionPad) * kAttentionPad;
    // Draws are there whether they are used or not.
    values_transposed = reinterpret_cast<uint32_t*>(item.draws) + most * draws_of_row(length) / 2;
    d_keys = reinterpret_cast<float*>(values_transposed + padded * ld);
    d_values = d_keys + padded * ld;
    d_rows = reinterpret_cast<uint32_t*>(d_values + padded * ld);
    query_panels = d_rows + most * ld;
    d_panels = query_panels + most * ld;
    d_scores = reinterpret_cast<float*>(d_panels + most * ld);
    diagonals = d_scores + most * item.ld_score;
  }

  // The first and the last of the query heads that share keys and values.
  void run(bool is_first, bool is_last) const {
    const int64_t length = item.length;
    const bool has_window = job.places.window >= 0;
    if (is_first) prepare();
    // Where not every block of queries meets every key, the first is none to begin sums with.
    if (is_first && has_window) {
      for (float* const sums : {d_keys, d_values}) __builtin_memset(sums, 0, sizeof(float) * length * ld);
    }
    if (job.places.relative_bias) item.spread_bias();
    if (job.diagonals) __builtin_memset(diagonals, 0, sizeof(float) * diagonals_of(length));
    const int64_t blocks = ceil_div(length, kAttentionRows);
    for (int64_t block = 0; block < blocks; ++block) {
      backward_rows(length * block / blocks, length * (block + 1) / blocks, is_first && block == 0 && !has_window);
    }
    if (job.diagonals) {
      float* const to = job.diagonals + 2 * (item.head * job.tokens + item.start);
      __builtin_memcpy(to, diagonals, sizeof(float) * (2 * length - 1));
    }
    if (!is_last) return;
    put(1, 0, length, d_keys);
    put(2, 0, length, d_values);
  }

  void prepare() const {
    const int64_t length = item.length;
    transpose_rows<Float32>(item.part(1), length, item.keys_in, item.size, ld, item.rows, item.keys);
    transpose_rows<Float32>(item.part(2), length, item.keys_in, item.size, ld, item.rows, values_transposed);
    gather_turned_rows(item.part(1), length, reinterpret_cast<uint32_t*>(d_keys), item.values);
  }

  // `gather_rows` of what may be rotated: by way of `rows`, (length, ld).
  void gather_turned_rows(const Part<kBf16>& part, int64_t length, uint32_t* rows, uint32_t* to) const {
    if (!part.angles.table) return gather_rows<Float32>(part, length, item.values_in, to);
    for (int64_t i = 0; i < length; ++i) copy_row<Float32>(part, i, 1.0f, rows + i * ld);
    gather_rows<Float32>(Part<false>{rows, nullptr, 0, ld, 0, item.size}, length, item.values_in, to);
  }

  // Query rows [from, to).
  void backward_rows(int64_t from, int64_t to, bool begins) const {
    const int64_t n = to - from, length = item.length, size = item.size, ld_score = item.ld_score;
    const Span panels = item.panels_met(from, to), met = item.keys_of(panels);
    const int64_t count = met.to - met.from;
    const float sign = job.scale < 0 ? -1.0f : 1.0f, step = sign * job.scale * 1.44269504f;
    const Part<kBf16> queries = item.part(0).rows_from(from);
    const Part<kBf16> d_out = {
        job.gradients.y,        nullptr, (item.start + from) * job.gradients.stride_y + item.head * size,
        job.gradients.stride_y, 0,       size};
    for (int64_t i = 0; i < n; ++i) {
      copy_row<Float32>(queries, i, sign, item.queries + i * ld);
      copy_row<Float32>(d_out, i, 1.0f, d_rows + i * ld);
    }
    gather_turned_rows(queries, n, d_panels, query_panels);
    gather_rows<Float32>(d_out, n, item.values_in, d_panels);
    Ahead none = {};
    const Cut of_keys = {panels, 0, size};
    product<Float32>(n, item.queries, ld, item.keys, item.keys_in, of_keys, size, item.scores, ld_score, &none);
    product<Float32>(n, d_rows, ld, values_transposed, item.keys_in, of_keys, size, d_scores, ld_score, &none);
    if (job.seeds) draw(job.seeds, item.pair, from, to, length, met, item.draws);
    // Of the keys that are met.
    float *const scores = item.scores + met.from, *const d_met = d_scores + met.from;
    for (int64_t i = 0; i < n; ++i) {
      if (item.has_places()) item.place_row(from + i, item.scores + i * ld_score, met);
      float *const row = scores + i * ld_score, *const d_row = d_met + i * ld_score;
      const float sum = softmax_weights<Float32, kBf16>(row, count, row_max(row, count), item.step_of(step));
      const uint16_t* const draws = item.draws + i * draws_of_row(length) + met.from;
      float* const diagonal = job.diagonals ? diagonals + (length - 1 - (from + i)) + met.from : nullptr;
      if (diagonal) {
        job.seeds ? weight_gradients<true, true>(row, d_row, count, draws, 1 / sum, diagonal)
                  : weight_gradients<false, true>(row, d_row, count, draws, 1 / sum, diagonal);
      } else {
        job.seeds ? weight_gradients<true, false>(row, d_row, count, draws, 1 / sum, nullptr)
                  : weight_gradients<false, false>(row, d_row, count, draws, 1 / sum, nullptr);
      }
    }
    const uint32_t* const weights = reinterpret_cast<const uint32_t*>(scores);
    const uint32_t* const d_words = reinterpret_cast<const uint32_t*>(d_met);
    float *const d_values_met = d_values + met.from * ld, *const d_keys_met = d_keys + met.from * ld;
    product<Float32, true>(count, weights, ld_score, d_panels, item.values_in, n, d_values_met, ld, &none, begins);
    product<Float32, true>(count, d_words, ld_score, query_panels, item.values_in, n, d_keys_met, ld, &none, begins);
    product<Float32>(n, d_words, ld_score, item.values, item.values_in, {item.values_in.all(), met.from, length}, count,
                     item.context, ld, &none);
    put(0, from, n, item.context);
  }

  // A row of exponentials and of dY V^T becomes one of P' and of dS; kSums: `diagonal` gets it without the scale.
  template <bool kDrops, bool kSums>
  void weight_gradients(float* row, float* d_row, int64_t length, const uint16_t* draws, float share,
                        float* diagonal) const {
    const Vec shares = all(share), grown = all(1 / (1 - dropped_share(job.threshold))), scale = all(job.scale);
    const auto after_dropout = [&](Vec value, int64_t j) {
      return kDrops ? drop(value * grown, draws + j, job.threshold) : value;
    };
    Vec sum = {};
    for (int64_t j = 0; j < length; j += kLanes) {
      const Vec d_weight = after_dropout(load(d_row + j), j);
      sum += load(row + j) * d_weight;
      store(d_row + j, d_weight);
    }
    const Vec mean = all(sum_lanes(sum) * share);
    for (int64_t j = 0; j < length; j += kLanes) {
      const Vec weight = load(row + j) * shares;
      store(row + j, after_dropout(weight, j));
      if constexpr (kSums) store(diagonal + j, load(diagonal + j) + weight * (load(d_row + j) - mean));
      store(d_row + j, scale * weight * (load(d_row + j) - mean));
    }
  }

  // Rows of a gradient to where they belong, turned back.
  void put(int64_t which, int64_t from, int64_t n, float* rows) const {
    const Angles angles = item.part(which).angles;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to = (item.start + from + i) * job.gradients.stride_qkv + item.column_of(which);
      if (angles.table) angles.turn(rows + i * ld, from + i, -1.0f);
      for (int64_t at = 0; at < item.size; at += kLanes) {
        store_typed<kBf16, true>(job.gradients.qkv, to + at, load(rows + i * ld + at), item.size - at);
      }
    }
  }
};

// Items are (sequence, head of keys) pairs, in order; a thread takes those whose cost before them falls into its part.
template <bool kBf16>
void backward(const AttentionJob& job, int index, int count) {
  const Share share(cost_of(job), index, count);
  char* const scratch = job.scratch + index * job.scratch_bytes;
  int64_t before = 0;
  for (int64_t s = 0; s < job.sequences && before < share.to; ++s) {
    const int64_t start = offset(job, s), length = offset(job, s + 1) - start, group = job.heads / job.kv_heads;
    const int64_t cost = length * cost_of_row(job, length) * group;
    for (int64_t kv_head = 0; kv_head < job.kv_heads && length > 0; ++kv_head, before += cost) {
      if (before < share.from || before >= share.to) continue;
      for (int64_t i = 0; i < group; ++i) {
        HeadBackward<kBf16>(job, s, start, length, kv_head * group + i, scratch).run(i == 0, i + 1 == group);
      }
    }
  }
}

}  // namespace
}  // namespace ctxfast
