// SPDX-License-Identifier: Apache-2.0
// The recurrence, written once with the compiler's vector types. Each lstm_<isa>.cpp sets the macros below and includes
// this file; it is compiled with that instruction set's flags.
//
//   CTXFAST_LSTM_RUN   name of the function to define
//   CTXFAST_LANES      floats in a vector register: 4, 8 or 16
//   CTXFAST_ROWS       rows of a register tile; CTXFAST_VECTORS x CTXFAST_ROWS accumulators must fit in registers
//   CTXFAST_VECTORS    vectors of a register tile of two rows or more
//   CTXFAST_VECTORS_1  vectors of a register tile of one row
//
// Everything here is in an unnamed namespace and nothing of the standard library is used: a shared inline function
// compiled here could be picked by the linker for code that runs on machines without this instruction set.
#include <cstdint>

#include "lstm_kernel.h"

namespace ctxfast {
namespace {

constexpr int kLanes = CTXFAST_LANES;
constexpr int kCells = kLstmPanelCells;
constexpr int kPanel = kLstmPanel;

typedef float Vec __attribute__((vector_size(4 * CTXFAST_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * CTXFAST_LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * CTXFAST_LANES)));

inline Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
inline WordVec load_words(const uint32_t* from) {
  WordVec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }
inline Vec all(float value) { return value - Vec{}; }  // minus keeps the sign of zero, so nothing is computed
// Both let NaN through, as torch.clamp does.
inline Vec at_least(Vec value, float bound) { return value < all(bound) ? all(bound) : value; }
inline Vec at_most(Vec value, float bound) { return value > all(bound) ? all(bound) : value; }

// Number of elements, `n` at most kLanes, that are there; the rest of a vector is zero or left alone.
inline Vec load_some(const float* from, int64_t n) {
  if (n >= kLanes) return load(from);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = from[i];
  return load(lanes);
}
inline void store_some(float* to, Vec value, int64_t n) {
  if (n >= kLanes) return store(to, value);
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < n; ++i) to[i] = lanes[i];
}

// exp(x) = scale * (1 + p): n = round(x / ln 2), p = exp(x - n ln 2) - 1 by its series, 1.5e-8 off at most.
inline void exp_parts(Vec x, Vec* scale, Vec* p) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits
  const Vec shifted = x * all(1.44269504f) + all(shift);
  const Vec n = shifted - all(shift);
  Vec r = x - n * all(0.693359375f);  // ln 2 in two parts; the first has few bits, so its product is exact
  r = r - n * all(-2.12194440e-4f);
  Vec q = all(1.0f / 5040) * r + all(1.0f / 720);
  q = q * r + all(1.0f / 120);
  q = q * r + all(1.0f / 24);
  q = q * r + all(1.0f / 6);
  q = q * r + all(0.5f);
  *p = r * r * q + r;
  const IntVec exponent = (IntVec)shifted - ((IntVec)all(shift) - 127);
  *scale = (Vec)(exponent << 23);
}

// 1 / (1 + exp(-x)); beyond +-87 it is 1, or 1.6e-38.
inline Vec sigmoid(Vec x) {
  Vec scale, p;
  exp_parts(at_most(at_least(-x, -87.0f), 87.0f), &scale, &p);
  return all(1.0f) / (all(1.0f) + (scale * p + scale));
}

// sign(x) e / (e + 2), e = exp(2|x|) - 1: no digits are lost near zero. 1 in float32 from 9.1 on.
inline Vec tanh(Vec x) {
  const WordVec sign = (WordVec)x & 0x80000000u;
  const Vec magnitude = (Vec)((WordVec)x & 0x7fffffffu);
  Vec scale, p;
  exp_parts(at_most(magnitude, 10.0f) * all(2.0f), &scale, &p);
  const Vec e = scale * p + (scale - all(1.0f));
  return (Vec)((WordVec)(e / (e + all(2.0f))) | sign);
}

// Every `tile` below asks for two cache lines per row of its panel at `ahead`, into L2: what the thread reads next.
inline void fetch(const void* ahead) {
  __builtin_prefetch(ahead, 0, 2);
  __builtin_prefetch(static_cast<const char*>(ahead) + 64, 0, 2);
}

template <int kRows, int kVectors>
inline void add_to(float* z, const Vec (&sum)[kRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      float* to = z + r * kPanel + v * kLanes;
      store(to, load(to) + sum[r][v]);
    }
  }
}

