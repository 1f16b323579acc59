// SPDX-License-Identifier: Apache-2.0
// char_cnn on the CPU against plain loops over all windows in double, on every instruction set this machine runs.
#include <algorithm>
#include <limits>

#include "base/testing.h"
#include "char_cnn/char_cnn.h"

using namespace ctxfast;

namespace {

constexpr float kGuard = -12345.0f;
constexpr int64_t kVocabulary = 11;

struct Width {
  int64_t width, filters;
};

struct Problem {
  int64_t words, characters, size, columns = 0;
  bool is_tanh;
  std::vector<Width> widths;
  std::vector<int64_t> ids;
  std::vector<int32_t> narrow_ids;
  std::vector<float> table;
  std::vector<std::vector<float>> rows, packed, biases;
  std::vector<double> y;
  std::vector<int32_t> at;

  // Words of every length from 0 on, the rest padding; then again, padded by another character.
  Problem(int64_t words, int64_t characters, int64_t size, std::vector<Width> widths, bool is_tanh)
      : words(words), characters(characters), size(size), is_tanh(is_tanh), widths(std::move(widths)) {
    Random random(static_cast<uint64_t>(words * 7919 + characters * 31 + size));
    for (int64_t i = 0; i < words; ++i) {
      for (int64_t c = 0; c < characters; ++c) {
        const int64_t padding = kVocabulary - 1 - i / (characters + 1) % 2;
        ids.push_back(c < i % (characters + 1) ? random.below(kVocabulary) : padding);
      }
    }
    narrow_ids.assign(ids.begin(), ids.end());
    table = random.fill(kVocabulary * (size + 3), 1.0f);  // rows lie size + 3 apart
    for (const Width& w : this->widths) {
      const int64_t terms = w.width * size;
      rows.push_back(random.fill(w.filters * terms, 1.0f));
      biases.push_back(random.fill(w.filters, 1.0f));
      std::vector<float> panels(round_up(w.filters, kCharCnnPanel) * terms);
      for (int64_t f = 0; f < w.filters; ++f) {
        for (int64_t k = 0; k < terms; ++k) {
          panels[(f / kCharCnnPanel * terms + k) * kCharCnnPanel + f % kCharCnnPanel] = rows.back()[f * terms + k];
        }
      }
      packed.push_back(std::move(panels));
      columns += w.filters;
    }
    for (int64_t i = 0; i < words; ++i) {
      for (size_t j = 0; j < rows.size(); ++j) {
        for (int64_t f = 0; f < this->widths[j].filters; ++f) {
          double most = -std::numeric_limits<double>::infinity();
          int32_t where = 0;
          for (int64_t t = 0; t + this->widths[j].width <= characters; ++t) {
            const double sum = window(i, t, j, f);
            if (sum > most) most = sum, where = static_cast<int32_t>(t);
          }
          const double before = most + biases[j][f];
          y.push_back(is_tanh ? std::tanh(before) : std::max(before, 0.0));
          at.push_back(where);
        }
      }
    }
  }

  double value(int64_t word, int64_t place) const {
    return table[ids[word * characters + place / size] * (size + 3) + place % size];
  }
  double window(int64_t word, int64_t t, size_t j, int64_t f) const {
    double sum = 0;
    const int64_t terms = widths[j].width * size;
    for (int64_t k = 0; k < terms; ++k) sum += value(word, t * size + k) * rows[j][f * terms + k];
    return sum;
  }

