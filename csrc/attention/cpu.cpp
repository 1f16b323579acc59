// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>

#include "attention/attention.h"
#include "attention/kernels.h"
#include "base/checks.h"
#include "base/parallel.h"
#include "base/workspace.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "attention";
// Multiply-adds that justify a thread: some 3 us.
constexpr int64_t kWorkOfThread = 1 << 18;

struct Call {
  AttentionKernel kernel;
  AttentionJob job;
};

void run(void* context, int index, int count) {
  const Call& call = *static_cast<Call*>(context);
  call.kernel(call.job, index, count);
}

template <class Offset>
Status check_offsets(const char* op, const void* cu_seqlens, int64_t sequences, int64_t tokens, int64_t* longest) {
  const Offset* const offsets = static_cast<const Offset*>(cu_seqlens);
  *longest = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      return invalid(op, "cu_seqlens[" + std::to_string(i + 1) + "]", std::to_string(offsets[i + 1]),
                     "at least " + std::to_string(offsets[i]) + ", where the sequence before begins");
    }
    *longest = std::max<int64_t>(*longest, offsets[i + 1] - offsets[i]);
  }
  if (offsets[0] != 0) return invalid(op, "cu_seqlens[0]", std::to_string(offsets[0]), "0");
  if (offsets[sequences] != tokens) {
    return invalid(op, "the end of cu_seqlens", std::to_string(offsets[sequences]),
                   std::to_string(tokens) + ", the number of tokens");
  }
  return {};
}

int64_t kv_heads_of(const AttentionParams& p) { return p.kv_heads > 0 ? p.kv_heads : p.heads; }

// Elements of a token's row.
int64_t width_of(const AttentionParams& p) { return (p.heads + 2 * kv_heads_of(p)) * p.head_dim; }

Status check(const AttentionPlaces& places, int64_t head_dim, int64_t longest) {
  if (places.relative_bias) {
    CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"places.reach", places.reach, 1, int64_t{1} << 30}}));
  }
  if (!places.rotary) return {};
  if (places.rotated % 2) return invalid(kOp, "places.rotated", std::to_string(places.rotated), "an even number");
  return check_sizes(
      kOp, {{"places.rotated", places.rotated, 2, head_dim}, {"places.positions", places.positions, longest}});
}

// What forward and backward have in common.
Status check(const AttentionParams& p, int64_t* longest) {
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"tokens", p.tokens},
                                            {"sequences", p.sequences},
                                            {"heads", p.heads},
                                            {"kv_heads", p.kv_heads, 0, p.heads},
                                            {"threads", p.threads, 1},
                                            {"head_dim", p.head_dim, 0, kAttentionMaxHeadDim},
                                            {"stride_qkv", p.stride_qkv, width_of(p)}}));
  if (p.kv_heads > 0 && p.heads % p.kv_heads) {
    return invalid(kOp, "kv_heads", std::to_string(p.kv_heads), "a divisor of heads");
  }
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "io_dtype", p.io_dtype, {DType::kFloat32, DType::kBFloat16}));
  if (!(p.dropout_p >= 0 && p.dropout_p < 1)) {
    return invalid(kOp, "dropout_p", std::to_string(p.dropout_p), "0 or more, below 1");
  }
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"seeds", p.seeds, p.dropout_p > 0}, {"cu_seqlens", p.cu_seqlens}}));
  const Status rises = attention_check_offsets(kOp, p.cu_seqlens, p.is_int64, p.sequences, p.tokens, longest);
  if (!rises.ok() || p.tokens * p.heads * p.head_dim == 0) return rises;
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"qkv", p.qkv}}));
  return check(p.places, p.head_dim, *longest);
}

bool is_empty(const AttentionParams& p) { return p.tokens * p.heads * p.head_dim == 0; }

// Bytes of a thread's draws: a row of them for each query row.
int64_t draws_bytes(int64_t longest) {
  return 2 * std::min(kAttentionRows, longest) * round_up(longest, kAttentionDraw);
}

int64_t diagonals_bytes(int64_t longest) { return 4 * (2 * round_up(longest, kAttentionPad) + kAttentionPad); }

// On top of a forward's: values turned, gradients of keys and values, rows and panels of queries and gradients, and
// gradients of scores.
int64_t backward_bytes(int64_t longest, int64_t head_dim) {
  const int64_t keys = round_up(longest, kAttentionPad), size = round_up(head_dim, kAttentionPad);
  const int64_t rows = std::min(kAttentionRows, longest);
  return 4 * (3 * keys * size + 3 * rows * size + rows * (keys + kAttentionPad));
}

// The relative bias's gradient from the diagonals of every sequence, summed in their order; `sums`: work, a row of it.
void sum_diagonals(const AttentionParams& p, const float* diagonals, double* sums) {
  const int64_t most = p.places.reach - 1, columns = 2 * most + 1;
  const auto offset = [&p](int64_t s) {
    return p.is_int64 ? static_cast<const int64_t*>(p.cu_seqlens)[s] : static_cast<const int32_t*>(p.cu_seqlens)[s];
  };
  for (int64_t head = 0; head < p.heads; ++head) {
    std::fill(sums, sums + columns, 0.0);
    for (int64_t s = 0; s < p.sequences; ++s) {
      const int64_t start = offset(s), length = offset(s + 1) - start;
      const float* const own = diagonals + 2 * (head * p.tokens + start);
      for (int64_t d = 0; d < 2 * length - 1; ++d) sums[std::clamp(d - (length - 1), -most, most) + most] += own[d];
    }
    std::copy(sums, sums + columns, p.gradients.relative_bias + head * columns);
  }
}