// z[row][column] += sum over k of x[row][k] w[k][column], for kRows rows and kVectors vectors of columns.
// The order of the sum over k is the same for every kRows and kVectors.
template <int kRows, int kVectors>
inline void tile(const float* x, int64_t ld_x, const float* w, int64_t count, const float* ahead, float* z) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < count; ++k, w += kPanel, ahead += kPanel) {
    fetch(ahead);
    Vec weight[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) weight[v] = load(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = all(x[r * ld_x + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] += value * weight[v];
    }
  }
  add_to(z, sum);
}

// The same for bfloat16 weights: a word's low half is k, its high half k + 1.
template <int kRows, int kVectors>
inline void tile(const float* x, int64_t ld_x, const uint32_t* w, int64_t count, const uint32_t* ahead, float* z) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < count; k += 2, w += kPanel, ahead += kPanel) {
    fetch(ahead);
    Vec weight[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) weight[v] = (Vec)(load_words(w + v * kLanes) << 16);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = all(x[r * ld_x + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] += value * weight[v];
    }
    if (k + 1 == count) break;
    // Read again rather than held: the registers are full of sums.
    asm volatile("" ::: "memory");
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) weight[v] = (Vec)(load_words(w + v * kLanes) & 0xffff0000u);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec value = all(x[r * ld_x + k + 1]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[r][v] += value * weight[v];
    }
  }
  add_to(z, sum);
}

template <int kRows, int kVectors, class Weight>
inline void tile_columns(const float* x, int64_t ld_x, const Weight* w, int64_t count, const Weight* ahead, float* z) {
  constexpr int kStep = kVectors * kLanes;
  for (int column = 0; column < kPanel; column += kStep) {
    tile<kRows, kVectors>(x, ld_x, w + column, count, ahead, z + column);
  }
}

template <int kRows, class Weight>
void tile_rows(int rows, const float* x, int64_t ld_x, const Weight* w, int64_t count, const Weight* ahead, float* z) {
  if constexpr (kRows == 1) {
    tile_columns<1, CTXFAST_VECTORS_1>(x, ld_x, w, count, ahead, z);
  } else {
    if (rows == kRows) return tile_columns<kRows, CTXFAST_VECTORS>(x, ld_x, w, count, ahead, z);
    tile_rows<kRows - 1>(rows, x, ld_x, w, count, ahead, z);
  }
}

// z (rows, 64) += one block of a panel; tiles as even as can be (8 rows are 4 + 4, not 6 + 2). `next` is the block
// that follows in memory and in time: the first two tiles fetch half of it each, so that its way from memory is
// hidden behind the arithmetic of this one; a single tile streams well enough without.
template <class Weight>
void block_product(int64_t rows, const float* x, int64_t ld_x, const Weight* w, int64_t count, const Weight* next,
                   float* z) {
  const int64_t tiles = (rows + CTXFAST_ROWS - 1) / CTXFAST_ROWS;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t from = rows * i / tiles, to = rows * (i + 1) / tiles;
    const Weight* ahead = i < 2 ? next + i * (kPanel / 2) : w;
    tile_rows<CTXFAST_ROWS>(static_cast<int>(to - from), x + from * ld_x, ld_x, w, count, ahead, z + from * kPanel);
  }
}

// How many k one word of a panel holds.
template <class Weight>
constexpr int kPerWord = 1;
template <>
constexpr int kPerWord<uint32_t> = 2;

template <class Weight>
int64_t panel_words(int64_t count) {
  return (count + kPerWord<Weight> - 1) / kPerWord<Weight> * kPanel;
}

// z (rows, 64) += x (rows, size) times blocks `first` to `last` of a panel.
template <class Weight>
void panel_product(int64_t rows, const float* x, int64_t ld_x, const Weight* panel, int64_t size, int64_t first,
                   int64_t last, float* z) {
  for (int64_t block = first; block < last; ++block) {
    const int64_t k = block * kLstmBlock;
    const int64_t count = size - k < kLstmBlock ? size - k : kLstmBlock;
    const Weight* w = panel + panel_words<Weight>(k);
    block_product(rows, x + k, ld_x, w, count, w + panel_words<Weight>(count), z);
  }
}

inline int64_t blocks_of(int64_t size) { return (size + kLstmBlock - 1) / kLstmBlock; }
inline int64_t panels_of(int64_t size, int64_t width) { return (size + width - 1) / width; }
inline int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }

