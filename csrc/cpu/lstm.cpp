// SPDX-License-Identifier: Apache-2.0
// lstm on the CPU: checks, packing, memory, threads. The recurrence itself is lstm_body.h.
#include "ctxfast/lstm.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "lstm_kernel.h"
#include "parallel.h"

namespace ctxfast {

void lstm_barrier(void* barrier, int count) { static_cast<SpinBarrier*>(barrier)->wait(count); }

namespace {

constexpr const char* kOp = "lstm";
// Below this many multiply-adds a thread and step, meeting at a barrier costs more than the work it saves.
constexpr int64_t kWorkPerThread = 16384;
constexpr size_t kAlignment = 64;

// `terms`: of the longest sum.
Status check_dtype(DType dtype, int64_t terms) {
  if (dtype == DType::kFloat16) return invalid(kOp, "dtype", "float16", "float32, bfloat16 or int8");
  // 255 * 127 * terms must stay below 2^31.
  if (dtype == DType::kInt8 && terms > 65536) {
    return invalid(kOp, "hidden or input size", std::to_string(terms),
                   "at most 65536 for int8, whose sums are 32 bits");
  }
  return {};
}

Status check_shape(const LstmShape& shape) {
  if (shape.hidden < 0) return invalid(kOp, "hidden", std::to_string(shape.hidden), "0 or more");
  if (shape.proj_size < 0) return invalid(kOp, "proj_size", std::to_string(shape.proj_size), "0 or more");
  if (!shape.has_projection && shape.proj_size != shape.hidden) {
    return invalid(kOp, "proj_size", std::to_string(shape.proj_size),
                   "hidden = " + std::to_string(shape.hidden) + ", as there is no projection");
  }
  return check_dtype(shape.dtype, std::max(shape.hidden, shape.proj_size));
}

Status check_input_shape(const LstmInputShape& shape) {
  if (shape.hidden < 0) return invalid(kOp, "hidden", std::to_string(shape.hidden), "0 or more");
  if (shape.input < 0) return invalid(kOp, "input", std::to_string(shape.input), "0 or more");
  return check_dtype(shape.dtype, shape.input);
}

Status check_pointer(const char* name, const void* address, int64_t elements) {
  if (address == nullptr && elements > 0) {
    return invalid(kOp, name, "null", "the address of " + std::to_string(elements) + " elements");
  }
  return {};
}

// Words of a column with `size` terms.
int64_t column_words(DType dtype, int64_t size) {
  if (dtype == DType::kFloat32) return size;
  return round_up(ceil_div(size, dtype == DType::kInt8 ? 4 : 2), kLstmTileWords);
}

int64_t panel_words(DType dtype, int64_t size) {
  return column_words(dtype, size) * kLstmPanel + (dtype == DType::kInt8 ? kLstmInt8Header : 0);
}

int64_t block_words(DType dtype) { return dtype == DType::kFloat32 ? kLstmBlock : kLstmNarrowBlock; }

int64_t gate_words(const LstmShape& shape) {
  return ceil_div(shape.hidden, kLstmPanelCells) * panel_words(shape.dtype, shape.proj_size);
}

int64_t proj_words(const LstmShape& shape) {
  return shape.has_projection ? ceil_div(shape.proj_size, kLstmPanel) * panel_words(shape.dtype, shape.hidden) : 0;
}

uint32_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;  // NaN stays NaN
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

// A column of int8 words, its scale and the sum of its weights. A weight that is no number makes the scale NaN.
void pack_int8_column(const float* from, int64_t stride, int64_t size, uint32_t* header, uint32_t* words) {
  float most = 0;
  bool finite = true;
  for (int64_t k = 0; k < size; ++k) {
    most = std::max(most, std::fabs(from[k * stride]));
    finite = finite && std::isfinite(from[k * stride]);
  }
  const bool there = finite && most > 1e-30f;
  const float scale = there ? most / 127.0f : finite ? 0.0f : NAN, steps = there ? 127.0f / most : 0.0f;
  int32_t sum = 0;
  for (int64_t k = 0; there && k < size; ++k) {
    const int32_t whole = static_cast<int32_t>(std::nearbyint(from[k * stride] * steps));
    sum += whole;
    words[k / 4 * kLstmPanel] |= (static_cast<uint32_t>(whole) & 0xffu) << (8 * (k % 4));
  }
  sum *= 128;
  std::memcpy(header, &scale, sizeof scale);
  std::memcpy(header + kLstmPanel, &sum, sizeof sum);
}

// One panel: 64 columns given by their weights' first elements (null: a column of zeros). Returns where the next goes.
uint32_t* pack_panel(const float* const* columns, int64_t stride, int64_t size, DType dtype, uint32_t* to) {
  uint32_t* const end = to + panel_words(dtype, size);
  std::fill(to, end, 0u);
  uint32_t* const words = dtype == DType::kInt8 ? to + kLstmInt8Header : to;
  for (int column = 0; column < kLstmPanel; ++column) {
    const float* from = columns[column];
    if (from == nullptr) continue;
    if (dtype == DType::kInt8) {
      pack_int8_column(from, stride, size, to + column, words + column);
    } else if (dtype == DType::kBFloat16) {
      for (int64_t k = 0; k < size; ++k) {
        words[k / 2 * kLstmPanel + column] |= bf16_bits(from[k * stride]) << (16 * (k % 2));
      }
    } else {
      for (int64_t k = 0; k < size; ++k) std::memcpy(words + k * kLstmPanel + column, from + k * stride, 4);
    }
  }
  return end;
}

// Panels of 16 cells with their four gates, from a (4H, size) matrix.
uint32_t* pack_gates(const float* weight, const int64_t* strides, int64_t hidden, int64_t size, DType dtype,
                     uint32_t* to) {
  const float* columns[kLstmPanel];
  for (int64_t cell = 0; cell < hidden; cell += kLstmPanelCells) {
    for (int column = 0; column < kLstmPanel; ++column) {
      const int64_t gate = column / kLstmPanelCells, at = cell + column % kLstmPanelCells;
      columns[column] = at < hidden ? weight + (gate * hidden + at) * strides[0] : nullptr;
    }
    to = pack_panel(columns, strides[1], size, dtype, to);
  }
  return to;
}

// Panels of 64 rows of a (count, size) matrix.
uint32_t* pack_rows(const float* weight, const int64_t* strides, int64_t count, int64_t size, DType dtype,
                    uint32_t* to) {
  const float* columns[kLstmPanel];
  for (int64_t first = 0; first < count; first += kLstmPanel) {
    for (int column = 0; column < kLstmPanel; ++column) {
      columns[column] = first + column < count ? weight + (first + column) * strides[0] : nullptr;
    }
    to = pack_panel(columns, strides[1], size, dtype, to);
  }
  return to;
}

// Weights are streamed whole at every step: with 2 MiB pages far fewer address translations miss. Only advice.
void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t from = round_up(reinterpret_cast<uintptr_t>(memory), kHuge);
  const uintptr_t to = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHuge * kHuge;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

#define CTXFAST_RETURN_IF_ERROR(call)                  \
  do {                                                 \
    const Status ctxfast_status_ = (call);             \
    if (!ctxfast_status_.ok()) return ctxfast_status_; \
  } while (0)

Status check(const LstmParams& p) {
  const int64_t H = p.shape.hidden, P = p.shape.proj_size, B = p.batch, T = p.steps, R = p.directions;
  CTXFAST_RETURN_IF_ERROR(check_shape(p.shape));
  if (B < 0) return invalid(kOp, "batch", std::to_string(B), "0 or more");
  if (T < 0) return invalid(kOp, "steps", std::to_string(T), "0 or more");
  if (R < 1 || R > kLstmMaxDirections) return invalid(kOp, "directions", std::to_string(R), "1 or 2");
  if (p.threads < 1) return invalid(kOp, "threads", std::to_string(p.threads), "1 or more");
  if (!(p.cell_clip >= 0)) return invalid(kOp, "cell_clip", std::to_string(p.cell_clip), "above 0, or 0 for none");
  if (!(p.proj_clip >= 0)) return invalid(kOp, "proj_clip", std::to_string(p.proj_clip), "above 0, or 0 for none");
  const int64_t weights = gate_words(p.shape) + proj_words(p.shape);
  for (int64_t r = 0; r < R; ++r) {
    const std::string entry = "[" + std::to_string(r) + "]";
    if (!p.from_x) {
      CTXFAST_RETURN_IF_ERROR(check_pointer(("gates" + entry).c_str(), p.gates[r], B * T * 4 * H));
    } else {
      const LstmInputShape shape = {H, p.input, p.shape.dtype};
      CTXFAST_RETURN_IF_ERROR(check_input_shape(shape));
      CTXFAST_RETURN_IF_ERROR(check_pointer(("x" + entry).c_str(), p.x[r], B * T * p.input));
      CTXFAST_RETURN_IF_ERROR(
          check_pointer(("packed_input" + entry).c_str(), p.packed_input[r], lstm_input_packed_bytes(shape)));
    }
    CTXFAST_RETURN_IF_ERROR(check_pointer(("packed" + entry).c_str(), p.packed[r], weights));
    if (reinterpret_cast<uintptr_t>(p.packed[r]) % 4 != 0) {
      return invalid(kOp, "packed" + entry, "at an address that is no multiple of 4", "4-byte alignment");
    }
  }
  CTXFAST_RETURN_IF_ERROR(check_pointer("output", p.output, B * T * R * P));
  CTXFAST_RETURN_IF_ERROR(check_pointer("h_n", p.h_n, R * B * P));
  CTXFAST_RETURN_IF_ERROR(check_pointer("c_n", p.c_n, R * B * H));
  for (int64_t b = 0; p.lengths && b < B; ++b) {
    if (p.lengths[b] < 0 || p.lengths[b] > T) {
      return invalid(kOp, "lengths[" + std::to_string(b) + "]", std::to_string(p.lengths[b]),
                     "0.." + std::to_string(T) + ", the number of steps");
    }
  }
  return {};
}

// One allocation for everything a call needs besides the caller's arrays.
class Workspace {
 public:
  // Floats (or 32-bit words), aligned; returns where they will be.
  size_t reserve(int64_t words) {
    const size_t at = size_;
    size_ += static_cast<size_t>(round_up(words, kAlignment / 4));
    return at;
  }
  Status allocate() {
    memory_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, std::max<size_t>(size_ * 4, kAlignment))));
    if (memory_) return {};
    return runtime_error(kOp, "no memory for a workspace of " + std::to_string(size_ * 4) + " bytes.");
  }
  float* floats(size_t at) const { return memory_.get() + at; }
  uint32_t* words(size_t at) const { return reinterpret_cast<uint32_t*>(memory_.get() + at); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  size_t size_ = 0;
  std::unique_ptr<float, Free> memory_;
};

