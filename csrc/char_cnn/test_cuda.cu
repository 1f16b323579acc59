// SPDX-License-Identifier: Apache-2.0
// char_cnn on CUDA against plain loops over all windows in double: both kernels, every dtype, words of every length;
// and back.

#include <algorithm>
#include <limits>

#include "base/testing.cuh"
#include "char_cnn/cuda.h"

using namespace ctxfast;

constexpr const char* kProgram = CTXFAST_PROGRAM("test_char_cnn_cuda");

namespace {

constexpr int kVocabulary = 11;

struct Width {
  int width, filters;
};

template <typename T>
struct Problem {
  CharCnnCudaParams params;
  std::vector<double> want;
  std::vector<std::vector<float>> weights;
  std::vector<float> table;
  std::vector<int64_t> ids;

  Problem(int64_t words, int characters, int size, const std::vector<Width>& widths, bool is_tanh, DType dtype) {
    Random random(static_cast<uint64_t>(words * 7919 + characters * 31 + size));
    for (int64_t i = 0; i < words; ++i) {
      for (int c = 0; c < characters; ++c) {
        const int64_t padding = kVocabulary - 1 - i / (characters + 1) % 2;
        ids.push_back(c < i % (characters + 1) ? random.below(kVocabulary) : padding);
      }
    }
    table = random.fill(kVocabulary * size, 1.0f);
    CharCnnCudaParams& p = params;
    p.words = words, p.characters = characters, p.size = size, p.vocabulary = kVocabulary, p.dtype = dtype;
    p.is_int64 = size % 2 == 0, p.is_tanh = is_tanh;
    p.ids = p.is_int64 ? static_cast<void*>(to_device(ids)) : to_device(std::vector<int32_t>(ids.begin(), ids.end()));
    p.table = to_device(rounded<T>(&table));
    std::vector<std::vector<float>> biases;
    for (const Width& w : widths) {
      weights.push_back(random.fill(int64_t{w.filters} * size * w.width, 1.0f));
      biases.push_back(random.fill(w.filters, 1.0f));
      p.filters[p.widths++] = {to_device(rounded<T>(&weights.back())), to_device(rounded<T>(&biases.back())), w.width,
                               w.filters};
      p.columns += w.filters;
    }
    for (int64_t i = 0; i < words; ++i) {
      for (int j = 0; j < p.widths; ++j) {
        for (int f = 0; f < p.filters[j].filters; ++f) {
          double most = -std::numeric_limits<double>::infinity();
          for (int t = 0; t + p.filters[j].width <= characters; ++t) most = std::max(most, window(i, t, j, f));
          want.push_back(is_tanh ? std::tanh(most + biases[j][f]) : std::max(most + biases[j][f], 0.0));
          most_before.push_back(most);
        }
      }
    }
  }

  double window(int64_t word, int t, int j, int f) const {
    const int width = params.filters[j].width, size = params.size;
    double sum = 0;
    for (int k = 0; k < width; ++k) {
      for (int d = 0; d < size; ++d) {
        sum += double{table[ids[word * params.characters + t + k] * size + d]} *
               weights[j][(int64_t{f} * size + d) * width + k];
      }
    }
    return sum;
  }

  std::vector<float> run(bool with_at, std::vector<int32_t>* at, Report* report) {
    const size_t n = want.size();
    const std::vector<T> nothing(n + 8, T(-7.0f));
    CharCnnCudaParams p = params;
    T* const y = to_device(nothing);
    p.y = y;
    if (with_at) p.at = to_device(std::vector<int32_t>(n + 8, -7));
    const Status status = char_cnn_cuda_forward(p, nullptr);
    report->that(status.message, status.ok());
    must(cudaDeviceSynchronize());
    std::vector<float> found = as_floats(to_host(y, n + 8));
    report->that("guard", std::all_of(found.begin() + n, found.end(), [](float value) { return value == -7.0f; }));
    found.resize(n);
    if (with_at) {
      *at = to_host(p.at, n + 8);
      report->that("guard of at", std::all_of(at->begin() + n, at->end(), [](int32_t value) { return value == -7; }));
    }
    return found;
  }

