// SPDX-License-Identifier: Apache-2.0
// The recurrence and its input product, for every kind of product (product.h).
#pragma once

#include "lstm/product.h"

namespace ctxfast {
namespace {

// The caller's time index of step s of row i: the second direction starts at the row's own end.
inline int64_t time_of(const LstmJob& job, int64_t i, int64_t s) { return job.reverse ? job.length[i] - 1 - s : s; }

// Where new h goes apart from the old h that others still read.
template <class Kind>
bool two_buffers(const LstmJob& job) {
  return Kind::kDirect && !job.has_projection;
}

// Initial h and c, and zeros in the caller's arrays past the rows' lengths.
template <class Kind>
void begin(const LstmJob& job, int index, int count) {
  const Share rows(job.batch, index, count);
  for (int64_t i = rows.from; i < rows.to; ++i) {
    const int64_t row = job.row[i];
    float* h = job.h + i * job.ld_h;
    for (int64_t p = 0; p < job.proj_size; ++p) h[p] = job.h_0 ? job.h_0[row * job.proj_size + p] : 0.0f;
    for (int64_t t = job.length[i]; t < job.steps; ++t) {
      fill_zero(job.output + row * job.output_batch + t * job.output_time, job.proj_size);
      if (job.cells) fill_zero(job.cells + (row * job.steps + t) * job.hidden, job.hidden);
      if (job.z) zero_as(job.z, job.z_bf16, (row * job.steps + t) * 4 * job.hidden, 4 * job.hidden);
    }
  }
  const Share panels(ceil_div(job.hidden, kCells), index, count);
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t cell = panel * kCells, there = min(kCells, job.hidden - cell);
    for (int64_t i = 0; i < job.batch; ++i) {
      float* c = job.c + (panel * job.ld_batch + i) * kCells;
      fill_zero(c, kCells);
      for (int64_t j = 0; job.c_0 && j < there; ++j) c[j] = job.c_0[job.row[i] * job.hidden + cell + j];
    }
  }
  // Words past a row's end meet weights of zero, and zero times whatever memory held could be NaN.
  const auto clear = [index, count](uint32_t* words, int64_t size) {
    const Share share(size, index, count);
    fill_zero(reinterpret_cast<float*>(words) + share.from, share.to - share.from);
  };
  if constexpr (!Kind::kDirect) {
    clear(job.h_words, job.ld_batch * job.ld_h_words);
    if (job.has_projection) clear(job.m_words, job.ld_batch * job.ld_m_words);
  }
  clear(job.x_words, (job.chunk_rows + kLstmInputRows) * job.ld_x_words);
}

// h_n and c_n: the state each row stopped with.
template <class Kind>
void finish(const LstmJob& job, int index, int count) {
  const Share rows(job.batch, index, count);
  for (int64_t i = rows.from; i < rows.to; ++i) {
    const int64_t buffer = two_buffers<Kind>(job) ? job.length[i] & 1 : 0;
    const float* h = job.h + (buffer * job.ld_batch + i) * job.ld_h;
    for (int64_t p = 0; p < job.proj_size; ++p) job.h_n[job.row[i] * job.proj_size + p] = h[p];
  }
  const Share panels(ceil_div(job.hidden, kCells), index, count);
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t cell = panel * kCells, there = min(kCells, job.hidden - cell);
    for (int64_t i = 0; i < job.batch; ++i) {
      const float* c = job.c + (panel * job.ld_batch + i) * kCells;
      for (int64_t j = 0; j < there; ++j) job.c_n[job.row[i] * job.hidden + cell + j] = c[j];
    }
  }
}

// The input product of one panel of 16 cells for all rows of the chunk: W_ih x + b.
template <class Kind>
void fill_chunk(const LstmJob& job, int64_t rows, int64_t panel, float* z) {
  const int64_t cell = panel * kCells, there = min(kCells, job.hidden - cell);
  const uint32_t* weight = static_cast<const uint32_t*>(job.weight_input) + panel * panel_size<Kind>(job.input);
  Vec bias[kPanel / kLanes] = {};
  for (int at = 0; job.bias && at < kPanel; at += kLanes) {
    const int64_t j = at % kCells;
    if (j < there) bias[at / kLanes] = load_some(job.bias + at / kCells * job.hidden + cell + j, there - j);
  }
  for (int64_t from = 0; from < rows; from += Kind::kInputRows) {
    const int64_t some = min(Kind::kInputRows, rows - from);
    const uint32_t* after = from + some < rows ? weight : weight + panel_size<Kind>(job.input);
    panel_product<Kind>(some, job.x_words + from * job.ld_x_words, job.ld_x_words, weight, job.input, 0,
                        blocks_of<Kind>(job.input), after, z);
    float* to = job.chunk + (panel * job.chunk_rows + from) * kPanel;
    for (int64_t i = 0; i < some; ++i) {
      const float scale = Kind::kScaled ? job.x_scale[from + i] : 1.0f;
      for (int at = 0; at < kPanel; at += kLanes) {
        const Vec sum = Kind::value(z + i * kPanel + at, weight + at, scale);
        store(to + i * kPanel + at, sum + bias[at / kLanes]);
      }
    }
  }
}