// Thread `index` of `count` and its share of [0, n).
struct Share {
  int64_t from, to;
  Share(int64_t n, int index, int count) : from(n * index / count), to(n * (index + 1) / count) {}
};

inline void fill_zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
}

inline Vec clipped(Vec value, float clip) { return clip > 0 ? at_most(at_least(value, -clip), clip) : value; }

// The caller's time index of step s of row i: the second direction starts at the row's own end.
inline int64_t time_of(const LstmJob& job, int64_t i, int64_t s) { return job.reverse ? job.length[i] - 1 - s : s; }

// Initial h and c, and zeros in the caller's arrays past the rows' lengths.
void begin(const LstmJob& job, int index, int count) {
  const Share rows(job.batch, index, count);
  for (int64_t i = rows.from; i < rows.to; ++i) {
    const int64_t row = job.row[i];
    float* h = job.h + i * job.ld_h;
    for (int64_t p = 0; p < job.proj_size; ++p) h[p] = job.h_0 ? job.h_0[row * job.proj_size + p] : 0.0f;
    for (int64_t t = job.length[i]; t < job.steps; ++t) {
      fill_zero(job.output + row * job.output_batch + t * job.output_time, job.proj_size);
      if (job.cells) fill_zero(job.cells + (row * job.steps + t) * job.hidden, job.hidden);
    }
  }
  const Share panels(panels_of(job.hidden, kCells), index, count);
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t cell = panel * kCells, there = less(kCells, job.hidden - cell);
    for (int64_t i = 0; i < job.batch; ++i) {
      float* c = job.c + (panel * job.batch + i) * kCells;
      fill_zero(c, kCells);
      for (int64_t j = 0; job.c_0 && j < there; ++j) c[j] = job.c_0[job.row[i] * job.hidden + cell + j];
    }
  }
}

// h_n and c_n: the state each row stopped with.
void finish(const LstmJob& job, int index, int count) {
  const Share rows(job.batch, index, count);
  for (int64_t i = rows.from; i < rows.to; ++i) {
    const int64_t buffer = job.has_projection ? 0 : job.length[i] & 1;
    const float* h = job.h + (buffer * job.batch + i) * job.ld_h;
    for (int64_t p = 0; p < job.proj_size; ++p) job.h_n[job.row[i] * job.proj_size + p] = h[p];
  }
  const Share panels(panels_of(job.hidden, kCells), index, count);
  for (int64_t panel = panels.from; panel < panels.to; ++panel) {
    const int64_t cell = panel * kCells, there = less(kCells, job.hidden - cell);
    for (int64_t i = 0; i < job.batch; ++i) {
      const float* c = job.c + (panel * job.batch + i) * kCells;
      for (int64_t j = 0; j < there; ++j) job.c_n[job.row[i] * job.hidden + cell + j] = c[j];
    }
  }
}

// One step of 16 cells for the first `rows` rows: gates, then c, then m or, without projection, the next h.
template <class Weight>
void step_cells(const LstmJob& job, int64_t s, int64_t rows, int64_t panel, float* z) {
  const int64_t cell = panel * kCells, there = less(kCells, job.hidden - cell);
  for (int64_t i = 0; i < rows; ++i) {
    const float* gates = job.gates + job.row[i] * job.gates_batch + time_of(job, i, s) * job.gates_time + cell;
    for (int gate = 0; gate < 4; ++gate) {
      for (int64_t j = 0; j < kCells; j += kLanes) {
        store(z + i * kPanel + gate * kCells + j, load_some(gates + gate * job.hidden + j, there - j));
      }
    }
  }
  const int64_t old = job.has_projection ? 0 : s & 1;
  const Weight* weight = static_cast<const Weight*>(job.weight_gates) + panel * panel_words<Weight>(job.proj_size);
  panel_product(rows, job.h + old * job.batch * job.ld_h, job.ld_h, weight, job.proj_size, 0, blocks_of(job.proj_size),
                z);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = job.row[i], t = time_of(job, i, s);
    float* state = job.c + (panel * job.batch + i) * kCells;
    for (int64_t j = 0; j < there; j += kLanes) {
      const float* gate = z + i * kPanel + j;
      const Vec entered = sigmoid(load(gate)) * tanh(load(gate + 2 * kCells));
      Vec c = sigmoid(load(gate + kCells)) * load(state + j) + entered;
      c = clipped(c, job.cell_clip);
      store(state + j, c);
      if (job.cells) store_some(job.cells + (row * job.steps + t) * job.hidden + cell + j, c, there - j);
      const Vec m = sigmoid(load(gate + 3 * kCells)) * tanh(c);
      if (job.has_projection) {
        store(job.m + i * job.ld_m + cell + j, m);
      } else {
        const Vec h = clipped(m, job.proj_clip);
        store(job.h + ((1 - old) * job.batch + i) * job.ld_h + cell + j, h);
        store_some(job.output + row * job.output_batch + t * job.output_time + cell + j, h, there - j);
      }
    }
  }
}

