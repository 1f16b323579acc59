// SPDX-License-Identifier: Apache-2.0
// attention on vector registers, backward: float32 throughout, whatever the rows are stored in.
//
// With P = softmax(scale Q K^T), its kept and scaled weights P' = dropout(P), and dP' = dY V^T:
//   dV = P'^T dY,  dS = scale P (dropout(dP') - the rows' sums of P' dP'),  dQ = dS K,  dK = dS^T Q.
// Nothing is saved by the forward: scores are recomputed for some query rows at a time. One thread does all of a
// (sequence, head), so that sums over queries have one order.
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
  float *d_keys, *d_values, *d_scores;

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
  }

  void run() const {
    const int64_t length = item.length;
    transpose_rows<Float32>(item.part(1), length, item.keys_in, item.size, ld, item.rows, item.keys);
    transpose_rows<Float32>(item.part(2), length, item.keys_in, item.size, ld, item.rows, values_transposed);
    gather_rows<Float32>(item.part(1), length, item.values_in, item.values);
    const int64_t blocks = ceil_div(length, kAttentionRows);
    for (int64_t block = 0; block < blocks; ++block) {
      backward_rows(length * block / blocks, length * (block + 1) / blocks, block == 0);
    }
    put(1, 0, length, d_keys);
    put(2, 0, length, d_values);
  }

  // Query rows [from, to).
  void backward_rows(int64_t from, int64_t to, bool begins) const {
    const int64_t n = to - from, length = item.length, size = item.size, ld_score = item.ld_score;
    const float sign = job.scale < 0 ? -1.0f : 1.0f, step = sign * job.scale * 1.44269504f;
    const Part<kBf16> queries = item.part(0).rows_from(from);
    const Part<kBf16> d_out = {
        job.gradients.y,        nullptr, (item.start + from) * job.gradients.stride_y + item.head * size,
        job.gradients.stride_y, 0,       size};
    for (int64_t i = 0; i < n; ++i) {
      copy_row<Float32>(queries, queries.row(i), sign, item.queries + i * ld);
      copy_row<Float32>(d_out, d_out.row(i), 1.0f, d_rows + i * ld);
    }
    gather_rows<Float32>(queries, n, item.values_in, query_panels);
    gather_rows<Float32>(d_out, n, item.values_in, d_panels);
    Ahead none = {};
    product<Float32>(n, item.queries, ld, item.keys, item.keys_in, size, item.scores, ld_score, &none);
    product<Float32>(n, d_rows, ld, values_transposed, item.keys_in, size, d_scores, ld_score, &none);
    if (job.seeds) draw(job.seeds, item.pair, from, to, length, item.draws);
    for (int64_t i = 0; i < n; ++i) {
      float* const row = item.scores + i * ld_score;
      const float sum = softmax_weights<Float32, kBf16>(row, length, row_max(row, length), step);
      const uint16_t* const draws = item.draws + i * draws_of_row(length);
      job.seeds ? weight_gradients<true>(row, d_scores + i * ld_score, draws, 1 / sum)
                : weight_gradients<false>(row, d_scores + i * ld_score, draws, 1 / sum);
    }
    const uint32_t* const weights = reinterpret_cast<const uint32_t*>(item.scores);
    const uint32_t* const d_words = reinterpret_cast<const uint32_t*>(d_scores);
    product<Float32, true>(length, weights, ld_score, d_panels, item.values_in, n, d_values, ld, &none, begins);
    product<Float32, true>(length, d_words, ld_score, query_panels, item.values_in, n, d_keys, ld, &none, begins);
    product<Float32>(n, d_words, ld_score, item.values, item.values_in, length, item.context, ld, &none);
    put(0, from, n, item.context);
  }

  // A row of exponentials and of dY V^T becomes one of P' and of dS.
  template <bool kDrops>
  void weight_gradients(float* row, float* d_row, const uint16_t* draws, float share) const {
    const int64_t length = item.length;
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
      store(d_row + j, scale * weight * (load(d_row + j) - mean));
    }
  }

  // Rows of a gradient to where they belong.
  void put(int64_t which, int64_t from, int64_t n, const float* rows) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t to =
          (item.start + from + i) * job.gradients.stride_qkv + (which * job.heads + item.head) * item.size;
      for (int64_t at = 0; at < item.size; at += kLanes) {
        store_typed<kBf16, true>(job.gradients.qkv, to + at, load(rows + i * ld + at), item.size - at);
      }
    }
  }
};

// Items are (sequence, head) pairs, in order; a thread takes those whose cost before them falls into its part.
template <bool kBf16>
void backward(const AttentionJob& job, int index, int count) {
  const Share share(cost_of(job), index, count);
  char* const scratch = job.scratch + index * job.scratch_bytes;
  int64_t before = 0;
  for (int64_t s = 0; s < job.sequences && before < share.to; ++s) {
    const int64_t start = offset(job, s), length = offset(job, s + 1) - start, cost = length * cost_of_row(length);
    for (int64_t head = 0; head < job.heads && length > 0; ++head, before += cost) {
      if (before >= share.from && before < share.to) {
        HeadBackward<kBf16>(job, s, start, length, head, scratch).run();
      }
    }
  }
}

}  // namespace
}  // namespace ctxfast
