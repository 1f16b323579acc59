// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <string>

#include "attention/kernels.h"
#include "base/checks.h"
#include "base/parallel.h"
#include "base/workspace.h"
#include "layer_norm/kernels.h"
#include "linear_act/kernels.h"
#include "transformer_layers/transformer_layers.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "transformer_layers";
// Multiply-adds that justify a thread: some 3 us.
constexpr int64_t kWorkOfThread = 1 << 18;
// Tokens that pass through the layer's second half together. Each pass reads its weights again: with few tokens to a
// pass they come from memory every time (BERT-Base in float32: 21 MB, and 6 % of the time at 192).
constexpr int64_t kPass = 4 * kLinearActMostRows;

int64_t size_of(DType io_dtype) { return io_dtype == DType::kFloat32 ? 4 : 2; }

// The state of one call; addresses of parts of the workspace.
struct Layers {
  const TransformerLayersParams& p;
  LinearActKernel product;
  AttentionKernel attention;
  LayerNormKernel norm;
  AttentionJob attention_job;
  char *qkv, *spare, *projected, *h, *wide,
      *scratch;  // (tokens, 3 hidden), (tokens, hidden); the rest for rows of a pass
  SpinBarrier barrier;

  int64_t bytes(int64_t rows) const { return rows * p.hidden * size_of(p.io_dtype); }
  // Where a layer's rows go. If only the last layer's are wanted, y and `spare` take turns, and the last gets y.
  char* output(int64_t layer) const {
    if (p.all_layers) return static_cast<char*>(p.y[layer]);
    return (p.count - 1 - layer) % 2 ? spare : static_cast<char*>(p.y[0]);
  }

  void multiply(const TransformerProduct& weights, const void* bias, Activation activation, const void* from,
                int64_t in, void* to, int64_t out, int64_t rows, int index, int count) {
    LinearActParams call;
    call.rows = rows, call.in = in, call.out = out;
    call.weight_dtype = p.weight_dtype, call.io_dtype = p.io_dtype, call.activation = activation;
    call.x = from, call.stride_x = in;
    call.packed = weights.packed, call.scales = weights.scales, call.sums = weights.sums, call.bias = bias;
    call.y = to;
    product(linear_act_job(call, scratch, &barrier), index, count);
    barrier.wait(count);
  }

  // to = LayerNorm(rows of `projected` + shift + residual)
  void normalise(const void* shift, const void* residual, const TransformerNorm& weights, void* to, int64_t rows,
                 int index, int count) {
    LayerNormParams call;
    call.rows = rows, call.size = p.hidden, call.io_dtype = p.io_dtype;
    call.sources = 2;
    call.source[0].rows = projected, call.source[0].stride = p.hidden;
    call.source[1].rows = residual, call.source[1].stride = p.hidden;
    call.shift = shift, call.weight = weights.weight, call.bias = weights.bias, call.eps = p.eps;
    call.y = to;
    norm(call, rows * index / count, rows * (index + 1) / count);
    barrier.wait(count);
  }

  // A whole layer, x -> y, as thread `index` of `count`. What attention finds waits in y: a pass's rows of it are read
  // before they are written.
  void run(const TransformerLayer& layer, const char* x, char* y, int index, int count) {
    multiply(layer.qkv, layer.qkv.bias, Activation::kNone, x, p.hidden, qkv, 3 * p.hidden, p.tokens, index, count);
    AttentionJob job = attention_job;
    job.y = y;
    attention(job, index, count);
    barrier.wait(count);
    for (int64_t row = 0; row < p.tokens; row += kPass) {
      const int64_t rows = std::min(kPass, p.tokens - row), at = bytes(row);
      multiply(layer.project, nullptr, Activation::kNone, y + at, p.hidden, projected, p.hidden, rows, index, count);
      normalise(layer.project.bias, x + at, layer.attention_norm, h, rows, index, count);
      multiply(layer.widen, layer.widen.bias, p.activation, h, p.hidden, wide, p.intermediate, rows, index, count);
      multiply(layer.narrow, nullptr, Activation::kNone, wide, p.intermediate, projected, p.hidden, rows, index, count);
      normalise(layer.narrow.bias, h, layer.output_norm, y + at, rows, index, count);
    }
  }

  void run(int index, int count) {
    const char* x = static_cast<const char*>(p.x);
    for (int64_t layer = 0; layer < p.count; ++layer) {
      char* const y = output(layer);
      run(p.layers[layer], x, y, index, count);
      x = y;
    }
  }
};

void run(void* context, int index, int count) { static_cast<Layers*>(context)->run(index, count); }

Status check(const TransformerLayer& layer, bool is_int8) {
  for (const TransformerNorm* norm : {&layer.attention_norm, &layer.output_norm}) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"weight of a norm", norm->weight}, {"bias of a norm", norm->bias}}));
  }
  for (const TransformerProduct* product : {&layer.qkv, &layer.project, &layer.widen, &layer.narrow}) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"packed", product->packed, true, 64},
                                                  {"scales", product->scales, is_int8},
                                                  {"sums", product->sums, is_int8}}));
  }
  return {};
}