// The part of a job that lies in the workspace; used by one direction after the other.
Status fill_workspace(const LstmParams& p, int64_t threads, bool split, Workspace* memory, LstmJob* job) {
  const int64_t H = p.shape.hidden, P = p.shape.proj_size;
  const DType dtype = p.shape.dtype;
  const bool projection = p.shape.has_projection, narrow = dtype != DType::kFloat32;
  const int64_t B = round_up(p.batch, kLstmTileRows);
  job->ld_batch = B;
  // One cache line more than the rows need: rows 4096 floats apart would all fall into the same cache sets.
  job->ld_h = round_up(P, kLstmPanel) + 16;
  job->ld_m = round_up(H, kLstmPanel) + 16;
  job->ld_h_words = narrow ? column_words(dtype, P) + 16 : job->ld_h;
  job->ld_m_words = narrow ? column_words(dtype, H) + 16 : job->ld_m;
  const size_t h = memory->reserve((projection || narrow ? 1 : 2) * B * job->ld_h);
  const size_t m = memory->reserve(projection ? B * job->ld_m : 0);
  const size_t c = memory->reserve(ceil_div(H, kLstmPanelCells) * B * kLstmPanelCells);
  const size_t scratch = memory->reserve(threads * std::max<int64_t>(B, kLstmInputRows) * kLstmPanel);
  const int64_t blocks = ceil_div(column_words(dtype, H), block_words(dtype));
  const size_t partial = memory->reserve(split ? blocks * ceil_div(P, kLstmPanel) * B * kLstmPanel : 0);
  const size_t h_words = memory->reserve(narrow ? B * job->ld_h_words : 0);
  const size_t m_words = memory->reserve(narrow && projection ? B * job->ld_m_words : 0);
  const size_t h_scale = memory->reserve(B), m_scale = memory->reserve(B);
  const bool chunks = p.from_x;
  job->chunk_steps = std::clamp<int64_t>(kLstmChunkRows / p.batch, 1, std::max<int64_t>(p.steps, 1));
  job->chunk_rows = job->chunk_steps * p.batch;
  job->ld_x_words = column_words(dtype, p.input) + 16;
  const size_t chunk = memory->reserve(chunks ? ceil_div(H, kLstmPanelCells) * job->chunk_rows * kLstmPanel : 0);
  const size_t x_words = memory->reserve(chunks ? (job->chunk_rows + kLstmInputRows) * job->ld_x_words : 0);
  const size_t x_scale = memory->reserve(job->chunk_rows);
  const Status status = memory->allocate();
  if (!status.ok()) return status;
  job->h = memory->floats(h);
  job->m = memory->floats(m);
  job->c = memory->floats(c);
  job->scratch = memory->floats(scratch);
  job->partial = split ? memory->floats(partial) : nullptr;
  job->h_words = memory->words(narrow ? h_words : h);
  job->m_words = memory->words(narrow ? m_words : m);
  job->h_scale = memory->floats(h_scale);
  job->m_scale = memory->floats(m_scale);
  job->chunk = chunks ? memory->floats(chunk) : nullptr;
  job->x_words = memory->words(x_words);
  job->x_scale = memory->floats(x_scale);
  return {};
}

