// SPDX-License-Identifier: Apache-2.0
// The backward of the recurrence, float32. Per step, last to first:
//   dh = (grad_output + what the step after sent), zero where h was clipped
//   dm = W_proj^T dh                                       panels of 64 cells
//   dz, dc                                                 the same thread, cell by cell
//   W_hh^T dz, sent to the step before                     panels of 64 of P, its long sum dealt out in groups
#pragma once

#include "lstm/product.h"

namespace ctxfast {
namespace {

inline int64_t time_of(const LstmBackwardJob& job, int64_t i, int64_t s) {
  return job.reverse ? job.length[i] - 1 - s : s;
}

// Zero where |bound value| reached `clip`, which is off at 0.
inline Vec open_to(Vec gradient, Vec value, float clip) {
  if (!(clip > 0)) return gradient;
  const Vec magnitude = (Vec)((WordVec)value & 0x7fffffffu);
  return magnitude < all(clip) ? gradient : Vec{};
}

inline void begin(const LstmBackwardJob& job, int index, int count) {
  const int64_t H = job.hidden, P = job.proj_size;
  const Share rows(job.batch, index, count);
  for (int64_t i = rows.from; i < rows.to; ++i) {
    const int64_t row = job.row[i];
    for (int64_t p = 0; p < P; ++p) job.carried[i * job.ld_h + p] = job.grad_h_n[row * P + p];
    for (int64_t t = job.length[i]; t < job.steps; ++t) {
      const int64_t at = row * job.steps + t;
      fill_zero(job.grad_z + at * 4 * H, 4 * H);
      fill_zero(job.grad_hidden + at * P, P);
      if (job.m) fill_zero(job.m + at * H, H);
    }
  }
  const Share panels(ceil_div(H, kPanel), index, count);
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t cell = panel * kPanel, there = min(kPanel, H - cell);
    for (int64_t i = 0; i < job.batch; ++i) {
      float* d_c = job.d_c + (panel * job.batch + i) * kPanel;
      fill_zero(d_c, kPanel);
      for (int64_t j = 0; j < there; ++j) d_c[j] = job.grad_c_n[job.row[i] * H + cell + j];
    }
  }
}

// The gradient of the step's h before its clip.
inline void meet(const LstmBackwardJob& job, int64_t s, int64_t rows, int index, int count) {
  const int64_t P = job.proj_size;
  const Share share(rows, index, count);
  for (int64_t i = share.from; i < share.to; ++i) {
    const int64_t row = job.row[i], t = time_of(job, i, s);
    const float* grad = job.grad_output + row * job.grad_batch + t * job.grad_time;
    const float* output = job.output + row * job.output_batch + t * job.output_time;
    float* hidden = job.grad_hidden + (row * job.steps + t) * P;
    for (int64_t p = 0; p < P; p += kLanes) {
      const int64_t there = P - p;
      const Vec sum = load_some(grad + p, there) + load_some(job.carried + i * job.ld_h + p, there);
      const Vec d_h = open_to(sum, load_some(output + p, there), job.proj_clip);
      store(job.d_h + i * job.ld_h + p, d_h);
      store_some(hidden + p, d_h, there);
    }
  }
}

// dz and dc of one panel of 64 cells.
template <class Kind>
void step_cells(const LstmBackwardJob& job, int64_t s, int64_t rows, int64_t panel, float* d_m) {
  const int64_t H = job.hidden, P = job.proj_size, cell = panel * kPanel, width = min(kPanel, H - cell);
  if (job.has_projection) {
    const uint32_t* weight = static_cast<const uint32_t*>(job.weight_proj) + panel * panel_size<Kind>(P);
    panel_product<Kind>(rows, reinterpret_cast<const uint32_t*>(job.d_h), job.ld_h, weight, P, 0, blocks_of<Kind>(P),
                        weight + panel_size<Kind>(P), d_m);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = job.row[i], at = row * job.steps + time_of(job, i, s);
    const int64_t before = row * job.steps + (s > 0 ? time_of(job, i, s - 1) : 0);
    const float* c_before = s > 0 ? job.cells + before * H : job.c_0 ? job.c_0 + row * H : nullptr;
    const float* z = job.z + at * 4 * H + cell;
    float* grad = job.grad_z + at * 4 * H + cell;
    float* copy = job.d_z + i * job.ld_z + cell;
    float* carried = job.d_c + (panel * job.batch + i) * kPanel;
    for (int64_t j = 0; j < width; j += kLanes) {
      const int64_t there = width - j;
      const Vec in = sigmoid(load_some(z + j, there)), forget = sigmoid(load_some(z + H + j, there));
      const Vec enter = tanh(load_some(z + 2 * H + j, there)), out = sigmoid(load_some(z + 3 * H + j, there));
      const Vec c = load_some(job.cells + at * H + cell + j, there), bent = tanh(c);
      const Vec before_c = c_before ? load_some(c_before + cell + j, there) : Vec{};
      const Vec dm = job.has_projection ? load(d_m + i * kPanel + j) : load(job.d_h + i * job.ld_h + cell + j);
      const Vec one = all(1.0f);
      const Vec dc = open_to(load(carried + j) + dm * out * (one - bent * bent), c, job.cell_clip);
      const Vec d_gate[4] = {dc * enter * in * (one - in), dc * before_c * forget * (one - forget),
                             dc * in * (one - enter * enter), dm * bent * out * (one - out)};
      for (int gate = 0; gate < 4; ++gate) {
        store_some(grad + gate * H + j, d_gate[gate], there);
        store_some(copy + gate * H + j, d_gate[gate], there);
      }
      store(carried + j, dc * forget);
      if (job.m) store_some(job.m + at * H + cell + j, out * bent, there);
    }
  }
}

// What the step sends to the one before: W_hh^T dz.
template <class Kind>
void send_back(const LstmBackwardJob& job, int64_t rows, int index, int count, float* z) {
  const int64_t terms = 4 * job.hidden, panels = ceil_div(job.proj_size, kPanel), blocks = blocks_of<Kind>(terms);
  const int64_t groups = ceil_div(blocks, kLstmBackwardGroup);
  const Share units(panels * groups, index, count);
  for (int64_t unit = units.from; unit < units.to; ++unit) {
    const int64_t panel = unit / groups, first = unit % groups * kLstmBackwardGroup;
    const uint32_t* weight = static_cast<const uint32_t*>(job.weight_hh) + panel * panel_size<Kind>(terms);
    const int64_t last = min(first + kLstmBackwardGroup, blocks);
    panel_product<Kind>(rows, reinterpret_cast<const uint32_t*>(job.d_z), job.ld_z, weight, terms, first, last,
                        weight + min(last * Kind::kBlock, terms) * kPanel, job.partial + unit * job.batch * kPanel);
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
  begin(job, index, count);
  lstm_barrier(job.barrier, count);
  const Share panels(ceil_div(H, kPanel), index, count);
  int64_t rows = 0;
  for (int64_t s = (job.batch ? job.length[0] : 0) - 1; s >= 0; --s) {
    while (rows < job.batch && job.length[rows] > s) ++rows;
    meet(job, s, rows, index, count);
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
    for (int64_t i = 0; i < job.batch; ++i) {
      const float* d_c = job.d_c + (panel * job.batch + i) * kPanel;
      for (int64_t j = 0; j < there; ++j) job.grad_c_0[job.row[i] * H + cell + j] = d_c[j];
    }
  }
}

}  // namespace
}  // namespace ctxfast