// h of one panel of 64 outputs from its finished sums z.
void store_h(const LstmJob& job, int64_t s, int64_t i, int64_t panel, const float* z) {
  const int64_t first = panel * kPanel, there = less(kPanel, job.proj_size - first);
  float* output = job.output + job.row[i] * job.output_batch + time_of(job, i, s) * job.output_time + first;
  for (int64_t j = 0; j < there; j += kLanes) {
    const Vec h = clipped(load(z + j), job.proj_clip);
    store(job.h + i * job.ld_h + first + j, h);
    store_some(output + j, h, there - j);
  }
}

// The projection of the first `rows` rows. Where panels are fewer than threads, blocks of the sum over cells are dealt
// out, and added up in the same order afterwards.
template <class Weight>
void project(const LstmJob& job, int64_t s, int64_t rows, int index, int count, float* z) {
  const int64_t panels = panels_of(job.proj_size, kPanel), blocks = blocks_of(job.hidden);
  const Weight* weight = static_cast<const Weight*>(job.weight_proj);
  const int64_t panel_size = panel_words<Weight>(job.hidden);
  if (!job.partial) {
    const Share share(panels, index, count);
    for (int64_t panel = share.from; panel < share.to; ++panel) {
      fill_zero(z, rows * kPanel);
      panel_product(rows, job.m, job.ld_m, weight + panel * panel_size, job.hidden, 0, blocks, z);
      for (int64_t i = 0; i < rows; ++i) store_h(job, s, i, panel, z + i * kPanel);
    }
    return;
  }
  const Share share(panels * blocks, index, count);
  for (int64_t unit = share.from; unit < share.to; ++unit) {
    const int64_t panel = unit / blocks, block = unit % blocks;
    float* sums = job.partial + unit * job.batch * kPanel;
    fill_zero(sums, rows * kPanel);
    panel_product(rows, job.m, job.ld_m, weight + panel * panel_size, job.hidden, block, block + 1, sums);
  }
  lstm_barrier(job.barrier, count);
  const Share pieces(panels * rows, index, count);
  for (int64_t piece = pieces.from; piece < pieces.to; ++piece) {
    const int64_t panel = piece / rows, i = piece % rows;
    fill_zero(z, kPanel);
    for (int64_t block = 0; block < blocks; ++block) {
      const float* sums = job.partial + ((panel * blocks + block) * job.batch + i) * kPanel;
      for (int64_t j = 0; j < kPanel; j += kLanes) store(z + j, load(z + j) + load(sums + j));
    }
    store_h(job, s, i, panel, z);
  }
}

template <class Weight>
void run(const LstmJob& job, int index, int count) {
  float* z = job.scratch + index * job.batch * kPanel;
  begin(job, index, count);
  lstm_barrier(job.barrier, count);
  const Share panels(panels_of(job.hidden, kCells), index, count);
  const int64_t steps = job.batch ? job.length[0] : 0;
  int64_t rows = job.batch;
  for (int64_t s = 0; s < steps; ++s) {
    while (job.length[rows - 1] <= s) --rows;
    for (int64_t panel = panels.from; panel < panels.to; ++panel) step_cells<Weight>(job, s, rows, panel, z);
    lstm_barrier(job.barrier, count);
    if (job.has_projection) {
      project<Weight>(job, s, rows, index, count, z);
      lstm_barrier(job.barrier, count);
    }
  }
  finish(job, index, count);
  // The next direction uses the same memory.
  lstm_barrier(job.barrier, count);
}

}  // namespace

void CTXFAST_LSTM_RUN(const LstmJob& job, int index, int count) {
  if (job.bf16) {
    run<uint32_t>(job, index, count);
  } else {
    run<float>(job, index, count);
  }
}

}  // namespace ctxfast