  // Gradients of words, then of each width's filters and biases, from those of y; windows as in `at`.
  void check_backward(const std::string& what, const std::vector<int32_t>& at, Report* report) {
    CharCnnCudaParams p = params;
    Random random(3);
    std::vector<float> grad = random.fill(p.words * p.columns, 1.0f);
    for (size_t i = 0; i < grad.size(); i += 3) grad[i] = 0.0f;  // as relu leaves them
    p.grad = to_device(grad);
    p.at = to_device(at);
    const int64_t length = int64_t{p.characters} * p.size;
    std::vector<double> of_words(p.words * length);
    std::vector<std::vector<double>> of_filters, of_biases;
    int64_t column = 0;
    for (int j = 0; j < p.widths; ++j) {
      const int width = p.filters[j].width, n = p.filters[j].filters;
      of_filters.emplace_back(int64_t{n} * p.size * width), of_biases.emplace_back(n);
      for (int64_t i = 0; i < p.words; ++i) {
        for (int f = 0; f < n; ++f) {
          const double g = grad[i * p.columns + column + f];
          of_biases[j][f] += g;
          for (int k = 0; k < width; ++k) {
            const int64_t place = at[i * p.columns + column + f] + k, id = ids[i * p.characters + place];
            for (int d = 0; d < p.size; ++d) {
              const int64_t weight = (int64_t{f} * p.size + d) * width + k;
              of_filters[j][weight] += g * table[id * p.size + d];
              of_words[i * length + place * p.size + d] += g * weights[j][weight];
            }
          }
        }
      }
      column += n;
      p.filters[j].grad_weight = to_device(std::vector<float>(of_filters[j].size(), NAN));
      p.filters[j].grad_bias = to_device(std::vector<float>(n, NAN));
    }
    p.grad_words = to_device(std::vector<float>(of_words.size(), NAN));
    const Status status = char_cnn_cuda_backward(p, nullptr);
    report->that(what + " backward " + status.message, status.ok());
    must(cudaDeviceSynchronize());
    const double limit = 1e-6 * static_cast<double>(1 + p.words + p.columns);
    report->near(what + " gradient of words", to_host(p.grad_words, of_words.size()), of_words, limit);
    for (int j = 0; j < p.widths; ++j) {
      report->near(what + " gradient of filters", to_host(p.filters[j].grad_weight, of_filters[j].size()),
                   of_filters[j], limit);
      report->near(what + " gradient of biases", to_host(p.filters[j].grad_bias, of_biases[j].size()), of_biases[j],
                   limit);
    }
  }

