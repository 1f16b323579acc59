// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>

#include "base/checks.h"
#include "base/parallel.h"
#include "layer_norm/kernels.h"
#include "layer_norm/layer_norm.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "layer_norm";
constexpr int64_t kWorkOfThread = 1 << 14;  // elements that justify a thread: some 5 us

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
Status check_ids(const void* addresses, int64_t rows, int64_t count) {
  const Id* const ids = static_cast<const Id*>(addresses);
  for (int64_t i = 0; i < rows; ++i) {
    if (ids[i] < 0 || ids[i] >= count) {
      return invalid(kOp, "an id", std::to_string(ids[i]),
                     "0.." + std::to_string(count - 1) + ", the rows of its table");
    }
  }
  return {};
}

Status check(const LayerNormParams& p) {
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"rows", p.rows},
                                            {"size", p.size, 1, kLayerNormMaxSize},
                                            {"sources", p.sources, 1, kLayerNormSources},
                                            {"threads", p.threads, 1}}));
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "io_dtype", p.io_dtype, {DType::kFloat32, DType::kBFloat16}));
  if (p.rows == 0) return {};
  for (int64_t s = 0; s < p.sources; ++s) {
    const LayerNormSource& source = p.source[s];
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"source", source.rows}}));
    if (!source.ids) continue;
    const auto check_these = source.is_int64 ? check_ids<int64_t> : check_ids<int32_t>;
    CTXFAST_RETURN_IF_ERROR(check_these(source.ids, p.rows, source.count));
  }
  return check_addresses(kOp, {{"weight", p.weight}, {"y", p.y}});
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