// One step of 16 cells for the first `rows` rows: gates, then c, then m or, without projection, the next h. Row `at` of
// the chunk is the step's first; `after` is the panel whose turn comes next.
template <class Kind>
void step_cells(const LstmJob& job, int64_t s, int64_t rows, int64_t panel, int64_t at, int64_t after, float* z) {
  const int64_t cell = panel * kCells, there = min(kCells, job.hidden - cell);
  const int64_t old = two_buffers<Kind>(job) ? s & 1 : 0, next = two_buffers<Kind>(job) ? 1 - old : 0;
  const uint32_t* weights = static_cast<const uint32_t*>(job.weight_gates);
  const uint32_t* weight = weights + panel * panel_size<Kind>(job.proj_size);
  const float* const chunk = job.chunk + (panel * job.chunk_rows + at) * kPanel;
  for (int64_t i = 0; i < rows; ++i) {  // prefetched while the product runs
    for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(chunk + i * kPanel + gate * kCells);
  }
  panel_product<Kind>(rows, job.h_words + old * job.ld_batch * job.ld_h, job.ld_h_words, weight, job.proj_size, 0,
                      blocks_of<Kind>(job.proj_size), weights + after * panel_size<Kind>(job.proj_size), z);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = job.row[i], t = time_of(job, i, s);
    const float scale = Kind::kScaled ? job.h_scale[i] : 1.0f;
    float* state = job.c + (panel * job.ld_batch + i) * kCells;
    for (int64_t j = 0; j < there; j += kLanes) {
      Vec gate[4];
      for (int g = 0; g < 4; ++g) {
        gate[g] = load_some(chunk + i * kPanel + g * kCells + j, there - j) +
                  Kind::value(z + i * kPanel + g * kCells + j, weight + g * kCells + j, scale);
      }
      for (int g = 0; job.z && g < 4; ++g) {
        store_as(job.z, job.z_bf16, ((row * job.steps + t) * 4 + g) * job.hidden + cell + j, gate[g], there - j);
      }
      const Vec entered = sigmoid_tanh(gate[0], gate[2]);
      Vec c = sigmoid(gate[1]) * load(state + j) + entered;
      c = clipped(c, job.cell_clip);
      store(state + j, c);
      if (job.cells) store_some(job.cells + (row * job.steps + t) * job.hidden + cell + j, c, there - j);
      const Vec m = sigmoid_tanh(gate[3], c);
      if (job.has_projection) {
        store(job.m + i * job.ld_m + cell + j, m);
      } else {
        const Vec h = clipped(m, job.proj_clip);
        store(job.h + (next * job.ld_batch + i) * job.ld_h + cell + j, h);
        store_some(job.output + row * job.output_batch + t * job.output_time + cell + j, h, there - j);
      }
    }
  }
}

// h of one panel of 64 outputs from its finished sums z.
template <class Kind>
void store_h(const LstmJob& job, int64_t s, int64_t i, int64_t panel, const uint32_t* header, const float* z) {
  const int64_t first = panel * kPanel, there = min(kPanel, job.proj_size - first);
  const float scale = Kind::kScaled ? job.m_scale[i] : 1.0f;
  float* output = job.output + job.row[i] * job.output_batch + time_of(job, i, s) * job.output_time + first;
  for (int64_t j = 0; j < there; j += kLanes) {
    const Vec h = clipped(Kind::value(z + j, header + j, scale), job.proj_clip);
    store(job.h + i * job.ld_h + first + j, h);
    store_some(output + j, h, there - j);
  }
}

