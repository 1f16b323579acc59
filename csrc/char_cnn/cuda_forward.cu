// SPDX-License-Identifier: Apache-2.0
// char_cnn, forward.
//
// Two kernels. 16-bit words on tensor cores: a warp keeps 32 filters as fragments in registers and the words pass by; a
// block's eight warps read the same words from shared memory, where a window's fragment is just rows of the word. All
// else in float32 arithmetic: a block keeps 64 filters in shared memory and each of its warps takes words of its own.
#include <algorithm>

#include "char_cnn/cuda.cuh"

namespace ctxfast {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kBlocks = 2;     // of a multiprocessor at least: registers are shared out for that
constexpr int kPositions = 8;  // windows side by side: rows past a word's end may be read, never used
// More blocks would only load the filters more often: each has some words for every warp in a large batch.
constexpr int64_t kMaxBlocks = 64;
constexpr int kIdOutside = 1;  // trap code

// The kernels' own: sizes the launcher has worked out.
struct Launch {
  CharCnnCudaParams p;
  int32_t stride;           // numbers between a word's characters in shared memory
  int32_t places, numbers;  // 32 numbers further: so many characters and numbers
  int32_t slot;             // numbers between words there
  int32_t words_of_block;   // there at once
  int32_t widest;
};

// Some filters of one width: `first`..`first` + n - 1 of it, at `column` of y.
struct Panel {
  int which, first, column, width, filters;
};

// Panel number `index` of kSize filters each; false if there are fewer.
template <int kSize>
CTXFAST_DEVICE bool find_panel(const CharCnnCudaParams& p, int index, Panel* panel) {
  int column = 0;
  for (int i = 0; i < p.widths; ++i) {
    const int filters = p.filters[i].filters, panels = (filters + kSize - 1) / kSize;
    if (index < panels) {
      *panel = {i, index * kSize, column + index * kSize, p.filters[i].width, filters};
      return true;
    }
    index -= panels, column += filters;
  }
  return false;
}

// A warp puts a word's characters into shared memory, as far as a distinct window may reach. Returns where the run of
// equal characters begins that ends the word.
template <typename T, typename S>
CTXFAST_DEVICE int stage_word(const Launch& l, int64_t word, S* to) {
  const CharCnnCudaParams& p = l.p;
  const int lane = lane_index();
  const int64_t last = character(p, word, p.characters - 1);
  int tail = 0;
  for (int i = lane; i < p.characters; i += 32) {
    const int64_t id = character(p, word, i);
    if (id < 0 || id >= p.vocabulary) trap_with(kIdOutside, static_cast<int>(id));
    if (id != last) tail = i + 1;
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other = shuffle_xor(tail, mask);
    tail = other > tail ? other : tail;
  }
  const int reached = tail + l.widest < p.characters ? tail + l.widest : p.characters;
  // Stepped, not divided: a division by a stride that the compiler does not know takes longer than all the rest. Loads
  // that nothing decides about go out side by side: first ids (of int64 the low half: they were checked above), then
  // rows.
  const int32_t* const ids = static_cast<const int32_t*>(p.ids);
  const int wide = p.is_int64 ? 1 : 0;
#pragma unroll 4
  for (int i = lane, place = lane / l.stride, d = lane % l.stride; i < reached * l.stride; i += 32) {
    const int64_t id = ids[(word * p.characters + place) << wide];
    const T* const row = static_cast<const T*>(p.table) + id * p.size;
    const float value = to_float(row[d < p.size ? d : 0]);
    to[i] = from_float<S>(d < p.size ? value : 0.0f);
    place += l.places, d += l.numbers;
    if (d >= l.stride) d -= l.stride, ++place;
  }
  return tail;
}

// Distinct windows of a word.
CTXFAST_DEVICE int distinct(const CharCnnCudaParams& p, int tail, int width) {
  const int positions = p.characters - width + 1;
  return tail + 1 < positions ? tail + 1 : positions;
}

// The largest sum so far and where its window starts; NaN stays.
struct Best {
  float value = -INFINITY;
  int at = 0;
};

CTXFAST_DEVICE void take(Best& best, float value, int at) {
  if (value > best.value || value != value) best.value = value, best.at = at;
}

template <typename T, bool kWhere>
CTXFAST_DEVICE void finish(const CharCnnCudaParams& p, int64_t word, int column, const Best& best, float bias) {
  const float sum = best.value + bias;
  const int64_t to = word * p.columns + column;
  static_cast<T*>(p.y)[to] = from_float<T>(p.is_tanh ? tanh_exact(sum) : sum < 0.0f ? 0.0f : sum);
  if (kWhere) p.at[to] = best.at;
}

// --- tensor cores

constexpr int kTileFilters = 32;  // of a warp: two products' rows
constexpr int kDepth = 16;        // numbers of a product's terms
constexpr int kMaxChunks = 7;     // products along a window, ELMo's widest: fragments of so many fit in registers
constexpr int kPairs = (kMaxChunks + 1) / 2;

// Element d of character j of one filter.
template <typename T>
CTXFAST_DEVICE uint32_t weight_bits(const CharCnnCudaParams& p, const Panel& panel, int filter, int j, int d) {
  if (panel.first + filter >= panel.filters || d >= p.size) return 0;
  const uint16_t* const from = static_cast<const uint16_t*>(p.filters[panel.which].weight);
  return from[(int64_t{panel.first + filter} * p.size + d) * panel.width + j];
}

// Grid: x any number of blocks, y groups of 8 panels. Shared memory: words_of_block words, then their tails.
template <typename T, bool kWhere>
__global__ void __launch_bounds__(kThreads, kBlocks) char_cnn_tiles_kernel(const __grid_constant__ Launch l) {
  const CharCnnCudaParams& p = l.p;
  T* const words = reinterpret_cast<T*>(shared_memory());
  int* const tails = reinterpret_cast<int*>(words + l.words_of_block * l.slot);
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  Panel panel = {};
  const bool has_panel = find_panel<kTileFilters>(p, block_index_y() * kWarps + warp_index(), &panel);
  const int per_character = (p.size + kDepth - 1) / kDepth, chunks = panel.width * per_character;

  uint32_t a[kMaxChunks][2][4] = {};  // [chunk][16 filters]
  int offsets[kPairs] = {};           // of this lane's row of two chunks' fragments, from the window's start
#pragma unroll
  for (int c = 0; c < kMaxChunks; ++c) {
    if (c >= chunks) continue;
    const int j = c / per_character, base = c % per_character * kDepth;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int filter = 16 * half + g + 8 * (r & 1), d = base + 2 * t + 8 * (r >> 1);
        a[c][half][r] = weight_bits<T>(p, panel, filter, j, d) | weight_bits<T>(p, panel, filter, j, d + 1) << 16;
      }
    }
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    const int c = 2 * pair + lane / 16, used = c < chunks ? c : 0;
    const int j = used / per_character, base = used % per_character * kDepth;
    offsets[pair] = (lane % 8 + j) * l.stride + base + lane / 8 % 2 * 8;
  }
  // This lane writes filter 8 t + g.
  const int own = 8 * t + g;
  const bool writes = has_panel && panel.first + own < panel.filters;
  const float bias = writes ? to_float(static_cast<const T*>(p.filters[panel.which].bias)[panel.first + own]) : 0.0f;

  const int64_t step = int64_t{grid_size()} * l.words_of_block;
  for (int64_t first = int64_t{block_index()} * l.words_of_block; first < p.words; first += step) {
    const int count = static_cast<int>(p.words - first < l.words_of_block ? p.words - first : l.words_of_block);
    block_sync();  // the words before are done with
    for (int i = warp_index(); i < count; i += kWarps) {
      const int tail = stage_word<T>(l, first + i, words + i * l.slot);
      if (lane == 0) tails[i] = tail;
    }
    block_sync();
    if (!has_panel) continue;
    for (int i = 0; i < count; ++i) {
      const T* const x = words + i * l.slot;
      const int windows = distinct(p, tails[i], panel.width);
      Best best[4];  // filters g, g + 8, g + 16, g + 24
      for (int start = 0; start < windows; start += kPositions) {
        float sum[2][4] = {};
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          if (2 * pair >= chunks) continue;
          uint32_t b[4];
          ldmatrix_x4(b, x + start * l.stride + offsets[pair]);
          const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
          mma_16x8x16<T>(sum[0], a[2 * pair][0], low);
          mma_16x8x16<T>(sum[1], a[2 * pair][1], low);
          if (2 * pair + 1 >= kMaxChunks || 2 * pair + 1 >= chunks) continue;
          mma_16x8x16<T>(sum[0], a[(2 * pair + 1) % kMaxChunks][0], high);
          mma_16x8x16<T>(sum[1], a[(2 * pair + 1) % kMaxChunks][1], high);
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const int at = start + 2 * t + (r & 1);
          if (at < windows) take(best[r >> 1], sum[r >> 2][r & 3], at);
        }
      }
      Best mine;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
          const Best other{shuffle_xor(best[r].value, mask), kWhere ? shuffle_xor(best[r].at, mask) : 0};
          const bool is_earlier = kWhere && other.value == best[r].value && other.at < best[r].at;
          if (is_earlier || other.value > best[r].value || other.value != other.value) best[r] = other;
        }
        if (r == t) mine = best[r];
      }
      if (writes) finish<T, kWhere>(p, first + i, panel.column + own, mine, bias);
    }
  }
}

