// SPDX-License-Identifier: Apache-2.0
// attention on the CPU, forward and backward, against plain loops in double, on every instruction set this machine
// runs.
#include <algorithm>
#include <cstring>
#include <limits>

#include "attention/attention.h"
#include "base/testing.h"

using namespace ctxfast;

namespace {

constexpr float kGuard = -12345.0f;

std::vector<uint16_t> all_to_bf16(const std::vector<float>& values) {
  std::vector<uint16_t> found;
  for (const float value : values) found.push_back(to_bf16(value));
  return found;
}

struct Problem {
  std::vector<int64_t> lengths;
  int64_t heads, size, stride_qkv, stride_y;
  DType io_dtype;
  bool has_bias;
  float scale;
  int64_t kv_heads = heads, reach = 0, window = -1, rotated = 0;
  std::vector<int64_t> offsets = {0}, starts;
  std::vector<float> qkv, bias, relative_bias, rotary;

  // `slack`: elements between rows.
  Problem(std::vector<int64_t> lengths, int64_t heads, int64_t size, DType io_dtype, bool has_bias, int64_t slack,
          float scale = 0)
      : lengths(lengths),
        heads(heads),
        size(size),
        stride_qkv(3 * heads * size + slack),
        stride_y(heads * size + slack),
        io_dtype(io_dtype),
        has_bias(has_bias),
        scale(scale != 0 ? scale : 1 / std::sqrt(static_cast<float>(size))) {
    for (const int64_t length : lengths) {
      starts.insert(starts.end(), length, offsets.back());
      offsets.push_back(offsets.back() + length);
    }
    draw();
  }

  // Fewer heads of keys, a reach of the relative bias (0: none), a window (-1: none), dimensions that are rotated.
  Problem with(int64_t of_kv, int64_t of_reach, int64_t of_window, int64_t of_rotated) const {
    Problem made = *this;
    made.kv_heads = of_kv, made.reach = of_reach, made.window = of_window, made.rotated = of_rotated;
    made.stride_qkv = stride_qkv - 3 * heads * size + made.parts() * size;
    made.draw();
    return made;
  }

  void draw() {
    Random random(static_cast<uint64_t>(offsets.back() * 1000003 + heads * 101 + size));
    qkv = random.fill(tokens() * stride_qkv, 2.0f), bias = random.fill(parts() * size, 1.0f);
    relative_bias = random.fill(reach > 0 ? heads * (2 * reach - 1) : 0, 1.0f);
    const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
    for (int64_t place = 0; place < longest; ++place) {
      for (const bool is_sine : {false, true}) {
        for (int64_t d = 0; d < rotated / 2; ++d) {
          const float angle = static_cast<float>(place) / static_cast<float>(1 + d);
          rotary.push_back(is_sine ? std::sin(angle) : std::cos(angle));
        }
      }
    }
    if (io_dtype == DType::kBFloat16) {
      for (std::vector<float>* values : {&qkv, &bias}) {
        for (float& value : *values) value = to_float(to_bf16(value));
      }
    }
  }

  int64_t tokens() const { return offsets.back(); }

  int64_t parts() const { return heads + 2 * kv_heads; }

  // Which of a token's parts is a query head's query (0), key (1) or value (2).
  int64_t part_of(int64_t which, int64_t head) const {
    return which == 0 ? head : heads + (which - 1) * kv_heads + head / (heads / kv_heads);
  }

  double plain(int64_t part, int64_t token, int64_t d) const {
    const int64_t at = part * size + d;
    const float sum = qkv[token * stride_qkv + at] + (has_bias ? bias[at] : 0.0f);
    return sum;
  }

  // One dimension of a part that is rotated, or (way -1) turned back; `given` are the part's dimensions before.
  template <class Given>
  double turned(int64_t token, int64_t d, int way, const Given& given) const {
    const int64_t half = rotated / 2, pair = d % std::max<int64_t>(half, 1);
    if (d >= rotated) return given(d);
    const float* const cosine = rotary.data() + (token - starts[token]) * rotated + pair;
    const double sine = way * cosine[half];
    return d < half ? given(d) * cosine[0] - given(d + half) * sine : given(d) * cosine[0] + given(pair) * sine;
  }

