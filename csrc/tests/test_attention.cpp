// SPDX-License-Identifier: Apache-2.0
// attention on the CPU against a plain loop in double, on every instruction set this machine runs.
#include <cstring>
#include <limits>

#include "check.h"
#include "ctxfast/attention.h"

using namespace ctxfast;

namespace {

constexpr float kGuard = -12345.0f;

std::vector<uint16_t> halves(const std::vector<float>& values) {
  std::vector<uint16_t> found;
  for (const float value : values) found.push_back(to_half(value));
  return found;
}

struct Problem {
  std::vector<int64_t> lengths;
  int64_t heads, size, stride_qkv, stride_y;
  DType type;
  bool has_bias;
  float scale;
  std::vector<int64_t> offsets = {0};
  std::vector<float> qkv, bias;

  // `slack`: elements between rows.
  Problem(std::vector<int64_t> lengths, int64_t heads, int64_t size, DType type, bool has_bias, int64_t slack,
          float scale = 0)
      : lengths(lengths),
        heads(heads),
        size(size),
        stride_qkv(3 * heads * size + slack),
        stride_y(heads * size + slack),
        type(type),
        has_bias(has_bias),
        scale(scale != 0 ? scale : 1 / std::sqrt(static_cast<float>(size))) {
    for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
    Random random(static_cast<uint64_t>(offsets.back() * 1000003 + heads * 101 + size));
    qkv = random.fill(tokens() * stride_qkv, 2.0f), bias = random.fill(3 * heads * size, 1.0f);
    if (type == DType::kBFloat16) {
      for (std::vector<float>* values : {&qkv, &bias}) {
        for (float& value : *values) value = to_float(to_half(value));
      }
    }
  }

  int64_t tokens() const { return offsets.back(); }

  double value(int64_t part, int64_t token, int64_t head, int64_t d) const {
    const int64_t at = (part * heads + head) * size + d;
    const float sum = qkv[token * stride_qkv + at] + (has_bias ? bias[at] : 0.0f);
    return sum;
  }

  // (tokens, heads, size)
  std::vector<double> want() const {
    std::vector<double> y(tokens() * heads * size, 0.0);
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
          std::vector<double> scores;
          double most = -std::numeric_limits<double>::infinity(), sum = 0;
          for (int64_t j = offsets[s]; j < offsets[s + 1]; ++j) {
            double score = 0;
            for (int64_t d = 0; d < size; ++d) score += value(0, i, head, d) * value(1, j, head, d);
            scores.push_back(scale * score);
            most = std::max(most, scores.back());
          }
          for (double& score : scores) sum += score = std::exp(score - most);
          for (int64_t j = offsets[s]; j < offsets[s + 1]; ++j) {
            const double weight = scores[j - offsets[s]] / sum;
            for (int64_t d = 0; d < size; ++d) y[(i * heads + head) * size + d] += weight * value(2, j, head, d);
          }
        }
      }
    }
    return y;
  }

  AttentionParams params(Isa isa, int64_t threads) const {
    AttentionParams p;
    p.tokens = tokens(), p.heads = heads, p.head_dim = size, p.sequences = static_cast<int64_t>(lengths.size());
    p.type = type, p.stride_qkv = stride_qkv, p.cu_seqlens = offsets.data(), p.is_int64 = true;
    p.scale = scale, p.stride_y = stride_y, p.threads = threads, p.isa = isa;
    return p;
  }

  // y as floats, (tokens, heads, size); what lies between and behind its rows must survive.
  std::vector<float> run(AttentionParams p, Report* report) const {
    const bool is_half = type == DType::kBFloat16;
    const std::vector<uint16_t> qkv_half = halves(qkv), bias_half = halves(bias);
    std::vector<float> y(p.tokens * stride_y + 16, kGuard);
    std::vector<uint16_t> y_half(y.size(), to_half(kGuard));
    p.qkv = is_half ? static_cast<const void*>(qkv_half.data()) : qkv.data();
    if (has_bias) p.bias = is_half ? static_cast<const void*>(bias_half.data()) : bias.data();
    p.y = is_half ? static_cast<void*>(y_half.data()) : y.data();
    report->that("status", attention_forward(p).ok());
    std::vector<float> found;
    bool is_whole = true;
    for (size_t i = 0; i < y.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / stride_y, column = static_cast<int64_t>(i) % stride_y;
      if (is_half) y[i] = to_float(y_half[i]);
      if (row < p.tokens && column < heads * size) {
        found.push_back(y[i]);
      } else {
        is_whole = is_whole && y[i] == (is_half ? to_float(to_half(kGuard)) : kGuard);
      }
    }
    report->that("guard", is_whole);
    return found;
  }
};

std::string name_of(const Problem& problem, Isa isa) {
  return std::string(isa_name(isa)) + (problem.type == DType::kBFloat16 ? " bfloat16" : " float32") + " head_dim " +
         std::to_string(problem.size) + " tokens " + std::to_string(problem.tokens());
}

void check_problem(const Problem& problem, Report* report) {
  const std::vector<double> want = problem.want();
  // Values and biases lie within 3; bfloat16 weights and outputs are rounded to 1/512 of themselves, and sums of a
  // value and a bias, which move scores.
  const double limit = problem.type == DType::kBFloat16 ? 0.03 : 5e-6;
  for (const Isa isa : runnable_isas()) {
    const std::string name = name_of(problem, isa);
    const std::vector<float> found = problem.run(problem.params(isa, 1), report);
    report->near(name, found, want, limit);
    for (int64_t threads = 2; threads <= 4; ++threads) {
      report->that(name + " threads", problem.run(problem.params(isa, threads), report) == found);
    }
    const std::vector<int32_t> offsets(problem.offsets.begin(), problem.offsets.end());
    AttentionParams narrow = problem.params(isa, 1);
    narrow.cu_seqlens = offsets.data(), narrow.is_int64 = false;
    report->that(name + " int32 offsets", problem.run(narrow, report) == found);
    // The first sequence by itself.
    AttentionParams alone = problem.params(isa, 2);
    alone.sequences = 1, alone.tokens = problem.lengths[0];
    const int64_t n = problem.lengths[0] * problem.heads * problem.size;
    report->that(name + " alone", problem.run(alone, report) == std::vector<float>(found.begin(), found.begin() + n));
  }
}