  CharCnnParams params(std::vector<CharCnnFilters>* filters, Isa isa, int64_t threads) const {
    for (size_t j = 0; j < widths.size(); ++j) {
      CharCnnFilters& one = filters->emplace_back();
      one.width = widths[j].width, one.filters = widths[j].filters;
      one.packed = packed[j].data(), one.bias = biases[j].data(), one.rows = rows[j].data();
    }
    CharCnnParams p;
    p.words = words, p.characters = characters, p.size = size, p.vocabulary = kVocabulary;
    p.is_int64 = threads == 1;
    p.ids = p.is_int64 ? static_cast<const void*>(ids.data()) : narrow_ids.data();
    p.table = table.data(), p.stride_table = size + 3;
    p.widths = static_cast<int64_t>(widths.size()), p.filters = filters->data();
    p.is_tanh = is_tanh, p.threads = threads, p.isa = isa;
    return p;
  }
};

std::vector<float> run_forward(const Problem& problem, CharCnnParams p, std::vector<int32_t>* at, Report* report) {
  const int64_t n = p.words * problem.columns;
  std::vector<float> y(n + 16, kGuard);
  if (at) at->assign(n + 16, -7), p.at = at->data();
  p.y = y.data();
  const Status status = char_cnn_forward(p);
  report->that("forward " + status.message, status.ok());
  report->that("guard", std::all_of(y.begin() + n, y.end(), [](float value) { return value == kGuard; }));
  if (at) report->that("guard of at", std::all_of(at->begin() + n, at->end(), [](int32_t v) { return v == -7; }));
  y.resize(n);
  return y;
}

void check_forward(const Problem& problem, Isa isa, const std::string& name, Report* report) {
  std::vector<CharCnnFilters> one, three, many;
  std::vector<int32_t> at;
  const std::vector<float> y = run_forward(problem, problem.params(&one, isa, 1), nullptr, report);
  report->near(name, y, problem.y, 4e-6 * static_cast<double>(problem.characters));
  report->that(name + " threads", run_forward(problem, problem.params(&three, isa, 3), nullptr, report) == y);
  report->that(name + " with windows", run_forward(problem, problem.params(&many, isa, 8), &at, report) == y);
  // Two windows may be as good as equal: the one found must be as good as the best.
  double worst = 0;
  int64_t place = 0;
  for (int64_t i = 0; i < problem.words; ++i) {
    for (size_t j = 0; j < problem.rows.size(); ++j) {
      for (int64_t f = 0; f < problem.widths[j].filters; ++f, ++place) {
        worst = std::max(worst, problem.window(i, problem.at[place], j, f) - problem.window(i, at[place], j, f));
      }
    }
  }
  report->that(name + " windows", worst < 1e-5);
  for (int64_t i = 0; i < std::min<int64_t>(problem.words, 3); ++i) {
    std::vector<CharCnnFilters> filters;
    CharCnnParams p = problem.params(&filters, isa, 1);
    p.words = 1, p.ids = problem.ids.data() + i * problem.characters;
    const std::vector<float> row(y.begin() + i * problem.columns, y.begin() + (i + 1) * problem.columns);
    report->that(name + " alone", run_forward(problem, p, nullptr, report) == row);
  }
}

void check_backward(const Problem& problem, Isa isa, const std::string& name, Report* report) {
  Random random(5);
  std::vector<float> grad = random.fill(problem.words * problem.columns, 1.0f);
  for (size_t i = 0; i < grad.size(); i += 3) grad[i] = 0.0f;  // as relu leaves them
  const int64_t length = problem.characters * problem.size;
  std::vector<double> of_words(problem.words * length);
  std::vector<std::vector<double>> of_rows, of_biases;
  int64_t column = 0;
  for (size_t j = 0; j < problem.rows.size(); ++j) {
    const int64_t terms = problem.widths[j].width * problem.size, n = problem.widths[j].filters;
    of_rows.emplace_back(n * terms), of_biases.emplace_back(n);
    for (int64_t i = 0; i < problem.words; ++i) {
      for (int64_t f = 0; f < n; ++f) {
        const int64_t place = i * problem.columns + column + f, start = problem.at[place] * problem.size;
        of_biases[j][f] += grad[place];
        for (int64_t k = 0; k < terms; ++k) {
          of_rows[j][f * terms + k] += grad[place] * problem.value(i, start + k);
          of_words[i * length + start + k] += static_cast<double>(grad[place]) * problem.rows[j][f * terms + k];
        }
      }
    }
    column += n;
  }
  std::vector<std::vector<float>> found[2];
  for (const int64_t threads : {1, 3}) {
    std::vector<CharCnnFilters> filters;
    CharCnnParams p = problem.params(&filters, isa, threads);
    std::vector<std::vector<float>>& all = found[threads > 1];
    all.emplace_back(of_words.size(), kGuard);
    for (size_t j = 0; j < filters.size(); ++j) {
      all.emplace_back(of_rows[j].size(), kGuard), all.emplace_back(of_biases[j].size(), kGuard);
      filters[j].grad_rows = all[2 * j + 1].data(), filters[j].grad_bias = all[2 * j + 2].data();
    }
    p.grad_words = all[0].data(), p.grad = grad.data(), p.at = const_cast<int32_t*>(problem.at.data());
    const Status status = char_cnn_backward(p);
    report->that(name + " backward " + status.message, status.ok());
  }
  report->that(name + " backward, threads", found[0] == found[1]);
  const double limit = 2e-6 * static_cast<double>(problem.columns + problem.words);
  report->near(name + " gradient of words", found[0][0], of_words, limit);
  for (size_t j = 0; j < problem.rows.size(); ++j) {
    report->near(name + " gradient of filters", found[0][2 * j + 1], of_rows[j], limit);
    report->near(name + " gradient of biases", found[0][2 * j + 2], of_biases[j], limit);
  }
}

void check_problem(const Problem& problem, Report* report) {
  for (const Isa isa : runnable_isas()) {
    const std::string name = std::string(isa_name(isa)) + " words " + std::to_string(problem.words) + " characters " +
                             std::to_string(problem.characters) + " size " + std::to_string(problem.size);
    check_forward(problem, isa, name, report);
    check_backward(problem, isa, name, report);
  }
}

// NaN and infinity reach exactly the numbers that they reach in the definition.
void check_nan(Report* report) {
  Problem problem(9, 8, 4, {{1, 3}, {3, 40}}, false);
  problem.table[4 * (problem.size + 3)] = NAN;
  problem.packed[0][1] = NAN;
  for (const Isa isa : runnable_isas()) {
    std::vector<CharCnnFilters> filters;
    const std::vector<float> y = run_forward(problem, problem.params(&filters, isa, 1), nullptr, report);
    for (int64_t i = 0; i < problem.words; ++i) {
      const auto first = problem.ids.begin() + i * problem.characters;
      const bool has = std::find(first, first + problem.characters, 4) != first + problem.characters;
      for (int64_t c = 0; c < problem.columns; ++c) {
        report->that("nan", std::isnan(y[i * problem.columns + c]) == (has || c == 1));
      }
    }
  }
}

void check_refusals(Report* report) {
  const Problem problem(2, 8, 4, {{3, 5}}, false);
  const auto refused = [&](const char* word, auto change, bool is_forward = true) {
    std::vector<float> y(10, kGuard), grads(64);
    std::vector<CharCnnFilters> filters;
    CharCnnParams p = problem.params(&filters, Isa::kGeneric, 1);
    p.y = y.data(), p.at = const_cast<int32_t*>(problem.at.data());
    p.grad = p.grad_words = grads.data(), filters[0].grad_rows = filters[0].grad_bias = grads.data();
    change(&p, &filters[0]);
    const Status status = is_forward ? char_cnn_forward(p) : char_cnn_backward(p);
    report->that(word, !status.ok() && status.message.find(word) != std::string::npos);
    report->that("nothing written", y == std::vector<float>(10, kGuard));
  };
  typedef CharCnnParams* P;
  typedef CharCnnFilters* F;
  refused("a character is 10", [](P p, F) { p->vocabulary = 10; });
  refused("words", [](P p, F) { p->words = -1; });
  refused("characters", [](P p, F) { p->characters = 0; });
  refused("at most 16384", [](P p, F) { p->characters = 4097; });
  refused("size", [](P p, F) { p->size = 0; });
  refused("io_dtype", [](P p, F) { p->io_dtype = DType::kFloat16; });
  refused("threads", [](P p, F) { p->threads = 0; });
  refused("widths", [](P p, F) { p->widths = 0; });
  refused("width", [](P, F f) { f->width = 9; });
  refused("width", [](P, F f) { f->width = 0; });
  refused("filters", [](P, F f) { f->filters = -1; });
  refused("ids", [](P p, F) { p->ids = nullptr; });
  refused("table", [](P p, F) { p->table = nullptr; });
  refused("packed", [](P, F f) { f->packed = nullptr; });
  refused("bias", [](P, F f) { f->bias = nullptr; });
  refused("y", [](P p, F) { p->y = nullptr; });
  refused("rows", [](P, F f) { f->rows = nullptr; }, false);
  refused("grad_rows", [](P, F f) { f->grad_rows = nullptr; }, false);
  refused("grad_bias", [](P, F f) { f->grad_bias = nullptr; }, false);
  refused("at", [](P p, F) { p->at = nullptr; }, false);
  refused("grad", [](P p, F) { p->grad = nullptr; }, false);
  refused("grad_words", [](P p, F) { p->grad_words = nullptr; }, false);
}

}  // namespace

int main() {
  Report report;
  check_problem({53, 50, 16, {{1, 32}, {2, 7}, {3, 64}, {7, 33}}, false}, &report);
  check_problem({53, 50, 16, {{1, 32}, {50, 3}}, true}, &report);
  check_problem({30, 13, 5, {{2, 17}, {13, 1}, {4, 31}}, true}, &report);
  check_problem({20, 6, 33, {{6, 65}, {1, 1}}, false}, &report);
  check_problem({3, 1, 1, {{1, 1}}, false}, &report);
  check_problem({1, 128, 128, {{3, 40}}, false}, &report);
  check_problem({0, 4, 4, {{2, 3}}, false}, &report);
  check_nan(&report);
  check_refusals(&report);
  return report.finish("test_char_cnn");
}