struct ForwardCall {
  LstmJob jobs[kLstmMaxDirections];
  int64_t directions;
  void (*run)(const LstmJob&, int, int);
};

void run_forward(void* context, int index, int count) {
  const ForwardCall& call = *static_cast<ForwardCall*>(context);
  for (int64_t r = 0; r < call.directions; ++r) call.run(call.jobs[r], index, count);
}

struct InputCall {
  LstmInputJob job;
  void (*run)(const LstmInputJob&, int, int);
};

void run_input(void* context, int index, int count) {
  const InputCall& call = *static_cast<InputCall*>(context);
  call.run(call.job, index, count);
}

// The best kernels that `isa` includes.
const LstmKernels& kernels_for(DType dtype, Isa isa) {
  if (dtype == DType::kFloat32) {
#if CTXFAST_AVX512
    if (isa >= Isa::kAvx512) return lstm_float32_avx512;
#endif
#if CTXFAST_AVX2
    if (isa >= Isa::kAvx2) return lstm_float32_avx2;
#endif
    return lstm_float32_generic;
  }
  if (dtype == DType::kBFloat16) {
#if CTXFAST_AMX
    if (isa >= Isa::kAmx) return lstm_bfloat16_amx;
#endif
#if CTXFAST_AVX512BF16
    if (isa >= Isa::kAvx512Bf16) return lstm_bfloat16_avx512bf16;
#endif
#if CTXFAST_AVX512
    if (isa >= Isa::kAvx512) return lstm_bfloat16_avx512;
#endif
#if CTXFAST_AVX2
    if (isa >= Isa::kAvx2) return lstm_bfloat16_avx2;
#endif
    return lstm_bfloat16_generic;
  }
#if CTXFAST_AMX
  if (isa >= Isa::kAmx) return lstm_int8_amx;
#endif
#if CTXFAST_AVX512VNNI
  if (isa >= Isa::kAvx512Vnni) return lstm_int8_avx512vnni;
#endif
#if CTXFAST_AVXVNNI
  if (isa == Isa::kAvxVnni) return lstm_int8_avxvnni;
#endif
#if CTXFAST_AVX2
  if (isa >= Isa::kAvx2) return lstm_int8_avx2;
#endif
  return lstm_int8_generic;
}

