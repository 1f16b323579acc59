// SPDX-License-Identifier: Apache-2.0
// Words through filters, forward and backward.
//
// sets: generic avx2 avx512
#include "char_cnn/kernels.h"

#include "base/typed_vector.h"

namespace ctxfast {
namespace {

constexpr int kVectors = 2;                   // vectors of filters side by side
constexpr int kRows = kLanes == 16 ? 12 : 6;  // windows side by side: their sums fit in registers
constexpr int64_t kColumns = kVectors * kLanes;
constexpr int64_t kMostWords = 16;  // a thread gathers before it applies the filters
constexpr int64_t kElmoSize = 16;   // of ELMo's characters: known when compiling, addresses cost nothing

// A word as its characters' vectors. From `tail` on, all its characters are the same.
struct Word {
  const float* x;
  int64_t tail, last;  // last: that character
};

// a b + c, rounded once where the instruction set can: elsewhere `fma` would be a call, a hundred times as slow.
inline Vec multiply_add(Vec a, Vec b, Vec c) { return a * b + c; }

inline int64_t id_at(const CharCnnParams& p, int64_t at) {
  return p.is_int64 ? static_cast<const int64_t*>(p.ids)[at] : static_cast<const int32_t*>(p.ids)[at];
}

template <bool kBf16>
inline void gather_row(const CharCnnParams& p, int64_t id, float* to) {
  for (int64_t d = 0; d < p.size; d += kLanes) {
    store_some(to + d, load_typed<kBf16>(p.table, id * p.stride_table + d, p.size - d), p.size - d);
  }
}

// The characters that a distinct window may reach.
inline Word gather(const CharCnnJob& job, int64_t word, float* to) {
  const CharCnnParams& p = *job.params;
  const int64_t first = word * p.characters, last = id_at(p, first + p.characters - 1);
  int64_t tail = p.characters - 1;
  while (tail > 0 && id_at(p, first + tail - 1) == last) --tail;
  const int64_t reached = min(p.characters, tail + job.widest);
  for (int64_t i = 0; i < reached; ++i) {
    if (p.io_dtype == DType::kBFloat16) {
      gather_row<true>(p, id_at(p, first + i), to + i * p.size);
    } else {
      gather_row<false>(p, id_at(p, first + i), to + i * p.size);
    }
  }
  return {to, tail, last};
}

// The largest sum so far and the window it came from; NaN stays.
struct Best {
  Vec value[kVectors];
  IntVec at[kVectors];
};

template <bool kWhere>
inline void take(Best* best, int v, Vec sum, int64_t at) {
  const IntVec is_more = (sum > best->value[v]) | (sum != sum);
  best->value[v] = is_more ? sum : best->value[v];
  if (kWhere) best->at[v] = is_more ? (IntVec)all_words(static_cast<uint32_t>(at)) : best->at[v];
}

// `count` windows, each a character after the one before, the first at `at`. kSize: numbers of a character, 0 if known
// at run time only.
template <int kCount, bool kWhere, int kSize>
inline void some_windows(const float* x, int64_t given_size, const float* w, int64_t terms, int64_t at, Best* best) {
  const int64_t size = kSize > 0 ? kSize : given_size;
  Vec sum[kCount][kVectors] = {};
  for (int64_t k = 0; k < terms; ++k, w += kCharCnnPanel) {
    Vec weight[kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) weight[v] = load(w + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      const Vec value = all(x[i * size + k]);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(value, weight[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) take<kWhere>(best, v, sum[i][v], at + i);
  }
}

template <int kCount, bool kWhere, int kSize>
void up_to_windows(int64_t count, const float* x, int64_t size, const float* w, int64_t terms, int64_t at, Best* best) {
  if constexpr (kCount > 1) {
    if (count < kCount) return up_to_windows<kCount - 1, kWhere, kSize>(count, x, size, w, terms, at, best);
  }
  some_windows<kCount, kWhere, kSize>(x, size, w, terms, at, best);
}

// Blocks as even as can be: 14 windows are 7 + 7, not 12 + 2.
template <bool kWhere, int kSize>
inline void windows(int64_t count, const float* x, int64_t size, const float* w, int64_t terms, Best* best) {
  const int64_t blocks = ceil_div(count, kRows);
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t from = count * i / blocks, to = count * (i + 1) / blocks;
    up_to_windows<kRows, kWhere, kSize>(to - from, x + from * size, size, w, terms, from, best);
  }
}

template <bool kBf16, bool kWhere>
void finish(const CharCnnJob& job, const CharCnnPanel& panel, int64_t offset, int64_t word, const Best& best) {
  const CharCnnParams& p = *job.params;
  for (int v = 0; v < kVectors; ++v) {
    const int64_t from = offset + v * kLanes, n = panel.count - from;
    if (n <= 0) return;
    const int64_t to = word * job.columns + panel.column + from;
    // The largest sum plus the bias is the largest of the sums plus the bias, to the last bit: rounding keeps order.
    const Vec sum = best.value[v] + load_typed<kBf16>(panel.filters->bias, panel.first + from, n);
    store_typed<kBf16, false>(p.y, to, p.is_tanh ? tanh(sum) : sum < all(0.0f) ? all(0.0f) : sum, n);
    if (kWhere) {
      for (int64_t lane = 0; lane < min(n, kLanes); ++lane) p.at[to + lane] = best.at[v][lane];
    }
  }
}

template <bool kBf16, bool kWhere, int kSize>
void panel_of_words(const CharCnnJob& job, const CharCnnPanel& panel, const Word* words, int64_t first, int64_t count) {
  const CharCnnParams& p = *job.params;
  const int64_t positions = p.characters - panel.filters->width + 1, terms = panel.filters->width * p.size;
  for (int64_t offset = 0; offset < min(kCharCnnPanel, panel.count); offset += kColumns) {
    const float* const w = panel.packed + offset;
    // The window of a repeated character is the same in all words that end in it, which most do.
    int64_t repeated = -1;
    Vec of_repeated[kVectors] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Word& word = words[i];
      Best best = {};
      for (int v = 0; v < kVectors; ++v) best.value[v] = all(-__builtin_inff());
      windows<kWhere, kSize>(min(word.tail, positions), word.x, p.size, w, terms, &best);
      if (word.tail < positions) {
        if (word.last != repeated) {
          Best alone = {};
          for (int v = 0; v < kVectors; ++v) alone.value[v] = all(-__builtin_inff());
          some_windows<1, false, kSize>(word.x + word.tail * p.size, p.size, w, terms, 0, &alone);
          for (int v = 0; v < kVectors; ++v) of_repeated[v] = alone.value[v];
          repeated = word.last;
        }
        for (int v = 0; v < kVectors; ++v) take<kWhere>(&best, v, of_repeated[v], word.tail);
      }
      finish<kBf16, kWhere>(job, panel, offset, first + i, best);
    }
  }
}

template <bool kBf16, bool kWhere>
void panels_of_words(const CharCnnJob& job, int64_t from, int64_t to, int64_t first, int64_t last) {
  const CharCnnParams& p = *job.params;
  alignas(64) float x[kCharCnnMaxWord];
  const int64_t length = p.characters * p.size, chunk = min(kMostWords, kCharCnnMaxWord / length);
  for (int64_t begin = from; begin < to; begin += chunk) {
    Word words[kMostWords];
    const int64_t count = min(chunk, to - begin);
    for (int64_t i = 0; i < count; ++i) words[i] = gather(job, begin + i, x + i * length);
    for (int64_t panel = first; panel < last; ++panel) {
      if (p.size == kElmoSize) {
        panel_of_words<kBf16, kWhere, kElmoSize>(job, job.panels[panel], words, begin, count);
      } else {
        panel_of_words<kBf16, kWhere, 0>(job, job.panels[panel], words, begin, count);
      }
    }
  }
}

void forward(const CharCnnJob& job, int64_t from, int64_t to, int64_t first, int64_t last) {
  const bool is_bf16 = job.params->io_dtype == DType::kBFloat16;
  const auto run = job.params->at ? (is_bf16 ? panels_of_words<true, true> : panels_of_words<false, true>)
                                  : (is_bf16 ? panels_of_words<true, false> : panels_of_words<false, false>);
  run(job, from, to, first, last);
}

// to (n) += factor * from (n)
inline void add_scaled(float factor, const float* from, int64_t n, float* to) {
  for (int64_t k = 0; k < n; k += kLanes) {
    store_some(to + k, multiply_add(all(factor), load_some(from + k, n - k), load_some(to + k, n - k)), n - k);
  }
}

// Calls act(filters, number of the filter, its column) for the columns from..to.
template <class Act>
inline void for_filters(const CharCnnJob& job, int64_t from, int64_t to, const Act& act) {
  int64_t first = 0;  // column of the width's first filter
  for (int64_t i = 0; i < job.params->widths; first += job.params->filters[i++].filters) {
    const CharCnnFilters& filters = job.params->filters[i];
    const int64_t last = min(to - first, filters.filters);
    for (int64_t f = from > first ? from - first : 0; f < last; ++f) act(filters, f, first + f);
  }
}

// A filter's gradient reaches the window it was largest in.
void backward_words(const CharCnnJob& job, int64_t from, int64_t to) {
  const CharCnnParams& p = *job.params;
  for (int64_t word = from; word < to; ++word) {
    float* const grad_word = p.grad_words + word * p.characters * p.size;
    fill_zero(grad_word, p.characters * p.size);
    for_filters(job, 0, job.columns, [&](const CharCnnFilters& filters, int64_t f, int64_t column) {
      const int64_t at = word * job.columns + column, terms = filters.width * p.size;
      if (p.grad[at] == 0.0f) return;
      add_scaled(p.grad[at], filters.rows + f * terms, terms, grad_word + p.at[at] * p.size);
    });
  }
}

void backward_filters(const CharCnnJob& job, int64_t from, int64_t to) {
  const CharCnnParams& p = *job.params;
  alignas(64) float x[kCharCnnMaxWord];
  for_filters(job, from, to, [&](const CharCnnFilters& filters, int64_t f, int64_t) {
    fill_zero(filters.grad_rows + f * filters.width * p.size, filters.width * p.size);
    filters.grad_bias[f] = 0.0f;
  });
  for (int64_t word = 0; word < p.words; ++word) {
    gather(job, word, x);
    for_filters(job, from, to, [&](const CharCnnFilters& filters, int64_t f, int64_t column) {
      const int64_t at = word * job.columns + column, terms = filters.width * p.size;
      if (p.grad[at] == 0.0f) return;
      filters.grad_bias[f] += p.grad[at];
      add_scaled(p.grad[at], x + p.at[at] * p.size, terms, filters.grad_rows + f * terms);
    });
  }
}

}  // namespace

CTXFAST_KERNELS(CharCnnKernels, char_cnn) = {&forward, &backward_words, &backward_filters};
}  // namespace ctxfast
