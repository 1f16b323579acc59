// SPDX-License-Identifier: Apache-2.0
#include "ctxfast/transformer_layer.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "attention_kernel.h"
#include "layer_norm_kernel.h"
#include "linear_act_kernel.h"
#include "parallel.h"
#include "workspace.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "transformer_layer";
// Multiply-adds that are worth a thread: some 3 us.
constexpr int64_t kWorkOfThread = 1 << 18;
// Tokens that pass through the layer's second half together. Each pass reads its weights again: with few tokens to a
// pass they come from memory every time (BERT-Base in float32: 21 MB, and 6 % of the time at 192).
constexpr int64_t kPass = 4 * kLinearActMostRows;

int64_t size_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// What one call is made of; addresses of parts of the workspace.
struct Layer {
  const TransformerLayerParams& p;
  LinearActKernel product;
  AttentionKernel attention;
  LayerNormKernel norm;
  AttentionJob attention_job;
  char *qkv, *projected, *h, *wide, *scratch;  // (tokens, 3 hidden); the rest for rows of a pass
  SpinBarrier barrier;

  char* y(int64_t row) const { return static_cast<char*>(p.y) + row * p.hidden * size_of(p.type); }
  const char* x(int64_t row) const { return static_cast<const char*>(p.x) + row * p.hidden * size_of(p.type); }

  void multiply(const TransformerLayerProduct& weights, const void* bias, Activation activation, const void* from,
                int64_t in, void* to, int64_t out, int64_t rows, int index, int count) {
    LinearActParams call;
    call.rows = rows, call.in = in, call.out = out;
    call.held = p.held, call.type = p.type, call.activation = activation;
    call.x = from, call.stride_x = in;
    call.packed = weights.packed, call.scales = weights.scales, call.sums = weights.sums, call.bias = bias;
    call.y = to;
    product(linear_act_job(call, scratch, &barrier), index, count);
    barrier.wait(count);
  }

  // to = LayerNorm(rows of `projected` + shift + residual)
  void normalise(const void* shift, const void* residual, const TransformerLayerNorm& weights, void* to, int64_t rows,
                 int index, int count) {
    LayerNormParams call;
    call.rows = rows, call.size = p.hidden, call.type = p.type;
    call.sources = 2;
    call.source[0].rows = projected, call.source[0].stride = p.hidden;
    call.source[1].rows = residual, call.source[1].stride = p.hidden;
    call.shift = shift, call.weight = weights.weight, call.bias = weights.bias, call.eps = p.eps;
    call.y = to;
    norm(call, rows * index / count, rows * (index + 1) / count);
    barrier.wait(count);
  }

  // The whole layer, as thread `index` of `count`. What attention finds waits in y: a pass's rows of it are read
  // before they are written.
  void run(int index, int count) {
    multiply(p.qkv, p.qkv.bias, Activation::kNone, p.x, p.hidden, qkv, 3 * p.hidden, p.tokens, index, count);
    attention(attention_job, index, count);
    barrier.wait(count);
    for (int64_t row = 0; row < p.tokens; row += kPass) {
      const int64_t rows = std::min(kPass, p.tokens - row);
      multiply(p.project, nullptr, Activation::kNone, y(row), p.hidden, projected, p.hidden, rows, index, count);
      normalise(p.project.bias, x(row), p.attention_norm, h, rows, index, count);
      multiply(p.widen, p.widen.bias, p.activation, h, p.hidden, wide, p.intermediate, rows, index, count);
      multiply(p.narrow, nullptr, Activation::kNone, wide, p.intermediate, projected, p.hidden, rows, index, count);
      normalise(p.narrow.bias, h, p.output_norm, y(row), rows, index, count);
    }
  }
};

void run(void* context, int index, int count) { static_cast<Layer*>(context)->run(index, count); }

