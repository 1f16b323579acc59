// SPDX-License-Identifier: Apache-2.0
// lstm on the CPU: checks, packing, memory, threads. The recurrence itself is lstm_body.h.
#include "ctxfast/lstm.h"

#include <algorithm>
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

Status check_shape(const LstmShape& shape) {
  if (shape.hidden < 0) return invalid(kOp, "hidden", std::to_string(shape.hidden), "0 or more");
  if (shape.proj_size < 0) return invalid(kOp, "proj_size", std::to_string(shape.proj_size), "0 or more");
  if (!shape.has_projection && shape.proj_size != shape.hidden) {
    return invalid(kOp, "proj_size", std::to_string(shape.proj_size),
                   "hidden = " + std::to_string(shape.hidden) + ", as there is no projection");
  }
  if (shape.dtype != DType::kFloat32 && shape.dtype != DType::kBFloat16) {
    return invalid(kOp, "dtype", "float16", "float32 or bfloat16");
  }
  return {};
}

Status check_pointer(const char* name, const void* address, int64_t elements) {
  if (address == nullptr && elements > 0) {
    return invalid(kOp, name, "null", "the address of " + std::to_string(elements) + " elements");
  }
  return {};
}

bool is_bf16(const LstmShape& shape) { return shape.dtype == DType::kBFloat16; }

// Words of 4 bytes of a panel with `size` terms per sum.
int64_t panel_words(const LstmShape& shape, int64_t size) {
  return (is_bf16(shape) ? ceil_div(size, 2) : size) * kLstmPanel;
}

int64_t gate_words(const LstmShape& shape) {
  return ceil_div(shape.hidden, kLstmPanelCells) * panel_words(shape, shape.proj_size);
}

int64_t proj_words(const LstmShape& shape) {
  return shape.has_projection ? ceil_div(shape.proj_size, kLstmPanel) * panel_words(shape, shape.hidden) : 0;
}

uint32_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;  // NaN stays NaN
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

// One panel: 64 columns given by their weights' first elements (null: a column of zeros).
void pack_panel(const float* const* columns, int64_t stride, int64_t size, bool bf16, uint32_t* to) {
  for (int64_t k = 0; k < size; k += bf16 ? 2 : 1, to += kLstmPanel) {
    for (int column = 0; column < kLstmPanel; ++column) {
      const float* from = columns[column];
      const float value = from ? from[k * stride] : 0.0f;
      if (bf16) {
        const float next = from && k + 1 < size ? from[(k + 1) * stride] : 0.0f;
        to[column] = bf16_bits(value) | bf16_bits(next) << 16;
      } else {
        std::memcpy(to + column, &value, sizeof value);
      }
    }
  }
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
    CTXFAST_RETURN_IF_ERROR(check_pointer(("gates" + entry).c_str(), p.gates[r], B * T * 4 * H));
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

// Everything one call needs besides the caller's arrays: one allocation, used by one direction after the other.
class Workspace {
 public:
  Workspace(const LstmParams& p, int64_t threads, bool split) : H_(p.shape.hidden), P_(p.shape.proj_size), B_(p.batch) {
    // One cache line more than the rows need: rows 4096 floats apart would all fall into the same cache sets.
    ld_h_ = round_up(P_, kLstmPanel) + 16;
    ld_m_ = round_up(H_, kLstmPanel) + 16;
    h_ = reserve((p.shape.has_projection ? 1 : 2) * B_ * ld_h_);
    m_ = reserve(p.shape.has_projection ? B_ * ld_m_ : 0);
    c_ = reserve(ceil_div(H_, kLstmPanelCells) * B_ * kLstmPanelCells);
    scratch_ = reserve(threads * B_ * kLstmPanel);
    has_partial_ = split;
    partial_ = reserve(split ? ceil_div(H_, kLstmBlock) * ceil_div(P_, kLstmPanel) * B_ * kLstmPanel : 0);
    memory_.reset(static_cast<float*>(std::aligned_alloc(kAlignment, std::max<size_t>(size_ * 4, kAlignment))));
  }

  bool there() const { return memory_ != nullptr; }
  size_t bytes() const { return size_ * 4; }

  void fill(LstmJob* job) const {
    float* base = memory_.get();
    job->h = base + h_;
    job->m = base + m_;
    job->c = base + c_;
    job->scratch = base + scratch_;
    job->partial = has_partial_ ? base + partial_ : nullptr;
    job->ld_h = ld_h_;
    job->ld_m = ld_m_;
  }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  size_t reserve(int64_t floats) {
    const size_t at = size_;
    size_ += static_cast<size_t>(round_up(floats, kAlignment / 4));
    return at;
  }
  int64_t H_, P_, B_, ld_h_, ld_m_;
  size_t size_ = 0, h_, m_, c_, scratch_, partial_;
  bool has_partial_;
  std::unique_ptr<float, Free> memory_;
};

struct Call {
  LstmJob jobs[kLstmMaxDirections];
  int64_t directions;
  void (*run)(const LstmJob&, int, int);
};

void run_call(void* context, int index, int count) {
  const Call& call = *static_cast<Call*>(context);
  for (int64_t r = 0; r < call.directions; ++r) call.run(call.jobs[r], index, count);
}

auto kernel_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return &lstm_run_avx512;
    case Isa::kAvx2:
      return &lstm_run_avx2;
#endif
    default:
      return &lstm_run_generic;
  }
}

}  // namespace