// A value that is no number reaches its own sequence and head and no other; scores far from zero, on either side, and
// far apart give finite results.
void check_extremes(Report* report) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
    for (const Isa isa : runnable_isas()) {
      for (const float bad : {nan, infinity, -infinity}) {
        for (const int64_t part : {0, 1, 2}) {
          Problem problem({5, 19, 3}, 2, 8, type, false, 0);
          // Token 7, head 1.
          problem.qkv[7 * problem.stride_qkv + (part * 2 + 1) * 8 + 3] = bad;
          if (type == DType::kBFloat16 && std::isnan(bad)) continue;  // to_half above knows no NaN
          const std::vector<float> y = problem.run(problem.params(isa, 1), report);
          bool is_near = true, is_reached = true;
          for (int64_t token = 0; token < 27; ++token) {
            for (int64_t column = 0; column < 16; ++column) {
              const float got = y[token * 16 + column];
              const bool is_elsewhere = token < 5 || token >= 24 || column < 8;
              if (is_elsewhere) is_near = is_near && std::isfinite(got);
              // A query reaches its own row, a value one column of every row; a key of infinity is heard or not.
              const bool must = !is_elsewhere && (part == 0 ? token == 7 : part == 2 ? column == 11 : std::isnan(bad));
              if (must) is_reached = is_reached && !std::isfinite(got);
            }
          }
          report->that(name_of(problem, isa) + " not a number, elsewhere", is_near);
          report->that(name_of(problem, isa) + " not a number, there", is_reached);
        }
      }
      for (const float far : {30.0f, -30.0f}) {
        Problem problem({21, 9}, 1, 16, type, false, 0);
        for (int64_t token = 0; token < 30; ++token) {
          for (int64_t d = 0; d < 16; ++d) {
            problem.qkv[token * 48 + d] = 30, problem.qkv[token * 48 + 16 + d] = far * (token % 2 ? 1.0f : 0.5f);
          }
        }
        report->near(name_of(problem, isa) + " far from zero", problem.run(problem.params(isa, 1), report),
                     problem.want(), type == DType::kBFloat16 ? 0.02 : 1e-5);
      }
    }
  }
}

void check_refusals(Report* report) {
  const Problem problem({2, 3}, 2, 4, DType::kFloat32, true, 0);
  const auto refused = [&](const char* word, auto change) {
    float y[40];
    AttentionParams p = problem.params(Isa::kGeneric, 1);
    p.qkv = problem.qkv.data(), p.y = y;
    change(&p);
    const Status status = attention_forward(p);
    report->that(word, !status.ok() && status.message.find(word) != std::string::npos);
  };
  static const int64_t falling[] = {0, 3, 2, 5}, late[] = {1, 2, 5}, short_of[] = {0, 2, 4};
  refused("tokens", [](AttentionParams* p) { p->tokens = -1; });
  refused("sequences", [](AttentionParams* p) { p->sequences = -1; });
  refused("heads", [](AttentionParams* p) { p->heads = -1; });
  refused("head_dim", [](AttentionParams* p) { p->head_dim = 1025, p->stride_qkv = p->stride_y = 10000; });
  refused("threads", [](AttentionParams* p) { p->threads = 0; });
  refused("type", [](AttentionParams* p) { p->type = DType::kFloat16; });
  refused("stride_qkv", [](AttentionParams* p) { p->stride_qkv = 23; });
  refused("stride_y", [](AttentionParams* p) { p->stride_y = 7; });
  refused("cu_seqlens[2] is 2", [](AttentionParams* p) { p->cu_seqlens = falling, p->sequences = 3; });
  refused("cu_seqlens[0]", [](AttentionParams* p) { p->cu_seqlens = late; });
  refused("the end of cu_seqlens", [](AttentionParams* p) { p->cu_seqlens = short_of; });
  refused("cu_seqlens is null", [](AttentionParams* p) { p->cu_seqlens = nullptr; });
  refused("qkv", [](AttentionParams* p) { p->qkv = nullptr; });
  refused("y", [](AttentionParams* p) { p->y = nullptr; });
}

}  // namespace

int main() {
  Report report;
  for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t size : {1, 8, 20, 32, 64, 80, 128}) {
      check_problem({{15, 0, 1, 2, 16, 17}, 3, size, type, true, 0}, &report);
      check_problem({{63, 64, 65}, 2, size, type, false, 5}, &report);
    }
    check_problem({{127, 128, 129}, 2, 32, type, true, 3}, &report);
    check_problem({{300, 1, 47, 48, 49}, 1, 64, type, true, 0}, &report);
    check_problem({{300}, 3, 20, type, false, 0, -0.3f}, &report);
    check_problem({{600, 33}, 1, 17, type, false, 0}, &report);
    check_problem({{40}, 1, 256, type, true, 0}, &report);
    check_problem({{9}, 2, 1024, type, false, 0}, &report);
  }
  check_extremes(&report);
  check_refusals(&report);
  return report.finish("test_attention");
}
