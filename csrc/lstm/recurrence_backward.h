// SPDX-License-Identifier: Apache-2.0
// The backward of the recurrence. Per step, last to first:
//   dh = (grad_output + what the step after sent), zero where h was clipped
//   dm = W_proj^T dh                                       panels of 64 cells
//   dz, dc                                                 the same thread, cell by cell
//   W_hh^T dz, sent to the step before                     panels of 64 of P, its long sum dealt out in groups
#pragma once

#include "lstm/product.h"

namespace ctxfast {
namespace {

// Whether what is kept of every step is bfloat16, as the products' factors are.
template <class Kind>
constexpr bool kNarrow = !Kind::kDirect;
template <class Kind>
constexpr int64_t kWordTerms = kNarrow<Kind> ? 2 : 1;

inline int64_t time_of(const LstmBackwardJob& job, int64_t i, int64_t s) {
  return job.reverse ? job.length[i] - 1 - s : s;
}

// Zero where |bound value| reached `clip`, which is off at 0.
inline Vec open_to(Vec gradient, Vec value, float clip) {
  if (!(clip > 0)) return gradient;
  const Vec magnitude = (Vec)((WordVec)value & 0x7fffffffu);
  return magnitude < all(clip) ? gradient : Vec{};
}

template <class Kind>
void begin(const LstmBackwardJob& job, int index, int count) {
  constexpr bool narrow = kNarrow<Kind>;
  const int64_t H = job.hidden, P = job.proj_size;
  const Share rows(job.batch, index, count);
  for (int64_t i = rows.from; i < rows.to; ++i) {
    const int64_t row = job.row[i];
    for (int64_t p = 0; p < P; ++p) job.carried[i * job.ld_h + p] = job.grad_h_n[row * P + p];
    for (int64_t t = job.length[i]; t < job.steps; ++t) {
      const int64_t at = row * job.steps + t;
      zero_as(job.grad_z, narrow, at * 4 * H, 4 * H);
      zero_as(job.grad_hidden, narrow, at * P, P);
      if (job.m) zero_as(job.m, narrow, at * H, H);
    }
    // Words past a row's end meet weights of zero, and zero times whatever memory held could be NaN.
    for (int64_t k = 0; k < job.ld_h_words; ++k) job.h_words[i * job.ld_h_words + k] = 0;
    for (int64_t k = 0; k < job.ld_z_words; ++k) job.z_words[i * job.ld_z_words + k] = 0;
  }
  const Share panels(ceil_div(H, kPanel), index, count);
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t cell = panel * kPanel, there = min(kPanel, H - cell);
    fill_zero(job.d_bias + panel * 4 * kPanel, 4 * kPanel);
    for (int64_t i = 0; i < job.batch; ++i) {
      float* d_c = job.d_c + (panel * job.batch + i) * kPanel;
      fill_zero(d_c, kPanel);
      for (int64_t j = 0; j < there; ++j) d_c[j] = job.grad_c_n[job.row[i] * H + cell + j];
    }
  }
}

// The gradient of the step's h before its clip.
template <class Kind>
void meet(const LstmBackwardJob& job, int64_t s, int64_t rows, int index, int count) {
  const int64_t P = job.proj_size;
  const Share share(rows, index, count);
  for (int64_t i = share.from; i < share.to; ++i) {
    const int64_t row = job.row[i], t = time_of(job, i, s);
    const float* grad = job.grad_output + row * job.grad_batch + t * job.grad_time;
    const float* output = job.output + row * job.output_batch + t * job.output_time;
    const int64_t hidden = (row * job.steps + t) * P;
    for (int64_t p = 0; p < P; p += kLanes) {
      const int64_t there = P - p;
      const Vec sum = load_some(grad + p, there) + load_some(job.carried + i * job.ld_h + p, there);
      const Vec d_h = open_to(sum, load_some(output + p, there), job.proj_clip);
      store(job.d_h + i * job.ld_h + p, d_h);
      store_typed<kNarrow<Kind>, true>(job.grad_hidden, hidden + p, d_h, there);
      if (kNarrow<Kind>) store_typed<true, true>(job.h_words + i * job.ld_h_words, p, d_h, kLanes);
    }
  }
}

// dz and dc of one panel of 64 cells.
template <class Kind>
void step_cells(const LstmBackwardJob& job, int64_t s, int64_t rows, int64_t panel, float* d_m) {
  constexpr bool narrow = kNarrow<Kind>;
  const int64_t H = job.hidden, P = job.proj_size, cell = panel * kPanel, width = min(kPanel, H - cell);
  if (job.has_projection) {
    const uint32_t* weight = static_cast<const uint32_t*>(job.weight_proj) + panel * panel_size<Kind>(P);
    panel_product<Kind>(rows, job.h_words, job.ld_h_words, weight, P, 0, blocks_of<Kind>(P),
                        weight + panel_size<Kind>(P), d_m);
  }
  float d_bias[4 * kPanel] = {};  // of this step: two short sums lose less than a long one
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = job.row[i], at = row * job.steps + time_of(job, i, s);
    const int64_t before = row * job.steps + (s > 0 ? time_of(job, i, s - 1) : 0);
    const float* c_before = s > 0 ? job.cells + before * H : job.c_0 ? job.c_0 + row * H : nullptr;
    const int64_t z = at * 4 * H + cell;
    uint32_t* const words = job.z_words + i * job.ld_z_words;
    float* carried = job.d_c + (panel * job.batch + i) * kPanel;
    for (int64_t j = 0; j < width; j += kLanes) {
      const int64_t there = width - j;
      const Vec in = sigmoid(load_typed<narrow>(job.z, z + j, there));
      const Vec forget = sigmoid(load_typed<narrow>(job.z, z + H + j, there));
      const Vec enter = tanh(load_typed<narrow>(job.z, z + 2 * H + j, there));
      const Vec out = sigmoid(load_typed<narrow>(job.z, z + 3 * H + j, there));
      const Vec c = load_some(job.cells + at * H + cell + j, there), bent = tanh(c);
      const Vec before_c = c_before ? load_some(c_before + cell + j, there) : Vec{};
      const Vec dm = job.has_projection ? load(d_m + i * kPanel + j) : load(job.d_h + i * job.ld_h + cell + j);
      const Vec one = all(1.0f);
      const Vec dc = open_to(load(carried + j) + dm * out * (one - bent * bent), c, job.cell_clip);
      const Vec d_gate[4] = {dc * enter * in * (one - in), dc * before_c * forget * (one - forget),
                             dc * in * (one - enter * enter), dm * bent * out * (one - out)};
      for (int gate = 0; gate < 4; ++gate) {
        store_typed<narrow, true>(job.grad_z, z + gate * H + j, d_gate[gate], there);
        store_typed<narrow, true>(words, gate * H + cell + j, d_gate[gate], there);
        float* const sum = d_bias + gate * kPanel + j;
        store(sum, load(sum) + d_gate[gate]);
      }
      store(carried + j, dc * forget);
      if (job.m) store_typed<narrow, true>(job.m, at * H + cell + j, out * bent, there);
    }
  }
  float* const total = job.d_bias + panel * 4 * kPanel;
  for (int j = 0; j < 4 * kPanel; j += kLanes) store(total + j, load(total + j) + load(d_bias + j));
}