int64_t lstm_packed_bytes(const LstmShape& shape) {
  if (shape.hidden <= 0 || shape.proj_size <= 0) return 0;
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
  const float* columns[kLstmPanel];
  for (int64_t cell = 0; cell < H; cell += kLstmPanelCells, to += panel_words(shape, P)) {
    for (int column = 0; column < kLstmPanel; ++column) {
      const int64_t gate = column / kLstmPanelCells, at = cell + column % kLstmPanelCells;
      columns[column] = at < H ? params.weight_hh + (gate * H + at) * params.weight_hh_strides[0] : nullptr;
    }
    pack_panel(columns, params.weight_hh_strides[1], P, is_bf16(shape), to);
  }
  for (int64_t first = 0; shape.has_projection && first < P; first += kLstmPanel, to += panel_words(shape, H)) {
    for (int column = 0; column < kLstmPanel; ++column) {
      const int64_t at = first + column;
      columns[column] = at < P ? params.weight_proj + at * params.weight_proj_strides[0] : nullptr;
    }
    pack_panel(columns, params.weight_proj_strides[1], H, is_bf16(shape), to);
  }
  return {};
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
  const int64_t threads = std::clamp<int64_t>(work / kWorkPerThread, 1, std::min<int64_t>(p.threads, 1024));
  const bool split = p.shape.has_projection && threads > ceil_div(P, kLstmPanel);
  const Workspace workspace(p, threads, split);
  if (!workspace.there()) {
    return runtime_error(kOp, "no memory for a workspace of " + std::to_string(workspace.bytes()) + " bytes.");
  }

  SpinBarrier barrier;
  Call call;
  call.directions = p.directions;
  call.run = kernel_for(p.isa);
  for (int64_t r = 0; r < p.directions; ++r) {
    LstmJob& job = call.jobs[r];
    job.batch = B, job.steps = T, job.hidden = H, job.proj_size = P;
    job.has_projection = p.shape.has_projection;
    job.bf16 = is_bf16(p.shape);
    job.reverse = r == 1;
    job.cell_clip = p.cell_clip, job.proj_clip = p.proj_clip;
    job.gates = p.gates[r];
    job.gates_batch = p.gates_strides[r][0], job.gates_time = p.gates_strides[r][1];
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
    workspace.fill(&job);
  }
  if (!run_parallel(threads, run_call, &call)) {
    return runtime_error(kOp, std::to_string(threads) + " threads could not be started.");
  }
  return {};
}

}  // namespace ctxfast