  std::vector<double> most_before;
};

template <typename T>
void test(Report* report, const char* name, DType dtype, double eps, int64_t words, int characters, int size,
          const std::vector<Width>& widths, bool is_tanh) {
  const std::string what = std::string(name) + " words " + std::to_string(words) + " characters " +
                           std::to_string(characters) + " size " + std::to_string(size);
  Problem<T> problem(words, characters, size, widths, is_tanh, dtype);
  std::vector<int32_t> at;
  const std::vector<float> y = problem.run(false, nullptr, report);
  double largest = 1;
  for (const double value : problem.want) largest = std::max(largest, std::fabs(value));
  report->near(what, y, problem.want, eps * largest);
  report->that(what + " with windows, same bits", problem.run(true, &at, report) == y);
  double worst = 0;  // of the windows found, to the best ones
  size_t place = 0;
  for (int64_t i = 0; i < words; ++i) {
    for (int j = 0; j < problem.params.widths; ++j) {
      for (int f = 0; f < problem.params.filters[j].filters; ++f, ++place) {
        const bool is_inside = at[place] >= 0 && at[place] + problem.params.filters[j].width <= characters;
        report->that(what + " window inside", is_inside);
        if (is_inside) worst = std::max(worst, problem.most_before[place] - problem.window(i, at[place], j, f));
      }
    }
  }
  report->that(what + " windows", worst < 1e-5);
  at.resize(problem.want.size());
  problem.check_backward(what, at, report);
}

void every_dtype(Report* report, int64_t words, int characters, int size, const std::vector<Width>& widths,
                 bool is_tanh) {
  test<float>(report, "fp32", DType::kFloat32, 4e-6, words, characters, size, widths, is_tanh);
  test<__half>(report, "fp16", DType::kFloat16, 1e-3, words, characters, size, widths, is_tanh);
  test<__nv_bfloat16>(report, "bf16", DType::kBFloat16, 8e-3, words, characters, size, widths, is_tanh);
}

void check_refusals(Report* report) {
  Problem<float> problem(2, 6, 4, {{3, 5}}, false, DType::kFloat32);
  problem.params.y = to_device(std::vector<float>(10));
  problem.params.at = to_device(std::vector<int32_t>(10));
  problem.params.grad = problem.params.grad_words = to_device(std::vector<float>(48));
  problem.params.filters[0].grad_weight = problem.params.filters[0].grad_bias = to_device(std::vector<float>(60));
  const auto refused = [&](const char* word, auto change, bool is_forward = true) {
    CharCnnCudaParams p = problem.params;
    change(&p);
    const Status status = is_forward ? char_cnn_cuda_forward(p, nullptr) : char_cnn_cuda_backward(p, nullptr);
    report->that(word, !status.ok() && status.message.find(word) != std::string::npos);
  };
  typedef CharCnnCudaParams* P;
  refused("words", [](P p) { p->words = -1; });
  refused("characters", [](P p) { p->characters = 0; });
  refused("size", [](P p) { p->size = 0; });
  refused("shared memory", [](P p) { p->size = 256; });
  refused("shared memory", [](P p) { p->characters = 10000; });
  refused("widths", [](P p) { p->widths = 17; });
  refused("width", [](P p) { p->filters[0].width = 7; });
  refused("filters", [](P p) { p->filters[0].filters = -1; });
  refused("columns", [](P p) { p->columns = 6; });
  refused("dtype", [](P p) { p->dtype = DType::kInt8; });
  refused("ids", [](P p) { p->ids = nullptr; });
  refused("table", [](P p) { p->table = nullptr; });
  refused("weight", [](P p) { p->filters[0].weight = nullptr; });
  refused("bias", [](P p) { p->filters[0].bias = nullptr; });
  refused("y", [](P p) { p->y = nullptr; });
  refused("weight", [](P p) { p->filters[0].weight = nullptr; }, false);
  refused("grad_weight", [](P p) { p->filters[0].grad_weight = nullptr; }, false);
  refused("grad_bias", [](P p) { p->filters[0].grad_bias = nullptr; }, false);
  refused("at", [](P p) { p->at = nullptr; }, false);
  refused("grad", [](P p) { p->grad = nullptr; }, false);
  refused("grad_words", [](P p) { p->grad_words = nullptr; }, false);
}

}  // namespace

int main() {
  if (!has_gpu(kProgram)) return 0;
  set_schedule(1);
  Report report;
  every_dtype(&report, 14, 12, 16, {{1, 32}, {2, 32}, {3, 64}, {7, 33}}, false);
  every_dtype(&report, 9, 7, 5, {{2, 17}, {7, 70}, {4, 1}}, true);
  every_dtype(&report, 5, 3, 33, {{2, 65}}, false);  // fragments along a character
  every_dtype(&report, 3, 9, 20, {{8, 40}}, true);   // too wide for fragments in registers
  every_dtype(&report, 1, 1, 1, {{1, 1}}, false);
  every_dtype(&report, 0, 4, 4, {{2, 3}}, false);
  every_dtype(&report, 3, 700, 16, {{5, 3}}, false);  // few words fit
  if (!is_small()) every_dtype(&report, 90, 50, 16, {{1, 32}, {6, 40}}, false);
  if (!is_small()) every_dtype(&report, 52, 50, 4, {{50, 2}}, false);
  check_refusals(&report);
  return report.finish(kProgram);
}