Status check(const TransformerLayersParams& p, int64_t* longest) {
  const bool is_int8 = p.weight_dtype == DType::kInt8;
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"tokens", p.tokens, 0, int64_t{1} << 40},
                                            {"sequences", p.sequences, 0, int64_t{1} << 40},
                                            {"hidden", p.hidden, 1, kLayerNormMaxSize},
                                            {"heads", p.heads, 1, p.hidden},
                                            {"intermediate", p.intermediate, 1, is_int8 ? 65536 : int64_t{1} << 30},
                                            {"count", p.count, 1, int64_t{1} << 20},
                                            {"threads", p.threads, 1, int64_t{1} << 20}}));
  if (p.hidden % p.heads) return invalid(kOp, "heads", std::to_string(p.heads), "a divisor of hidden");
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"hidden / heads", p.hidden / p.heads, 1, kAttentionMaxHeadDim}}));
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "io_dtype", p.io_dtype, {DType::kFloat32, DType::kBFloat16}));
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "weight_dtype", p.weight_dtype, {DType::kInt8, p.io_dtype}));
  if (p.relative_bias) CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"reach", p.reach, 1, int64_t{1} << 30}}));
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"cu_seqlens", p.cu_seqlens}}));
  const Status rises = attention_check_offsets(kOp, p.cu_seqlens, p.is_int64, p.sequences, p.tokens, longest);
  if (!rises.ok() || p.tokens == 0) return rises;
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"x", p.x}, {"y", p.y}, {"layers", p.layers}}));
  for (int64_t i = 0; i < (p.all_layers ? p.count : 1); ++i) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"y of a layer", p.y[i]}}));
  }
  for (int64_t i = 0; i < p.count; ++i) CTXFAST_RETURN_IF_ERROR(check(p.layers[i], is_int8));
  return {};
}

}  // namespace

Status transformer_layers_forward(const TransformerLayersParams& p) {
  int64_t longest = 0;
  const Status checked = check(p, &longest);
  if (!checked.ok() || p.tokens == 0) return checked;
  const int64_t size = size_of(p.io_dtype), pass = std::min(kPass, p.tokens);
  const int64_t head_dim = p.hidden / p.heads;
  // A layer's products are one size of work: all threads, or few for a few tokens.
  const int64_t work =
      p.tokens * p.hidden * (4 * p.hidden + 2 * p.intermediate) / (p.weight_dtype == DType::kInt8 ? 4 : 1);
  const int64_t threads = std::min(p.threads, std::max<int64_t>(1, work / kWorkOfThread));
  const int64_t of_products = std::max(linear_act_scratch_bytes(p.tokens, p.hidden, p.weight_dtype),
                                       linear_act_scratch_bytes(pass, p.intermediate, p.weight_dtype));
  const int64_t of_thread = attention_scratch_bytes(longest, head_dim, p.relative_bias != nullptr);
  const bool has_spare = p.count > 1 && !p.all_layers;
  const int64_t parts[] = {p.tokens * 3 * p.hidden * size, has_spare ? p.tokens * p.hidden * size : 0,
                           pass * p.hidden * size,         pass * p.hidden * size,
                           pass * p.intermediate * size,   std::max(of_products, threads * of_thread)};
  int64_t bytes = 0;
  for (const int64_t part : parts) bytes += round_up(part, 64);
  char* memory = static_cast<char*>(workspace(static_cast<size_t>(bytes)));
  if (!memory) return runtime_error(kOp, "no memory for a workspace of " + std::to_string(bytes) + " bytes.");
  Layers layers{p,
                linear_act_kernel_for(p.weight_dtype, p.isa),
                attention_kernel_for(p.io_dtype, p.isa),
                best_layer_norm(p.isa),
                {},
                {},
                {},
                {},
                {},
                {},
                {},
                {}};
  char** const places[] = {&layers.qkv, &layers.spare, &layers.projected, &layers.h, &layers.wide, &layers.scratch};
  for (int i = 0; i < 6; ++i) *places[i] = memory, memory += round_up(parts[i], 64);
  AttentionJob& job = layers.attention_job;
  job.heads = job.kv_heads = p.heads, job.head_dim = head_dim, job.sequences = p.sequences;
  job.is_int64 = p.is_int64, job.cu_seqlens = p.cu_seqlens;
  job.qkv = layers.qkv, job.stride_qkv = 3 * p.hidden, job.bias = nullptr;
  job.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  job.places.relative_bias = p.relative_bias, job.places.reach = p.reach;
  job.stride_y = p.hidden;
  job.scratch = layers.scratch, job.scratch_bytes = of_thread;
  if (!run_parallel(threads, run, &layers)) return runtime_error(kOp, "no thread could be started.");
  return {};
}

}  // namespace ctxfast