// The projection of the first `rows` rows. Where panels are fewer than threads, blocks of the sum over cells are dealt
// out, and added up in the same order afterwards.
template <class Kind>
void project(const LstmJob& job, int64_t s, int64_t rows, int index, int count, float* z) {
  const int64_t panels = ceil_div(job.proj_size, kPanel), blocks = blocks_of<Kind>(job.hidden);
  const uint32_t* weight = static_cast<const uint32_t*>(job.weight_proj);
  const int64_t size = panel_size<Kind>(job.hidden);
  if (!job.partial) {
    const Share share(panels, index, count);
    for (int64_t panel = share.from; panel < share.to; ++panel) {
      const uint32_t* w = weight + panel * size;
      panel_product<Kind>(rows, job.m_words, job.ld_m_words, w, job.hidden, 0, blocks, w + size, z);
      for (int64_t i = 0; i < rows; ++i) store_h<Kind>(job, s, i, panel, w, z + i * kPanel);
    }
    return;
  }
  const Share share(panels * blocks, index, count);
  for (int64_t unit = share.from; unit < share.to; ++unit) {
    const int64_t panel = unit / blocks, block = unit % blocks;
    const uint32_t* w = weight + panel * size;
    const uint32_t* after = w + Kind::kHeader + (block + 1) * Kind::kBlock * kPanel;
    panel_product<Kind>(rows, job.m_words, job.ld_m_words, w, job.hidden, block, block + 1, after,
                        job.partial + unit * job.ld_batch * kPanel);
  }
  lstm_barrier(job.barrier, count);
  const Share pieces(panels * rows, index, count);
  for (int64_t piece = pieces.from; piece < pieces.to; ++piece) {
    const int64_t panel = piece / rows, i = piece % rows;
    fill_zero(z, kPanel);
    for (int64_t block = 0; block < blocks; ++block) {
      const float* sums = job.partial + ((panel * blocks + block) * job.ld_batch + i) * kPanel;
      for (int64_t j = 0; j < kPanel; j += kLanes) Kind::add(z + j, sums + j);
    }
    store_h<Kind>(job, s, i, panel, weight + panel * size, z);
  }
}

// Rows of h or m as the words the products read.
template <class Kind>
void prepare_rows(int64_t rows, const float* x, int64_t ld_x, int64_t size, uint32_t* words, int64_t ld_words,
                  float* scale, int index, int count) {
  if constexpr (!Kind::kDirect) {
    const Share share(rows, index, count);
    for (int64_t i = share.from; i < share.to; ++i) Kind::prepare(x + i * ld_x, size, words + i * ld_words, scale + i);
  }
}

// Rows of x of the steps that begin with s as words, one step's after the other's. Returns how many they are.
template <class Kind>
int64_t prepare_chunk(const LstmJob& job, int64_t s, int64_t rows, int index, int count) {
  int64_t all = 0;
  for (int64_t t = s; t < min(s + job.chunk_steps, job.length[0]); ++t) {
    while (job.length[rows - 1] <= t) --rows;
    const Share share(rows, index, count);
    for (int64_t i = share.from; i < share.to; ++i) {
      const float* x = job.x + job.row[i] * job.x_batch + time_of(job, i, t) * job.x_time;
      Kind::prepare(x, job.input, job.x_words + (all + i) * job.ld_x_words, job.x_scale + all + i);
    }
    all += rows;
  }
  return all;
}

template <class Kind>
void forward(const LstmJob& job, int index, int count) {
  Kind::enter();
  float* z = job.scratch + index * (job.ld_batch > kLstmInputRows ? job.ld_batch : kLstmInputRows) * kPanel;
  begin<Kind>(job, index, count);
  lstm_barrier(job.barrier, count);
  const Share panels(ceil_div(job.hidden, kCells), index, count);
  const int64_t steps = job.batch ? job.length[0] : 0;
  int64_t rows = job.batch, at = 0;
  for (int64_t s = 0; s < steps; ++s) {
    while (job.length[rows - 1] <= s) --rows;
    if (s % job.chunk_steps == 0) {
      // The chunk before was read by this thread alone.
      const int64_t chunk = prepare_chunk<Kind>(job, s, rows, index, count);
      lstm_barrier(job.barrier, count);
      for (int64_t panel = panels.from; panel < panels.to; ++panel) fill_chunk<Kind>(job, chunk, panel, z);
      at = 0;
    }
    if (!Kind::kDirect) {
      prepare_rows<Kind>(rows, job.h, job.ld_h, job.proj_size, job.h_words, job.ld_h_words, job.h_scale, index, count);
      lstm_barrier(job.barrier, count);
    }
    // Up and down in turn: the weights read last are still in the cache when the next step begins with them.
    const int64_t turn = s & 1 ? -1 : 1;
    int64_t panel = s & 1 ? panels.to - 1 : panels.from;
    for (int64_t left = panels.to - panels.from; left > 0; --left, panel += turn) {
      step_cells<Kind>(job, s, rows, panel, at, left > 1 ? panel + turn : panel, z);
    }
    at += rows;
    lstm_barrier(job.barrier, count);
    if (!job.has_projection) continue;
    if (!Kind::kDirect) {
      prepare_rows<Kind>(rows, job.m, job.ld_m, job.hidden, job.m_words, job.ld_m_words, job.m_scale, index, count);
      lstm_barrier(job.barrier, count);
    }
    project<Kind>(job, s, rows, index, count, z);
    lstm_barrier(job.barrier, count);
  }
  finish<Kind>(job, index, count);
  // The next direction uses the same memory.
  lstm_barrier(job.barrier, count);
  Kind::leave();
}

}  // namespace
}  // namespace ctxfast
