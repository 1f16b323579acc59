// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>
#include <vector>

#include "base/checks.h"
#include "base/parallel.h"
#include "char_cnn/char_cnn.h"
#include "char_cnn/kernels.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "char_cnn";
constexpr int64_t kWorkOfThread = 1 << 18;  // multiply-adds that justify a thread: some 5 us
constexpr int64_t kUsualWindows = 10;       // distinct windows of a word of text
constexpr int64_t kWordsOfPart = 4;         // fewer would leave some threads half as much again as others

struct Call {
  CharCnnKernels kernels;
  CharCnnJob job = {};
  std::vector<CharCnnPanel> panels;
  std::vector<int64_t> costs;  // of the panels before each, and of all
};

// Words are dealt out in parts; where threads are left over, so are the panels of each part.
void forward(void* context, int index, int count) {
  const Call& call = *static_cast<Call*>(context);
  const int64_t words = call.job.params->words;
  const int64_t parts = std::clamp<int64_t>(words / kWordsOfPart, 1, count), shares = count / parts;
  if (index >= parts * shares) return;
  const int64_t part = index / shares, share = index % shares;
  const auto first_of = [&](int64_t i) {
    const int64_t cost = call.costs.back() * i / shares;
    return std::lower_bound(call.costs.begin(), call.costs.end(), cost) - call.costs.begin();
  };
  call.kernels.forward(call.job, words * part / parts, words * (part + 1) / parts, first_of(share),
                       first_of(share + 1));
}

void backward(void* context, int index, int count) {
  const Call& call = *static_cast<Call*>(context);
  const int64_t words = call.job.params->words, columns = call.job.columns;
  call.kernels.backward_words(call.job, words * index / count, words * (index + 1) / count);
  call.kernels.backward_filters(call.job, columns * index / count, columns * (index + 1) / count);
}

template <class Id>
Status check_ids(const CharCnnParams& p) {
  const Id* const ids = static_cast<const Id*>(p.ids);
  for (int64_t i = 0; i < p.words * p.characters; ++i) {
    if (ids[i] < 0 || ids[i] >= p.vocabulary) {
      return invalid(kOp, "a character", std::to_string(ids[i]),
                     "0.." + std::to_string(p.vocabulary - 1) + ", the rows of the table");
    }
  }
  return {};
}

Status check(const CharCnnParams& p, bool is_forward) {
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"words", p.words},
                                            {"characters", p.characters, 1},
                                            {"size", p.size, 1},
                                            {"threads", p.threads, 1},
                                            {"widths", p.widths, 1}}));
  if (p.characters > kCharCnnMaxWord / p.size) {
    return invalid(kOp, "characters times size", std::to_string(p.characters) + " times " + std::to_string(p.size),
                   "at most " + std::to_string(kCharCnnMaxWord));
  }
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "io_dtype", p.io_dtype, {DType::kFloat32, DType::kBFloat16}));
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"filters", p.filters}}));
  const bool has_words = p.words > 0;
  for (int64_t i = 0; i < p.widths; ++i) {
    const CharCnnFilters& f = p.filters[i];
    CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"width", f.width, 1, p.characters}, {"filters", f.filters}}));
    if (f.filters == 0) continue;
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"packed", f.packed, is_forward && has_words},
                                                  {"bias", f.bias, is_forward && has_words},
                                                  {"grad_rows", f.grad_rows, !is_forward},
                                                  {"grad_bias", f.grad_bias, !is_forward},
                                                  {"rows", f.rows, !is_forward && has_words}}));
  }
  if (!has_words) return {};
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"ids", p.ids},
                                                {"table", p.table},
                                                {"y", p.y, is_forward},
                                                {"at", p.at, !is_forward},
                                                {"grad", p.grad, !is_forward},
                                                {"grad_words", p.grad_words, !is_forward}}));
  return p.is_int64 ? check_ids<int64_t>(p) : check_ids<int32_t>(p);
}

Status start(const CharCnnParams& p, void (*body)(void*, int, int)) {
  Call call = {best_char_cnn(p.isa), {}, {}, {0}};
  CharCnnJob& job = call.job;
  job.params = &p;
  for (int64_t i = 0; i < p.widths; ++i) {
    const CharCnnFilters& filters = p.filters[i];
    const int64_t terms = filters.width * p.size;
    for (int64_t first = 0; first < filters.filters; first += kCharCnnPanel) {
      call.panels.push_back({&filters, filters.packed + first * terms, first, job.columns + first,
                             std::min<int64_t>(kCharCnnPanel, filters.filters - first)});
      call.costs.push_back(call.costs.back() + terms);
    }
    job.columns += filters.filters;
    job.widest = std::max(job.widest, filters.width);
  }
  job.panels = call.panels.data();
  const int64_t work = std::max<int64_t>(p.words, 1) * kUsualWindows * kCharCnnPanel * call.costs.back();
  const int64_t threads = std::min(p.threads, std::max<int64_t>(1, work / kWorkOfThread));
  if (run_parallel(threads, body, &call)) return {};
  return runtime_error(kOp, "no thread could be started.");
}

}  // namespace

Status char_cnn_forward(const CharCnnParams& params) {
  const Status checked = check(params, true);
  return checked.ok() && params.words > 0 ? start(params, forward) : checked;
}

Status char_cnn_backward(const CharCnnParams& params) {
  const Status checked = check(params, false);
  return checked.ok() ? start(params, backward) : checked;
}

}  // namespace ctxfast