Status check(const TransformerLayerParams& p, int64_t* longest) {
  const struct {
    const char* name;
    int64_t value, least, most;
  } sizes[] = {{"tokens", p.tokens, 0, int64_t{1} << 40},
               {"sequences", p.sequences, 0, int64_t{1} << 40},
               {"hidden", p.hidden, 1, kLayerNormMaxSize},
               {"heads", p.heads, 1, p.hidden},
               {"intermediate", p.intermediate, 1, p.held == DType::kInt8 ? 65536 : int64_t{1} << 30},
               {"threads", p.threads, 1, int64_t{1} << 20}};
  for (const auto& size : sizes) {
    if (size.value < size.least || size.value > size.most) {
      return invalid(kOp, size.name, std::to_string(size.value),
                     std::to_string(size.least) + ".." + std::to_string(size.most));
    }
  }
  if (p.hidden % p.heads) return invalid(kOp, "heads", std::to_string(p.heads), "a divisor of hidden");
  if (p.hidden / p.heads > kAttentionMaxHeadDim) {
    return invalid(kOp, "hidden / heads", std::to_string(p.hidden / p.heads),
                   "at most " + std::to_string(kAttentionMaxHeadDim));
  }
  if (p.type != DType::kFloat32 && p.type != DType::kBFloat16) {
    return invalid(kOp, "type", "another", "float32 or bfloat16");
  }
  if (p.held != DType::kInt8 && p.held != p.type) return invalid(kOp, "held", "another", "int8, or the type of x");
  if (!p.cu_seqlens) return invalid(kOp, "cu_seqlens", "null", "an address");
  const Status rises = attention_check_offsets(kOp, p.cu_seqlens, p.is_int64, p.sequences, p.tokens, longest);
  if (!rises.ok() || p.tokens == 0) return rises;
  const struct {
    const char* name;
    const void* address;
  } needed[] = {{"x", p.x},
                {"y", p.y},
                {"attention_norm.weight", p.attention_norm.weight},
                {"attention_norm.bias", p.attention_norm.bias},
                {"output_norm.weight", p.output_norm.weight},
                {"output_norm.bias", p.output_norm.bias}};
  for (const auto& each : needed) {
    if (!each.address) return invalid(kOp, each.name, "null", "an address");
  }
  for (const TransformerLayerProduct* product : {&p.qkv, &p.project, &p.widen, &p.narrow}) {
    if (!product->packed) return invalid(kOp, "packed", "null", "an address");
    if (reinterpret_cast<uintptr_t>(product->packed) % 64) {
      return invalid(kOp, "packed", "not on a cache line", "64 bytes alignment");
    }
    if (p.held == DType::kInt8 && (!product->scales || !product->sums)) {
      return invalid(kOp, product->scales ? "sums" : "scales", "null", "an address");
    }
  }
  return {};
}

}  // namespace

Status transformer_layer_forward(const TransformerLayerParams& p) {
  int64_t longest = 0;
  const Status checked = check(p, &longest);
  if (!checked.ok() || p.tokens == 0) return checked;
  const int64_t size = size_of(p.type), pass = std::min(kPass, p.tokens);
  const int64_t head_dim = p.hidden / p.heads;
  // A layer's products are one size of work: all threads, or few for a few tokens.
  const int64_t work = p.tokens * p.hidden * (4 * p.hidden + 2 * p.intermediate) / (p.held == DType::kInt8 ? 4 : 1);
  const int64_t threads = std::min(p.threads, std::max<int64_t>(1, work / kWorkOfThread));
  const int64_t of_products = std::max(linear_act_scratch_bytes(p.tokens, p.hidden, p.held),
                                       linear_act_scratch_bytes(pass, p.intermediate, p.held));
  const int64_t of_thread = attention_scratch_bytes(longest, head_dim);
  const int64_t parts[] = {round_up(p.tokens * 3 * p.hidden * size, 64), round_up(pass * p.hidden * size, 64),
                           round_up(pass * p.hidden * size, 64), round_up(pass * p.intermediate * size, 64),
                           round_up(std::max(of_products, threads * of_thread), 64)};
  int64_t bytes = 0;
  for (const int64_t part : parts) bytes += part;
  char* memory = static_cast<char*>(workspace(static_cast<size_t>(bytes)));
  if (!memory) return runtime_error(kOp, "no memory for a workspace of " + std::to_string(bytes) + " bytes.");
  Layer layer{p,
              linear_act_kernel_for(p.held, p.isa),
              attention_kernel_for(p.type, p.isa),
              layer_norm_kernel_for(p.isa),
              {},
              {},
              {},
              {},
              {},
              {},
              {}};
  char** const places[] = {&layer.qkv, &layer.projected, &layer.h, &layer.wide, &layer.scratch};
  for (int i = 0; i < 5; ++i) *places[i] = memory, memory += parts[i];
  AttentionJob& job = layer.attention_job;
  job.heads = p.heads, job.head_dim = head_dim, job.sequences = p.sequences;
  job.is_int64 = p.is_int64, job.cu_seqlens = p.cu_seqlens;
  job.qkv = layer.qkv, job.stride_qkv = 3 * p.hidden, job.bias = nullptr;
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  job.y = p.y, job.stride_y = p.hidden;
  job.scratch = layer.scratch, job.scratch_bytes = of_thread;
  if (!run_parallel(threads, run, &layer)) return runtime_error(kOp, "no thread could be started.");
  return {};
}

}  // namespace ctxfast