  double value(int64_t which, int64_t token, int64_t head, int64_t d) const {
    const int64_t part = part_of(which, head);
    if (which == 2) return plain(part, token, d);
    return turned(token, d, 1, [&](int64_t at) { return plain(part, token, at); });
  }

  // The column of the relative bias for a query and a key.
  int64_t column(int64_t i, int64_t j) const { return std::clamp(j - i, 1 - reach, reach - 1) + reach - 1; }

  // What a query gives each key of its sequence.
  std::vector<double> weights(size_t sequence, int64_t head, int64_t i) const {
    std::vector<double> scores;
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t j = offsets[sequence]; j < offsets[sequence + 1]; ++j) {
      double score = 0;
      for (int64_t d = 0; d < size; ++d) score += value(0, i, head, d) * value(1, j, head, d);
      score *= scale;
      if (reach > 0) score += relative_bias[head * (2 * reach - 1) + column(i, j)];
      if (window >= 0 && std::abs(i - j) > window) score = -std::numeric_limits<double>::infinity();
      scores.push_back(score);
      most = std::max(most, scores.back());
    }
    for (double& score : scores) sum += score = std::exp(score - most);
    for (double& score : scores) score /= sum;
    return scores;
  }

  // y (tokens, heads, size) and, for a gradient of it, that of qkv (tokens, parts, size), then of the relative bias.
  void want(const std::vector<float>& grad, std::vector<double>* y, std::vector<double>* d_qkv) const {
    y->assign(tokens() * heads * size, 0.0), d_qkv->assign(tokens() * parts() * size, 0.0);
    std::vector<double> d_bias(relative_bias.size(), 0.0);
    const auto at = [&](int64_t which, int64_t token, int64_t head) {
      return d_qkv->data() + (token * parts() + part_of(which, head)) * size;
    };
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t i = offsets[s]; i < offsets[s + 1]; ++i) {
          const std::vector<double> weight = weights(s, head, i);
          std::vector<double> d_weight(weight.size(), 0.0);
          const int64_t row = (i * heads + head) * size;
          double mean = 0;
          for (int64_t j = 0; j < lengths[s]; ++j) {
            const int64_t token = offsets[s] + j;
            for (int64_t d = 0; d < size; ++d) {
              (*y)[row + d] += weight[j] * value(2, token, head, d);
              d_weight[j] += grad[row + d] * value(2, token, head, d);
              at(2, token, head)[d] += weight[j] * grad[row + d];
            }
            mean += weight[j] * d_weight[j];
          }
          for (int64_t j = 0; j < lengths[s]; ++j) {
            const double d_score = scale * weight[j] * (d_weight[j] - mean);
            if (reach > 0) {
              d_bias[head * (2 * reach - 1) + column(i, offsets[s] + j)] += weight[j] * (d_weight[j] - mean);
            }
            for (int64_t d = 0; d < size; ++d) {
              at(0, i, head)[d] += d_score * value(1, offsets[s] + j, head, d);
              at(1, offsets[s] + j, head)[d] += d_score * value(0, i, head, d);
            }
          }
        }
      }
    }
    for (int64_t token = 0; token < tokens(); ++token) {
      for (int64_t part = 0; part < heads + kv_heads; ++part) {
        double* const own = d_qkv->data() + (token * parts() + part) * size;
        const std::vector<double> before(own, own + size);
        for (int64_t d = 0; d < size; ++d) own[d] = turned(token, d, -1, [&](int64_t from) { return before[from]; });
      }
    }
    d_qkv->insert(d_qkv->end(), d_bias.begin(), d_bias.end());
  }

  AttentionParams params(Isa isa, int64_t threads) const {
    AttentionParams p;
    p.tokens = tokens(), p.heads = heads, p.head_dim = size, p.sequences = static_cast<int64_t>(lengths.size());
    p.io_dtype = io_dtype, p.stride_qkv = stride_qkv, p.cu_seqlens = offsets.data(), p.is_int64 = true;
    p.scale = scale, p.stride_y = stride_y, p.threads = threads, p.isa = isa;
    if (kv_heads != heads) p.kv_heads = kv_heads;
    p.places.window = window, p.places.reach = reach, p.places.rotated = rotated;
    if (reach > 0) p.places.relative_bias = relative_bias.data();
    if (rotated > 0) {
      p.places.rotary = rotary.data(), p.places.positions = static_cast<int64_t>(rotary.size()) / rotated;
    }
    return p;
  }

  // What a kernel writes into rows of `width`, `stride` apart, as floats; what lies between and behind must survive.
  template <class Kernel>
  std::vector<float> written(int64_t rows, int64_t width, int64_t stride, Report* report, const Kernel& kernel) const {
    const bool is_bf16 = io_dtype == DType::kBFloat16;
    std::vector<float> out(rows * stride + 16, kGuard);
    std::vector<uint16_t> out_bf16(out.size(), to_bf16(kGuard));
    report->that("status", kernel(is_bf16 ? static_cast<void*>(out_bf16.data()) : out.data()).ok());
    std::vector<float> found;
    bool is_whole = true;
    for (size_t i = 0; i < out.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / stride, column = static_cast<int64_t>(i) % stride;
      if (is_bf16) out[i] = to_float(out_bf16[i]);
      if (row < rows && column < width) {
        found.push_back(out[i]);
      } else {
        is_whole = is_whole && out[i] == (is_bf16 ? to_float(to_bf16(kGuard)) : kGuard);
      }
    }
    report->that("guard", is_whole);
    return found;
  }

  // y, (tokens, heads, size).
  std::vector<float> run(AttentionParams p, Report* report) const {
    const bool is_bf16 = io_dtype == DType::kBFloat16;
    const std::vector<uint16_t> qkv_bf16 = all_to_bf16(qkv), bias_bf16 = all_to_bf16(bias);
    p.qkv = is_bf16 ? static_cast<const void*>(qkv_bf16.data()) : qkv.data();
    if (has_bias) p.bias = is_bf16 ? static_cast<const void*>(bias_bf16.data()) : bias.data();
    return written(p.tokens, heads * size, stride_y, report, [&](void* y) {
      p.y = y;
      return attention_forward(p);
    });
  }

  // A gradient of y that the type can hold.
  std::vector<float> gradient() const {
    std::vector<float> grad = Random(7).fill(tokens() * heads * size, 1.0f);
    if (io_dtype == DType::kBFloat16) {
      for (float& value : grad) value = to_float(to_bf16(value));
    }
    return grad;
  }

  // The gradient of qkv, (tokens, parts, size), for one of y, then that of the relative bias.
  std::vector<float> run_back(AttentionParams p, const std::vector<float>& grad, Report* report) const {
    const bool is_bf16 = io_dtype == DType::kBFloat16;
    const int64_t width = heads * size;
    const std::vector<uint16_t> qkv_bf16 = all_to_bf16(qkv), bias_bf16 = all_to_bf16(bias);
    p.qkv = is_bf16 ? static_cast<const void*>(qkv_bf16.data()) : qkv.data();
    if (has_bias) p.bias = is_bf16 ? static_cast<const void*>(bias_bf16.data()) : bias.data();
    std::vector<float> spread(p.tokens * stride_y, kGuard);
    for (int64_t i = 0; i < p.tokens * width; ++i) spread[i / width * stride_y + i % width] = grad[i];
    const std::vector<uint16_t> spread_bf16 = all_to_bf16(spread);
    p.gradients.y = is_bf16 ? static_cast<const void*>(spread_bf16.data()) : spread.data();
    p.gradients.stride_y = stride_y, p.gradients.stride_qkv = stride_qkv;
    std::vector<float> d_bias(relative_bias.size(), kGuard);
    if (reach > 0) p.gradients.relative_bias = d_bias.data();
    std::vector<float> found = written(p.tokens, parts() * size, stride_qkv, report, [&](void* d_qkv) {
      p.gradients.qkv = d_qkv;
      return attention_backward(p);
    });
    found.insert(found.end(), d_bias.begin(), d_bias.end());
    return found;
  }
};