int64_t threads_for(int64_t work, int64_t most) {
  return std::clamp<int64_t>(work / kWorkPerThread, 1, std::min<int64_t>(most, 1024));
}

Status run_on(int64_t threads, void (*body)(void*, int, int), void* call) {
  if (run_parallel(threads, body, call)) return {};
  return runtime_error(kOp, std::to_string(threads) + " threads could not be started.");
}

}  // namespace

int64_t lstm_packed_bytes(const LstmShape& shape) {
  if (shape.hidden < 0 || shape.proj_size < 0) return 0;
  return 4 * (gate_words(shape) + proj_words(shape));
}

Status lstm_pack(const LstmPackParams& params) {
  const LstmShape& shape = params.shape;
  const int64_t H = shape.hidden, P = shape.proj_size;
  CTXFAST_RETURN_IF_ERROR(check_shape(shape));
  CTXFAST_RETURN_IF_ERROR(check_pointer("weight_hh", params.weight_hh, 4 * H * P));
  if (shape.has_projection) CTXFAST_RETURN_IF_ERROR(check_pointer("weight_proj", params.weight_proj, P * H));
  CTXFAST_RETURN_IF_ERROR(check_pointer("packed", params.packed, lstm_packed_bytes(shape)));
  advise_huge_pages(params.packed, lstm_packed_bytes(shape));
  uint32_t* to = static_cast<uint32_t*>(params.packed);
  to = pack_gates(params.weight_hh, params.weight_hh_strides, H, P, shape.dtype, to);
  if (shape.has_projection) pack_rows(params.weight_proj, params.weight_proj_strides, P, H, shape.dtype, to);
  return {};
}