// What the step sends to the one before: W_hh^T dz.
template <class Kind>
void send_back(const LstmBackwardJob& job, int64_t rows, int index, int count, float* z) {
  const int64_t terms = 4 * job.hidden, panels = ceil_div(job.proj_size, kPanel), blocks = blocks_of<Kind>(terms);
  constexpr int64_t group_blocks = kLstmBackwardTerms / (kWordTerms<Kind> * Kind::kBlock);
  const int64_t groups = ceil_div(blocks, group_blocks);
  const Share units(panels * groups, index, count);
  for (int64_t unit = units.from; unit < units.to; ++unit) {
    const int64_t panel = unit / groups, first = unit % groups * group_blocks;
    const uint32_t* weight = static_cast<const uint32_t*>(job.weight_hh) + panel * panel_size<Kind>(terms);
    const int64_t last = min(first + group_blocks, blocks);
    panel_product<Kind>(rows, job.z_words, job.ld_z_words, weight, terms, first, last,
                        weight + min(last * Kind::kBlock, Kind::words(terms)) * kPanel,
                        job.partial + unit * job.batch * kPanel);
  }
  lstm_barrier(job.barrier, count);
  const Share pieces(panels * rows, index, count);
  for (int64_t piece = pieces.from; piece < pieces.to; ++piece) {
    const int64_t panel = piece / rows, i = piece % rows, first = panel * kPanel;
    fill_zero(z, kPanel);
    for (int64_t group = 0; group < groups; ++group) {
      const float* sums = job.partial + ((panel * groups + group) * job.batch + i) * kPanel;
      for (int64_t j = 0; j < kPanel; j += kLanes) store(z + j, load(z + j) + load(sums + j));
    }
    const int64_t there = min(kPanel, job.proj_size - first);
    for (int64_t j = 0; j < there; ++j) job.carried[i * job.ld_h + first + j] = z[j];
  }
}

template <class Kind>
void backward(const LstmBackwardJob& job, int index, int count) {
  const int64_t H = job.hidden, P = job.proj_size;
  float* z = job.scratch + index * job.batch * kPanel;
  begin<Kind>(job, index, count);
  lstm_barrier(job.barrier, count);
  const Share panels(ceil_div(H, kPanel), index, count);
  int64_t rows = 0;
  for (int64_t s = (job.batch ? job.length[0] : 0) - 1; s >= 0; --s) {
    while (rows < job.batch && job.length[rows] > s) ++rows;
    meet<Kind>(job, s, rows, index, count);
    lstm_barrier(job.barrier, count);
    for (int64_t panel = panels.from; panel < panels.to; ++panel) step_cells<Kind>(job, s, rows, panel, z);
    lstm_barrier(job.barrier, count);
    send_back<Kind>(job, rows, index, count, z);
    lstm_barrier(job.barrier, count);
  }
  const Share share(job.batch, index, count);
  for (int64_t i = share.from; i < share.to; ++i) {
    for (int64_t p = 0; p < P; ++p) job.grad_h_0[job.row[i] * P + p] = job.carried[i * job.ld_h + p];
  }
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t cell = panel * kPanel, there = min(kPanel, H - cell);
    for (int gate = 0; gate < 4; ++gate) {
      const float* d_bias = job.d_bias + (panel * 4 + gate) * kPanel;
      for (int64_t j = 0; j < there; ++j) job.grad_bias[gate * H + cell + j] = d_bias[j];
    }
    for (int64_t i = 0; i < job.batch; ++i) {
      const float* d_c = job.d_c + (panel * job.batch + i) * kPanel;
      for (int64_t j = 0; j < there; ++j) job.grad_c_0[job.row[i] * H + cell + j] = d_c[j];
    }
  }
}

}  // namespace
}  // namespace ctxfast