// `products`: of the size of scores, each D multiply-adds an element.
Status run_kernel(AttentionKernel kernel, const AttentionParams& p, int64_t longest, int64_t bytes_of_thread,
                  int products) {
  Call call = {kernel, {}};
  AttentionJob& job = call.job;
  job.heads = p.heads, job.kv_heads = kv_heads_of(p), job.head_dim = p.head_dim, job.sequences = p.sequences;
  job.is_int64 = p.is_int64, job.cu_seqlens = p.cu_seqlens;
  job.qkv = p.qkv, job.stride_qkv = p.stride_qkv, job.bias = p.bias;
  job.scale = p.scale, job.places = p.places, job.tokens = p.tokens;
  job.places.window = std::min(p.places.window, longest);
  job.y = p.y, job.stride_y = p.stride_y;
  job.threshold = static_cast<int32_t>(std::min(std::lround(p.dropout_p * 65536.0), 65535L));
  job.seeds = job.threshold > 0 ? p.seeds : nullptr;
  job.gradients = p.gradients;
  job.scratch_bytes = bytes_of_thread;
  const int64_t window = job.places.window;
  const int64_t met = window < 0 ? longest : std::min(longest, 2 * window + kAttentionRows);
  // Multiply-adds, in floating point: they may pass 2^63.
  const double work =
      static_cast<double>(p.tokens * p.heads * p.head_dim) * static_cast<double>(products * met) / kWorkOfThread;
  const int64_t threads =
      work < static_cast<double>(p.threads) ? std::max<int64_t>(1, static_cast<int64_t>(work)) : p.threads;
  const bool has_diagonals = p.gradients.qkv && p.gradients.relative_bias && p.places.relative_bias;
  const int64_t of_sums = has_diagonals ? 8 * (2 * p.places.reach - 1) : 0;
  const int64_t of_diagonals = has_diagonals ? 4 * 2 * p.tokens * p.heads : 0;
  const size_t bytes = static_cast<size_t>(threads * job.scratch_bytes + of_sums + of_diagonals);
  job.scratch = static_cast<char*>(workspace(bytes));
  if (!job.scratch) return runtime_error(kOp, "no memory for a workspace of " + std::to_string(bytes) + " bytes.");
  double* const sums = reinterpret_cast<double*>(job.scratch + threads * job.scratch_bytes);
  if (has_diagonals) job.diagonals = reinterpret_cast<float*>(job.scratch + threads * job.scratch_bytes + of_sums);
  if (!run_parallel(threads, run, &call)) return runtime_error(kOp, "no thread could be started.");
  if (has_diagonals) sum_diagonals(p, job.diagonals, sums);
  return {};
}

}  // namespace

Status attention_check_offsets(const char* op, const void* cu_seqlens, bool is_int64, int64_t sequences, int64_t tokens,
                               int64_t* longest) {
  const auto check_these = is_int64 ? check_offsets<int64_t> : check_offsets<int32_t>;
  return check_these(op, cu_seqlens, sequences, tokens, longest);
}

AttentionKernel attention_kernel_for(DType io_dtype, Isa isa) {
  return io_dtype == DType::kBFloat16 ? best_attention_bfloat16(isa) : best_attention_float32(isa);
}

int64_t attention_scratch_bytes(int64_t longest, int64_t head_dim, bool has_relative_bias) {
  const int64_t keys = round_up(longest, kAttentionPad), size = round_up(head_dim, kAttentionPad);
  const int64_t rows = std::min(kAttentionRows, longest);
  // Keys and values; rows that are being turned into columns; queries and context; scores, a line apart; their bias.
  return 4 * (2 * keys * size + kAttentionPad * size + 2 * rows * size + rows * (keys + kAttentionPad)) +
         (has_relative_bias ? diagonals_bytes(longest) : 0);
}

Status attention_forward(const AttentionParams& p) {
  int64_t longest = 0;
  const Status checked = check(p, &longest);
  if (!checked.ok() || is_empty(p)) return checked;
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"y", p.y}}));
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"stride_y", p.stride_y, p.heads * p.head_dim}}));
  const int64_t draws = p.dropout_p > 0 ? draws_bytes(longest) : 0;
  const int64_t bytes =
      round_up(attention_scratch_bytes(longest, p.head_dim, p.places.relative_bias != nullptr) + draws, 64);
  return run_kernel(attention_kernel_for(p.io_dtype, p.isa), p, longest, bytes, 2);
}

Status attention_backward(const AttentionParams& p) {
  int64_t longest = 0;
  const Status checked = check(p, &longest);
  if (!checked.ok() || is_empty(p)) return checked;
  const AttentionGradients& g = p.gradients;
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"gradients.y", g.y}, {"gradients.qkv", g.qkv}}));
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"gradients.stride_y", g.stride_y, p.heads * p.head_dim},
                                            {"gradients.stride_qkv", g.stride_qkv, width_of(p)}}));
  const int64_t bytes = attention_scratch_bytes(longest, p.head_dim, p.places.relative_bias != nullptr) +
                        draws_bytes(longest) + backward_bytes(longest, p.head_dim) +
                        (g.relative_bias ? diagonals_bytes(longest) : 0);
  const AttentionKernel kernel =
      p.io_dtype == DType::kBFloat16 ? best_attention_backward_bfloat16(p.isa) : best_attention_backward_float32(p.isa);
  return run_kernel(kernel, p, longest, round_up(bytes, 64), 5);
}

}  // namespace ctxfast