// --- float32 arithmetic

constexpr int kPanelFilters = 64;  // of a block: two a lane

// Grid: x any number of blocks, y panels of 64 filters. Shared memory: the panel as [place in the window][64], then a
// word for each of words_of_block warps.
template <typename T, bool kWhere>
__global__ void __launch_bounds__(kThreads, kBlocks) char_cnn_plain_kernel(const __grid_constant__ Launch l) {
  const CharCnnCudaParams& p = l.p;
  float* const weights = reinterpret_cast<float*>(shared_memory());
  Panel panel = {};
  if (!find_panel<kPanelFilters>(p, block_index_y(), &panel)) return;  // all of the block
  const int terms = panel.width * l.stride, lane = lane_index();
  float* const x = weights + l.widest * l.stride * kPanelFilters + warp_index() * l.slot;
  {
    const T* const from =
        static_cast<const T*>(p.filters[panel.which].weight) + int64_t{panel.first} * p.size * panel.width;
    for (int i = thread_index(); i < terms * kPanelFilters; i += block_size()) {
      const int filter = i % kPanelFilters, k = i / kPanelFilters, j = k / l.stride, d = k % l.stride;
      const bool is_there = panel.first + filter < panel.filters && d < p.size;
      weights[i] = is_there ? to_float(from[(int64_t{filter} * p.size + d) * panel.width + j]) : 0.0f;
    }
  }
  block_sync();
  const float2* const pairs = reinterpret_cast<const float2*>(weights) + lane;
  const int own = panel.first + 2 * lane;
  const T* const biases = static_cast<const T*>(p.filters[panel.which].bias);
  const float bias[2] = {own < panel.filters ? to_float(biases[own]) : 0.0f,
                         own + 1 < panel.filters ? to_float(biases[own + 1]) : 0.0f};

  const int64_t step = int64_t{grid_size()} * l.words_of_block;
  for (int64_t word = int64_t{block_index()} * l.words_of_block + warp_index(); word < p.words; word += step) {
    warp_sync();  // the word before is done with
    const int windows = distinct(p, stage_word<T>(l, word, x), panel.width);
    warp_sync();
    Best best[2];
    for (int start = 0; start < windows; start += kPositions) {
      float sum[kPositions][2] = {};
      const float* const from = x + start * l.stride;
      for (int k = 0; k < terms; k += 4) {
        const float2 w[4] = {pairs[k * 32], pairs[k * 32 + 32], pairs[k * 32 + 64], pairs[k * 32 + 96]};
#pragma unroll
        for (int i = 0; i < kPositions; ++i) {
          const float4 value = *reinterpret_cast<const float4*>(from + i * l.stride + k);
          const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            sum[i][0] = fmaf(values[j], w[j].x, sum[i][0]);
            sum[i][1] = fmaf(values[j], w[j].y, sum[i][1]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kPositions; ++i) {
        if (start + i >= windows) continue;
        take(best[0], sum[i][0], start + i);
        take(best[1], sum[i][1], start + i);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (own + i < panel.filters) finish<T, kWhere>(p, word, panel.column + 2 * lane + i, best[i], bias[i]);
    }
  }
}

// --- launchers

constexpr int64_t kPlainAlign = 4;  // numbers read at once
// Fragments' rows lie an odd number of 16 bytes apart: eight of them in eight different banks.
constexpr int64_t kTilePad = 8;

int64_t tile_stride(int64_t size) { return round_up(size, kDepth) + kTilePad; }
// Bytes of a word, with the rows that windows side by side may read past its end.
int64_t word_bytes(int64_t characters, int64_t stride, int64_t number) {
  return (characters + kPositions - 1) * stride * number;
}

int64_t panels_of(const CharCnnCudaParams& p, int64_t size) {
  int64_t panels = 0;
  for (int i = 0; i < p.widths; ++i) panels += ceil_div(p.filters[i].filters, size);
  return panels;
}

dim3 grid_of(int64_t words, int64_t words_of_block, int64_t rows) {
  return dim3(static_cast<unsigned>(std::min(ceil_div(words, words_of_block), kMaxBlocks)),
              static_cast<unsigned>(rows));
}

bool takes_tiles(const Launch& l) {
  const int64_t chunks = l.widest * ceil_div(l.p.size, kDepth);
  const int64_t bytes = word_bytes(l.p.characters, tile_stride(l.p.size), 2) + 16;
  return chunks <= kMaxChunks && bytes <= kCharCnnCudaSharedBytes;
}

template <typename T>
cudaError_t launch_tiles(Launch l, cudaStream_t stream) {
  l.stride = static_cast<int32_t>(tile_stride(l.p.size));
  l.places = 32 / l.stride, l.numbers = 32 % l.stride;
  const int64_t bytes = word_bytes(l.p.characters, l.stride, 2), fit = kCharCnnCudaSharedBytes / (bytes + 16);
  l.slot = static_cast<int32_t>(bytes / 2);
  l.words_of_block = static_cast<int32_t>(std::min<int64_t>(fit, kWarps));
  const dim3 grid = grid_of(l.p.words, l.words_of_block, ceil_div(panels_of(l.p, kTileFilters), kWarps));
  const LaunchConfig config{grid, kThreads, static_cast<size_t>(l.words_of_block * (bytes + 16))};
  return launch(l.p.at ? char_cnn_tiles_kernel<T, true> : char_cnn_tiles_kernel<T, false>, config, stream, l);
}

template <typename T>
cudaError_t launch_plain(Launch l, cudaStream_t stream) {
  l.stride = static_cast<int32_t>(round_up(l.p.size, kPlainAlign));
  l.places = 32 / l.stride, l.numbers = 32 % l.stride;
  const int64_t bytes = word_bytes(l.p.characters, l.stride, 4), panel = 4 * kPanelFilters * l.widest * l.stride;
  l.slot = static_cast<int32_t>(bytes / 4);
  const int64_t fit = (kCharCnnCudaSharedBytes - panel) / bytes;
  l.words_of_block = static_cast<int32_t>(std::min<int64_t>(fit, kWarps));
  const dim3 grid = grid_of(l.p.words, l.words_of_block, panels_of(l.p, kPanelFilters));
  const LaunchConfig config{grid, static_cast<unsigned>(32 * l.words_of_block),
                            static_cast<size_t>(panel + l.words_of_block * bytes)};
  return launch(l.p.at ? char_cnn_plain_kernel<T, true> : char_cnn_plain_kernel<T, false>, config, stream, l);
}

template <typename T>
cudaError_t launch_half(const Launch& l, cudaStream_t stream) {
  return takes_tiles(l) ? launch_tiles<T>(l, stream) : launch_plain<T>(l, stream);
}

}  // namespace

int64_t char_cnn_cuda_shared_bytes(int64_t characters, int64_t size, int64_t width) {
  const int64_t stride = round_up(size, kPlainAlign);
  return 4 * kPanelFilters * width * stride + word_bytes(characters, stride, 4);
}

Status char_cnn_cuda_forward(const CharCnnCudaParams& p, CUstream_st* stream) {
  const Status checked = check(p, true);
  if (!checked.ok() || p.words == 0 || p.columns == 0) return checked;
  Launch l = {p, 0, 0, 0, 0, 0, 0};
  for (int i = 0; i < p.widths; ++i) l.widest = std::max(l.widest, p.filters[i].width);
  CTXFAST_CUDA_CHECK(kOp, p.dtype == DType::kFloat32   ? launch_plain<float>(l, stream)
                          : p.dtype == DType::kFloat16 ? launch_half<__half>(l, stream)
                                                       : launch_half<__nv_bfloat16>(l, stream));
  return {};
}

}  // namespace ctxfast
