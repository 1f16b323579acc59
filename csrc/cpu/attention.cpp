// SPDX-License-Identifier: Apache-2.0
#include "ctxfast/attention.h"

#include <algorithm>

#include "attention_kernel.h"
#include "parallel.h"
#include "workspace.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "attention";
// Multiply-adds that are worth a thread: some 3 us.
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
Status check_offsets(const char* op, const void* given, int64_t sequences, int64_t tokens, int64_t* longest) {
  const Offset* const offsets = static_cast<const Offset*>(given);
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

Status check(const AttentionParams& p, int64_t* longest) {
  const struct {
    const char* name;
    int64_t value, least;
  } sizes[] = {{"tokens", p.tokens, 0},
               {"sequences", p.sequences, 0},
               {"heads", p.heads, 0},
               {"threads", p.threads, 1},
               {"stride_qkv", p.stride_qkv, 3 * p.heads * p.head_dim},
               {"stride_y", p.stride_y, p.heads * p.head_dim}};
  for (const auto& size : sizes) {
    if (size.value < size.least) {
      return invalid(kOp, size.name, std::to_string(size.value), std::to_string(size.least) + " or more");
    }
  }
  if (p.head_dim < 0 || p.head_dim > kAttentionMaxHeadDim) {
    return invalid(kOp, "head_dim", std::to_string(p.head_dim), "0.." + std::to_string(kAttentionMaxHeadDim));
  }
  if (p.type != DType::kFloat32 && p.type != DType::kBFloat16) {
    return invalid(kOp, "type", "another", "float32 or bfloat16");
  }
  if (!p.cu_seqlens) return invalid(kOp, "cu_seqlens", "null", "an address");
  const Status rises = attention_check_offsets(kOp, p.cu_seqlens, p.is_int64, p.sequences, p.tokens, longest);
  if (!rises.ok() || p.tokens * p.heads * p.head_dim == 0) return rises;
  if (!p.qkv) return invalid(kOp, "qkv", "null", "an address");
  if (!p.y) return invalid(kOp, "y", "null", "an address");
  return {};
}

// Multiply-adds of the call, in floating point: they may pass 2^63.
double work_of(const AttentionParams& p, int64_t longest) {
  return 2.0 * static_cast<double>(p.tokens * p.heads * p.head_dim) * static_cast<double>(longest);
}

}  // namespace

Status attention_check_offsets(const char* op, const void* cu_seqlens, bool is_int64, int64_t sequences, int64_t tokens,
                               int64_t* longest) {
  const auto check_these = is_int64 ? check_offsets<int64_t> : check_offsets<int32_t>;
  return check_these(op, cu_seqlens, sequences, tokens, longest);
}

AttentionKernel attention_kernel_for(DType type, Isa isa) {
  const bool is_half = type == DType::kBFloat16;
  AttentionKernel best = is_half ? attention_bfloat16_generic : attention_float32_generic;
#if CTXFAST_AVX2
  if (isa >= Isa::kAvx2) best = is_half ? attention_bfloat16_avx2 : attention_float32_avx2;
#endif
#if CTXFAST_AVX512
  if (isa >= Isa::kAvx512) best = is_half ? attention_bfloat16_avx512 : attention_float32_avx512;
#endif
#if CTXFAST_AVX512BF16
  if (isa >= Isa::kAvx512Bf16 && is_half) best = attention_bfloat16_avx512bf16;
#endif
  (void)isa;
  return best;
}

int64_t attention_scratch_bytes(int64_t longest, int64_t head_dim) {
  const int64_t keys = round_up(longest, kAttentionPad), size = round_up(head_dim, kAttentionPad);
  const int64_t rows = std::min(kAttentionRows, longest);
  // Keys and values; rows that are being turned into columns; queries and context; scores, a line apart.
  return 4 * (2 * keys * size + kAttentionPad * size + 2 * rows * size + rows * (keys + kAttentionPad));
}

Status attention_forward(const AttentionParams& p) {
  int64_t longest = 0;
  const Status checked = check(p, &longest);
  if (!checked.ok() || p.tokens * p.heads * p.head_dim == 0) return checked;
  Call call = {attention_kernel_for(p.type, p.isa), {}};
  AttentionJob& job = call.job;
  job.heads = p.heads, job.head_dim = p.head_dim, job.sequences = p.sequences;
  job.is_int64 = p.is_int64, job.cu_seqlens = p.cu_seqlens;
  job.qkv = p.qkv, job.stride_qkv = p.stride_qkv, job.bias = p.bias;
  job.scale = p.scale;
  job.y = p.y, job.stride_y = p.stride_y;
  job.scratch_bytes = attention_scratch_bytes(longest, p.head_dim);
  const double worth = work_of(p, longest) / static_cast<double>(kWorkOfThread);
  const int64_t threads =
      worth < static_cast<double>(p.threads) ? std::max<int64_t>(1, static_cast<int64_t>(worth)) : p.threads;
  const size_t bytes = static_cast<size_t>(threads * job.scratch_bytes);
  job.scratch = static_cast<char*>(workspace(bytes));
  if (!job.scratch) return runtime_error(kOp, "no memory for a workspace of " + std::to_string(bytes) + " bytes.");
  if (!run_parallel(threads, run, &call)) return runtime_error(kOp, "no thread could be started.");
  return {};
}

}  // namespace ctxfast