std::string name_of(const Problem& problem, Isa isa) {
  return std::string(isa_name(isa)) + (problem.io_dtype == DType::kBFloat16 ? " bfloat16" : " float32") + " head_dim " +
         std::to_string(problem.size) + " tokens " + std::to_string(problem.tokens()) + " kv_heads " +
         std::to_string(problem.kv_heads) + " reach " + std::to_string(problem.reach) + " window " +
         std::to_string(problem.window) + " rotated " + std::to_string(problem.rotated);
}

template <class T>
std::vector<T> first(const std::vector<T>& values, int64_t n) {
  return {values.begin(), values.begin() + n};
}

void check_problem(const Problem& problem, Report* report) {
  const std::vector<float> grad = problem.gradient();
  std::vector<double> want, want_back;
  problem.want(grad, &want, &want_back);
  double largest = 0;
  for (const double value : want_back) largest = std::max(largest, std::fabs(value));
  // Values and biases lie within 3; bfloat16 weights and outputs are rounded to 1/512 of themselves, and sums of a
  // value and a bias, which move scores.
  const bool is_bf16 = problem.io_dtype == DType::kBFloat16;
  const double limit = is_bf16 ? 0.03 : 5e-6, limit_back = (is_bf16 ? 0.02 : 5e-6) * largest;
  for (const Isa isa : runnable_isas()) {
    const std::string name = name_of(problem, isa);
    const std::vector<float> found = problem.run(problem.params(isa, 1), report);
    const std::vector<float> back = problem.run_back(problem.params(isa, 1), grad, report);
    report->near(name, found, want, limit);
    report->near(name + " backward", back, want_back, limit_back);
    for (int64_t threads = 2; threads <= 4; ++threads) {
      const AttentionParams p = problem.params(isa, threads);
      report->that(name + " threads", problem.run(p, report) == found);
      report->that(name + " threads, backward", problem.run_back(p, grad, report) == back);
    }
    const std::vector<int32_t> offsets(problem.offsets.begin(), problem.offsets.end());
    AttentionParams narrow = problem.params(isa, 1);
    narrow.cu_seqlens = offsets.data(), narrow.is_int64 = false;
    report->that(name + " int32 offsets", problem.run(narrow, report) == found);
    report->that(name + " int32 offsets, backward", problem.run_back(narrow, grad, report) == back);
    // The first sequence by itself.
    AttentionParams alone = problem.params(isa, 2);
    alone.sequences = 1, alone.tokens = problem.lengths[0];
    const int64_t n = problem.lengths[0] * problem.heads * problem.size;
    report->that(name + " alone", problem.run(alone, report) == first(found, n));
    const int64_t rows = problem.lengths[0] * problem.parts() * problem.size;
    const std::vector<float> alone_back = problem.run_back(alone, first(grad, n), report);
    report->that(name + " alone, backward", first(alone_back, rows) == first(back, rows));
  }
}

