// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>

#include "base/parallel.h"
#include "layer_norm/kernels.h"
#include "layer_norm/layer_norm.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "layer_norm";
constexpr int64_t kWorkOfThread = 1 << 14;  // elements that are worth a thread: some 5 us

struct Call {
  LayerNormKernel kernel;
  const LayerNormParams& params;
};

void run(void* context, int index, int count) {
  const Call& call = *static_cast<Call*>(context);
  const int64_t rows = call.params.rows;
  call.kernel(call.params, rows * index / count, rows * (index + 1) / count);
}

template <class Id>
Status check_ids(const void* given, int64_t rows, int64_t count) {
  const Id* const ids = static_cast<const Id*>(given);
  for (int64_t i = 0; i < rows; ++i) {
    if (ids[i] < 0 || ids[i] >= count) {
      return invalid(kOp, "an id", std::to_string(ids[i]),
                     "0.." + std::to_string(count - 1) + ", the rows of its table");
    }
  }
  return {};
}

Status check(const LayerNormParams& p) {
  if (p.rows < 0) return invalid(kOp, "rows", std::to_string(p.rows), "0 or more");
  if (p.size < 1 || p.size > kLayerNormMaxSize) return invalid(kOp, "size", std::to_string(p.size), "1..8192");
  if (p.io_dtype != DType::kFloat32 && p.io_dtype != DType::kBFloat16) {
    return invalid(kOp, "io_dtype", kDTypeNames[static_cast<int>(p.io_dtype)], "float32 or bfloat16");
  }
  if (p.sources < 1 || p.sources > kLayerNormSources) {
    return invalid(kOp, "sources", std::to_string(p.sources), "1..4");
  }
  if (p.threads < 1) return invalid(kOp, "threads", std::to_string(p.threads), "1 or more");
  if (p.rows == 0) return {};
  for (int64_t s = 0; s < p.sources; ++s) {
    const LayerNormSource& source = p.source[s];
    if (!source.rows) return invalid(kOp, "source", "null", "an address");
    if (!source.ids) continue;
    const auto check_these = source.is_int64 ? check_ids<int64_t> : check_ids<int32_t>;
    const Status found = check_these(source.ids, p.rows, source.count);
    if (!found.ok()) return found;
  }
  if (!p.weight || !p.bias) return invalid(kOp, p.weight ? "bias" : "weight", "null", "an address");
  if (!p.y) return invalid(kOp, "y", "null", "an address");
  return {};
}

}  // namespace

Status layer_norm_forward(const LayerNormParams& params) {
  const Status checked = check(params);
  if (!checked.ok() || params.rows == 0) return checked;
  Call call = {best_layer_norm(params.isa), params};
  const int64_t worth = std::max<int64_t>(1, params.rows * params.size / kWorkOfThread);
  if (run_parallel(std::min({params.threads, worth, params.rows}), run, &call)) return {};
  return runtime_error(kOp, "no thread could be started.");
}

}  // namespace ctxfast
