// SPDX-License-Identifier: Apache-2.0
// linear_act on the CPU against a plain loop in double, on every instruction set this machine runs.
#include <algorithm>
#include <cstring>

#include "base/testing.h"
#include "linear_act/linear_act.h"

using namespace ctxfast;

namespace {

constexpr float kGuard = -12345.0f;

double activated(double x, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

struct Aligned {
  void* memory;
  explicit Aligned(int64_t bytes) : memory(std::aligned_alloc(64, round_up(bytes + 1, 64))) {
    std::memset(memory, 0, round_up(bytes + 1, 64));
  }
  Aligned(const Aligned&) = delete;
  ~Aligned() { std::free(memory); }
};

struct Problem {
  int64_t rows, in, out;
  DType weight_dtype, io_dtype;
  std::vector<float> x, w, bias, scales;
  std::vector<uint16_t> x_bf16, bias_bf16;
  std::vector<int32_t> sums;
  std::vector<double> before;  // (rows, out), without activation
  Aligned packed;

  Problem(int64_t rows, int64_t in, int64_t out, DType weight_dtype, DType io_dtype)
      : rows(rows),
        in(in),
        out(out),
        weight_dtype(weight_dtype),
        io_dtype(io_dtype),
        packed(linear_act_packed_bytes(in, out, weight_dtype)) {
    Random random(static_cast<uint64_t>(rows * 1000003 + in * 101 + out));
    x = random.fill(rows * in, 2.0f), w = random.fill(out * in, 1.0f), bias = random.fill(out, 1.0f);
    if (rows > 2) std::fill(x.begin() + in, x.begin() + 2 * in, 0.0f);  // a row of zeros
    for (std::vector<float>* values : {&x, &w, &bias}) {
      const bool rounds = io_dtype == DType::kBFloat16 && (values != &w || weight_dtype == DType::kBFloat16);
      for (float& value : *values) value = rounds ? to_float(to_bf16(value)) : value;
    }
    for (const float value : x) x_bf16.push_back(to_bf16(value));
    for (const float value : bias) bias_bf16.push_back(to_bf16(value));
    scales.assign(round_up(out, kLinearActPanel), 0.0f), sums.assign(scales.size(), 0);
    before.assign(rows * out, 0.0);
    const int64_t per_word = weight_dtype == DType::kInt8       ? 4
                             : weight_dtype == DType::kBFloat16 ? 2
                                                                : 1,
                  tiles = ceil_div(in, kLinearActTileWords * per_word);
    for (int64_t o = 0; o < out; ++o) {
      float most = 0;
      for (int64_t k = 0; k < in; ++k) most = std::max(most, std::fabs(w[o * in + k]));
      scales[o] = most / 127;
      for (int64_t k = 0; k < in; ++k) {
        const int64_t word = k / per_word, column = o % kLinearActPanel;
        const int64_t at =
            (((o / kLinearActPanel * tiles + word / 16) * 2 + column / 16) * 16 + word % 16) * 16 + column % 16;
        if (weight_dtype == DType::kInt8) {
          const int step = static_cast<int>(std::nearbyint(w[o * in + k] * (127 / most)));
          w[o * in + k] = static_cast<float>(step);
          sums[o] += 128 * step;
          static_cast<int8_t*>(packed.memory)[4 * at + k % 4] = static_cast<int8_t>(step);
        } else if (weight_dtype == DType::kFloat32) {
          static_cast<float*>(packed.memory)[at] = w[o * in + k];
        } else {
          static_cast<uint16_t*>(packed.memory)[2 * at + k % 2] = to_bf16(w[o * in + k]);
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      float most = 0;
      for (int64_t k = 0; k < in; ++k) most = std::max(most, std::fabs(x[r * in + k]));
      const float steps = most > 0 ? 127 / most : 0;
      for (int64_t o = 0; o < out; ++o) {
        double sum = 0;
        for (int64_t k = 0; k < in; ++k) {
          const double value = weight_dtype == DType::kInt8 ? std::nearbyint(x[r * in + k] * steps) : x[r * in + k];
          sum += value * w[o * in + k];
        }
        if (weight_dtype == DType::kInt8) sum *= static_cast<double>(most / 127) * scales[o];
        before[r * out + o] = sum + bias[o];
      }
    }
  }

  LinearActParams params(Activation activation, Isa isa, int64_t threads) const {
    LinearActParams p;
    p.rows = rows, p.in = in, p.out = out, p.weight_dtype = weight_dtype, p.io_dtype = io_dtype,
    p.activation = activation;
    const bool is_bf16 = io_dtype == DType::kBFloat16;
    p.x = is_bf16 ? static_cast<const void*>(x_bf16.data()) : x.data();
    p.bias = is_bf16 ? static_cast<const void*>(bias_bf16.data()) : bias.data();
    p.stride_x = in, p.packed = packed.memory, p.scales = scales.data(), p.sums = sums.data();
    p.threads = threads, p.isa = isa;
    return p;
  }

  // y as floats; a guard behind it must survive.
  std::vector<float> run(LinearActParams p, Report* report) const {
    const int64_t n = p.rows * (p.is_gated ? out / 2 : out);
    std::vector<float> y(n + 16, kGuard);
    std::vector<uint16_t> y_bf16(n + 16, to_bf16(kGuard));
    const bool is_bf16 = io_dtype == DType::kBFloat16;
    p.y = is_bf16 ? static_cast<void*>(y_bf16.data()) : y.data();
    report->that("status", linear_act_forward(p).ok());
    if (is_bf16) {
      for (size_t i = 0; i < y.size(); ++i) y[i] = to_float(y_bf16[i]);
    }
    for (int64_t i = n; i < n + 16; ++i) report->that("guard", y[i] == (is_bf16 ? to_float(to_bf16(kGuard)) : kGuard));
    y.resize(n);
    return y;
  }
};

void check_problem(const Problem& problem, Report* report) {
  const bool is_int8 = problem.weight_dtype == DType::kInt8;
  for (int a = 0; a < 6; ++a) {
    const Activation activation = static_cast<Activation>(a);
    std::vector<double> want;
    double most = 1;
    for (const double value : problem.before) {
      want.push_back(activated(value, activation));
      most = std::max(most, std::fabs(want.back()));
      if (problem.weight_dtype == DType::kFloat32) most = std::max(most, std::fabs(value));  // its sums are rounded
    }
    std::vector<float> first;
    for (const Isa isa : runnable_isas()) {
      const std::string name = std::string(isa_name(isa)) + " rows " + std::to_string(problem.rows) + " in " +
                               std::to_string(problem.in) + " activation " + std::to_string(a);
      const std::vector<float> found = problem.run(problem.params(activation, isa, 1), report);
      report->near(name, found, want, most * (problem.io_dtype == DType::kBFloat16 ? 5e-3 : 2e-6));
      report->that(name + " threads", problem.run(problem.params(activation, isa, 3), report) == found);
      LinearActParams one = problem.params(activation, isa, 1);
      one.rows = 1;
      report->that(name + " alone",
                   problem.rows == 0 ||
                       problem.run(one, report) == std::vector<float>(found.begin(), found.begin() + problem.out));
      if (first.empty()) first = found;
      if (is_int8) report->that(name + " same bits", found == first);
    }
  }
}

// Gated, column 32 p + j is A's 16 p + j and column 32 p + 16 + j is B's, where columns are packed as they come.
void check_gated(const Problem& problem, Report* report) {
  const int64_t size = problem.out / 2;
  std::vector<int64_t> a(size), b(size);
  std::vector<float> bias(problem.out);
  std::vector<uint16_t> narrow(problem.out);
  for (int64_t j = 0; j < size; ++j) {
    a[j] = j / 16 * 32 + j % 16, b[j] = a[j] + 16;
    bias[j] = problem.bias[a[j]], bias[size + j] = problem.bias[b[j]];
  }
  for (int64_t j = 0; j < problem.out; ++j) narrow[j] = to_bf16(bias[j]);
  for (const Activation activation : {Activation::kGelu, Activation::kSilu}) {
    std::vector<double> want;
    double most = 1;
    for (int64_t row = 0; row < problem.rows; ++row) {
      const double* const before = &problem.before[row * problem.out];
      for (int64_t j = 0; j < size; ++j) {
        want.push_back(activated(before[a[j]], activation) * before[b[j]]);
        most = std::max({most, std::fabs(want.back()), std::fabs(before[a[j]]) + std::fabs(before[b[j]])});
      }
    }
    for (const Isa isa : runnable_isas()) {
      LinearActParams p = problem.params(activation, isa, 2);
      p.is_gated = true;
      p.bias = problem.io_dtype == DType::kBFloat16 ? static_cast<const void*>(narrow.data()) : bias.data();
      const std::string name = std::string(isa_name(isa)) + " gated, rows " + std::to_string(problem.rows);
      report->near(name, problem.run(p, report), want, most * (problem.io_dtype == DType::kBFloat16 ? 1e-2 : 1e-5));
    }
  }
}

void check_refusals(Report* report) {
  const Problem problem(2, 8, 4, DType::kInt8, DType::kFloat32);
  const auto refused = [&](const char* word, auto change) {
    float y[8];
    LinearActParams p = problem.params(Activation::kNone, Isa::kGeneric, 1);
    p.y = y;
    change(&p);
    const Status status = linear_act_forward(p);
    report->that(word, !status.ok() && status.message.find(word) != std::string::npos);
  };
  refused("rows", [](LinearActParams* p) { p->rows = -1; });
  refused("in", [](LinearActParams* p) { p->in = 0; });
  refused("65536", [](LinearActParams* p) { p->in = p->stride_x = 65537; });
  refused("threads", [](LinearActParams* p) { p->threads = 0; });
  refused("weight_dtype", [](LinearActParams* p) { p->weight_dtype = DType::kBFloat16; });
  refused("io_dtype", [](LinearActParams* p) { p->io_dtype = DType::kFloat16; });
  refused("stride_x", [](LinearActParams* p) { p->stride_x = 7; });
  refused("packed", [](LinearActParams* p) { p->packed = nullptr; });
  refused("scales", [](LinearActParams* p) { p->scales = nullptr; });
  refused("out", [](LinearActParams* p) { p->out = 3, p->is_gated = true; });
  refused("y", [](LinearActParams* p) { p->y = nullptr; });
}

}  // namespace

int main() {
  Report report;
  const int64_t sizes[][3] = {{1, 1, 1},    {2, 33, 7},     {13, 64, 96}, {17, 127, 31},
                              {33, 70, 65}, {250, 600, 40}, {0, 5, 5}};
  for (const auto& size : sizes) {
    check_problem({size[0], size[1], size[2], DType::kInt8, DType::kFloat32}, &report);
    check_problem({size[0], size[1], size[2], DType::kInt8, DType::kBFloat16}, &report);
    check_problem({size[0], size[1], size[2], DType::kBFloat16, DType::kBFloat16}, &report);
    check_problem({size[0], size[1], size[2], DType::kFloat32, DType::kFloat32}, &report);
  }
  for (const int64_t out : {32, 96}) {
    check_gated({13, 70, out, DType::kInt8, DType::kFloat32}, &report);
    check_gated({50, 600, out, DType::kBFloat16, DType::kBFloat16}, &report);
    check_gated({13, 33, out, DType::kFloat32, DType::kFloat32}, &report);
  }
  check_refusals(&report);
  return report.finish("test_linear_act");
}