// The bits that csrc/attention/attention.h lays down, written down once more: whether a weight is kept.
bool is_kept(const int64_t seeds[2], uint32_t pair, uint32_t i, uint32_t j, uint32_t threshold) {
  uint32_t c[] = {j / 32 * 16 + j % 16, i / 4, pair, static_cast<uint32_t>(seeds[1])};
  uint32_t key[] = {static_cast<uint32_t>(seeds[0]), static_cast<uint32_t>(static_cast<uint64_t>(seeds[0]) >> 32)};
  for (int round = 0; round < 7; ++round) {
    const uint64_t one = uint64_t{0xD2511F53} * c[0], two = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[] = {static_cast<uint32_t>(two >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(two),
                             static_cast<uint32_t>(one >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(one)};
    std::memcpy(c, next, sizeof c);
    key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
  }
  return (c[i % 4] >> (j / 16 % 2 * 16) & 0xffff) >= threshold;
}

// Every weight by itself: equal scores, and values that pick one key.
void check_dropout(Report* report) {
  const int64_t seeds[] = {-4611686018427387905, 123456789012};
  const std::vector<int64_t> lengths = {5, 70, 37};
  constexpr float kShare = 0.3f;
  const uint32_t threshold = 19661;  // round(65536 * 0.3)
  for (const Isa isa : runnable_isas()) {
    bool is_right = true;
    int64_t kept = 0, all = 0;
    for (int64_t key = 0; key < 70; ++key) {
      Problem problem(lengths, 2, 1, DType::kFloat32, false, 0);
      for (int64_t token = 0; token < problem.tokens(); ++token) {
        for (int64_t at = 0; at < 6; ++at) problem.qkv[token * 6 + at] = 0;
      }
      for (size_t s = 0; s < lengths.size(); ++s) {
        if (key < lengths[s]) {
          for (int64_t head = 0; head < 2; ++head) problem.qkv[(problem.offsets[s] + key) * 6 + 4 + head] = 1;
        }
      }
      AttentionParams p = problem.params(isa, 2);
      p.dropout_p = kShare, p.seeds = seeds;
      const std::vector<float> y = problem.run(p, report);
      for (size_t s = 0; s < lengths.size(); ++s) {
        for (int64_t i = 0; key < lengths[s] && i < lengths[s]; ++i) {
          for (int64_t head = 0; head < 2; ++head) {
            const bool is = is_kept(seeds, static_cast<uint32_t>(2 * s + head), static_cast<uint32_t>(i),
                                    static_cast<uint32_t>(key), threshold);
            const float got = y[(problem.offsets[s] + i) * 2 + head] * static_cast<float>(lengths[s]);
            is_right = is_right && std::fabs(got - (is ? 65536.0f / (65536 - threshold) : 0)) < 1e-5f;
            kept += is, ++all;
          }
        }
      }
    }
    report->that(std::string(isa_name(isa)) + " dropout", is_right);
    const double share = static_cast<double>(kept) / static_cast<double>(all);
    report->that("share of dropout", std::fabs(share - (1 - kShare)) < 0.02);
  }
}

// A NaN reaches its own sequence and head and no other; scores far from zero, on either side, and
// far apart give finite results.
void check_extremes(Report* report) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (const DType io_dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const Isa isa : runnable_isas()) {
      for (const float bad : {nan, infinity, -infinity}) {
        for (const int64_t part : {0, 1, 2}) {
          Problem problem({5, 19, 3}, 2, 8, io_dtype, false, 0);
          // Token 7, head 1.
          problem.qkv[7 * problem.stride_qkv + (part * 2 + 1) * 8 + 3] = bad;
          if (io_dtype == DType::kBFloat16 && std::isnan(bad)) continue;  // to_bf16 above knows no NaN
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
        Problem problem({21, 9}, 1, 16, io_dtype, false, 0);
        for (int64_t token = 0; token < 30; ++token) {
          for (int64_t d = 0; d < 16; ++d) {
            problem.qkv[token * 48 + d] = 30, problem.qkv[token * 48 + 16 + d] = far * (token % 2 ? 1.0f : 0.5f);
          }
        }
        const std::vector<float> grad = problem.gradient();
        std::vector<double> want, want_back;
        problem.want(grad, &want, &want_back);
        const double limit = io_dtype == DType::kBFloat16 ? 0.02 : 1e-5;
        report->near(name_of(problem, isa) + " far from zero", problem.run(problem.params(isa, 1), report), want,
                     limit);
        report->near(name_of(problem, isa) + " far from zero, backward",
                     problem.run_back(problem.params(isa, 1), grad, report), want_back, 30 * limit);
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
  refused("io_dtype", [](AttentionParams* p) { p->io_dtype = DType::kFloat16; });
  refused("stride_qkv", [](AttentionParams* p) { p->stride_qkv = 23; });
  refused("stride_y", [](AttentionParams* p) { p->stride_y = 7; });
  refused("dropout_p", [](AttentionParams* p) { p->dropout_p = 1; });
  refused("seeds", [](AttentionParams* p) { p->dropout_p = 0.1f; });
  refused("cu_seqlens[2] is 2", [](AttentionParams* p) { p->cu_seqlens = falling, p->sequences = 3; });
  refused("cu_seqlens[0]", [](AttentionParams* p) { p->cu_seqlens = late; });
  refused("the end of cu_seqlens", [](AttentionParams* p) { p->cu_seqlens = short_of; });
  refused("cu_seqlens is null", [](AttentionParams* p) { p->cu_seqlens = nullptr; });
  refused("qkv", [](AttentionParams* p) { p->qkv = nullptr; });
  refused("y", [](AttentionParams* p) { p->y = nullptr; });
  refused("kv_heads", [](AttentionParams* p) { p->kv_heads = 3; });
  static const float table[32] = {};
  refused("reach", [](AttentionParams* p) { p->places.relative_bias = table; });
  refused("rotated", [](AttentionParams* p) { p->places = {nullptr, 0, -1, table, 3, 3}; });
  refused("rotated", [](AttentionParams* p) { p->places = {nullptr, 0, -1, table, 3, 6}; });
  refused("positions", [](AttentionParams* p) { p->places = {nullptr, 0, -1, table, 2, 4}; });
  const auto refused_back = [&](const char* word, auto change) {
    float grad[40] = {}, grad_qkv[120];
    AttentionParams p = problem.params(Isa::kGeneric, 1);
    p.qkv = problem.qkv.data();
    p.gradients = {grad, 8, grad_qkv, 24};
    change(&p.gradients);
    const Status status = attention_backward(p);
    report->that(word, !status.ok() && status.message.find(word) != std::string::npos);
  };
  refused_back("gradients.stride_y", [](AttentionGradients* g) { g->stride_y = 7; });
  refused_back("gradients.stride_qkv", [](AttentionGradients* g) { g->stride_qkv = 23; });
  refused_back("gradients.y is null", [](AttentionGradients* g) { g->y = nullptr; });
  refused_back("gradients.qkv is null", [](AttentionGradients* g) { g->qkv = nullptr; });
}

}  // namespace

int main() {
  Report report;
  for (const DType io_dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const int64_t size : {1, 8, 20, 32, 64, 80, 128}) {
      check_problem({{15, 0, 1, 2, 16, 17}, 3, size, io_dtype, true, 0}, &report);
      check_problem({{63, 64, 65}, 2, size, io_dtype, false, 5}, &report);
    }
    check_problem({{127, 128, 129}, 2, 32, io_dtype, true, 3}, &report);
    check_problem({{300, 1, 47, 48, 49}, 1, 64, io_dtype, true, 0}, &report);
    check_problem({{300}, 3, 20, io_dtype, false, 0, -0.3f}, &report);
    check_problem({{600, 33}, 1, 17, io_dtype, false, 0}, &report);
    check_problem({{40}, 1, 256, io_dtype, true, 0}, &report);
    check_problem({{9}, 2, 1024, io_dtype, false, 0}, &report);
    check_problem(Problem({5, 0, 70, 1}, 2, 20, io_dtype, true, 3).with(2, 9, -1, 0), &report);
    check_problem(Problem({33, 130}, 2, 32, io_dtype, false, 0, -0.3f).with(2, 200, -1, 0), &report);
    check_problem(Problem({200, 49, 3}, 2, 32, io_dtype, true, 0).with(2, 0, 30, 0), &report);
    check_problem(Problem({300}, 1, 64, io_dtype, false, 0).with(1, 0, 0, 0), &report);
    check_problem(Problem({50, 17}, 2, 80, io_dtype, true, 0).with(2, 0, -1, 40), &report);
    check_problem(Problem({20, 65}, 4, 17, io_dtype, true, 5).with(2, 0, -1, 16), &report);
    check_problem(Problem({129, 0, 100}, 6, 32, io_dtype, true, 0).with(2, 20, 40, 24), &report);
    check_problem(Problem({40}, 3, 8, io_dtype, false, 0).with(1, 0, 1000, 0), &report);
  }
  check_dropout(&report);
  check_extremes(&report);
  check_refusals(&report);
  return report.finish("test_attention");
}