int64_t lstm_input_packed_bytes(const LstmInputShape& shape) {
  if (shape.hidden < 0 || shape.input < 0) return 0;
  return 4 * ceil_div(shape.hidden, kLstmPanelCells) * panel_words(shape.dtype, shape.input);
}

Status lstm_pack_input(const LstmPackInputParams& params) {
  const LstmInputShape& shape = params.shape;
  CTXFAST_RETURN_IF_ERROR(check_input_shape(shape));
  CTXFAST_RETURN_IF_ERROR(check_pointer("weight_ih", params.weight_ih, 4 * shape.hidden * shape.input));
  CTXFAST_RETURN_IF_ERROR(check_pointer("packed", params.packed, lstm_input_packed_bytes(shape)));
  advise_huge_pages(params.packed, lstm_input_packed_bytes(shape));
  pack_gates(params.weight_ih, params.weight_ih_strides, shape.hidden, shape.input, shape.dtype,
             static_cast<uint32_t*>(params.packed));
  return {};
}

Status lstm_input(const LstmInputParams& p) {
  const int64_t H = p.shape.hidden, I = p.shape.input, M = p.rows;
  CTXFAST_RETURN_IF_ERROR(check_input_shape(p.shape));
  if (M < 0) return invalid(kOp, "rows", std::to_string(M), "0 or more");
  if (p.threads < 1) return invalid(kOp, "threads", std::to_string(p.threads), "1 or more");
  CTXFAST_RETURN_IF_ERROR(check_pointer("x", p.x, M * I));
  CTXFAST_RETURN_IF_ERROR(check_pointer("packed", p.packed, lstm_input_packed_bytes(p.shape)));
  CTXFAST_RETURN_IF_ERROR(check_pointer("gates", p.gates, M * 4 * H));
  if (M == 0 || H == 0) return {};
  const int64_t threads = threads_for(M * 4 * H * I, p.threads);
  InputCall call;
  LstmInputJob& job = call.job;
  job.rows = M, job.input = I, job.hidden = H;
  job.x = p.x, job.ld_x = p.x_stride;
  job.weight = p.packed, job.bias = p.bias, job.gates = p.gates;
  job.ld_words = column_words(p.shape.dtype, I) + 16;
  Workspace memory;
  const size_t scratch = memory.reserve(threads * kLstmInputRows * kLstmPanel);
  const size_t words = memory.reserve((M + kLstmInputRows) * job.ld_words);
  const size_t scale = memory.reserve(M + kLstmInputRows);
  CTXFAST_RETURN_IF_ERROR(memory.allocate());
  job.scratch = memory.floats(scratch);
  job.words = memory.words(words);
  job.scale = memory.floats(scale);
  SpinBarrier barrier;
  job.barrier = &barrier;
  call.run = kernels_for(p.shape.dtype, p.isa).input;
  return run_on(threads, run_input, &call);
}

Status lstm_forward(const LstmParams& p) {
  CTXFAST_RETURN_IF_ERROR(check(p));
  const int64_t H = p.shape.hidden, P = p.shape.proj_size, B = p.batch, T = p.steps;
  if (B == 0) return {};

  std::vector<int64_t> row(B), length(B);
  std::iota(row.begin(), row.end(), int64_t{0});
  if (p.lengths) {
    std::stable_sort(row.begin(), row.end(), [&p](int64_t a, int64_t b) { return p.lengths[a] > p.lengths[b]; });
  }
  for (int64_t i = 0; i < B; ++i) length[i] = p.lengths ? p.lengths[row[i]] : T;

  const int64_t work = B * (4 * H * P + (p.shape.has_projection ? H * P : 0));
  const int64_t threads = threads_for(work, p.threads);
  const bool split = p.shape.has_projection && threads > ceil_div(P, kLstmPanel);
  Workspace memory;
  LstmJob shared;
  CTXFAST_RETURN_IF_ERROR(fill_workspace(p, threads, split, &memory, &shared));

  SpinBarrier barrier;
  ForwardCall call;
  call.directions = p.directions;
  call.run = kernels_for(p.shape.dtype, p.isa).forward;
  for (int64_t r = 0; r < p.directions; ++r) {
    LstmJob& job = call.jobs[r];
    job = shared;
    job.batch = B, job.steps = T, job.hidden = H, job.proj_size = P;
    job.has_projection = p.shape.has_projection;
    job.reverse = r == 1;
    job.cell_clip = p.cell_clip, job.proj_clip = p.proj_clip;
    job.gates = p.gates[r];
    job.gates_batch = p.gates_strides[r][0], job.gates_time = p.gates_strides[r][1];
    job.input = p.input;
    job.x = p.x[r], job.x_batch = p.x_strides[r][0], job.x_time = p.x_strides[r][1];
    job.weight_input = p.packed_input[r], job.bias = p.bias[r];
    job.weight_gates = p.packed[r];
    job.weight_proj = static_cast<const uint32_t*>(p.packed[r]) + gate_words(p.shape);
    job.h_0 = p.h_0 ? p.h_0 + r * B * P : nullptr;
    job.c_0 = p.c_0 ? p.c_0 + r * B * H : nullptr;
    job.output = p.output + r * P;
    job.output_batch = p.output_strides[0], job.output_time = p.output_strides[1];
    job.h_n = p.h_n + r * B * P;
    job.c_n = p.c_n + r * B * H;
    job.cells = p.cells ? p.cells + r * B * T * H : nullptr;
    job.row = row.data(), job.length = length.data();
    job.barrier = &barrier;
  }
  return run_on(threads, run_forward, &call);
}

}  // namespace ctxfast
