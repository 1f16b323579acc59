// SPDX-License-Identifier: Apache-2.0
// lstm on the CPU against a plain loop in double, on every instruction set this machine runs.
#include <algorithm>
#include <cstring>

#include "base/testing.h"
#include "lstm/lstm.h"
#include "lstm/testing.h"

using namespace ctxfast;

namespace {

struct Size {
  int64_t B, T, H, P, R;
  bool projection;
};

struct Problem {
  Size size;
  std::vector<float> hh[2], proj[2], h_0, c_0;
  int64_t input;
  std::vector<float> x, ih[2], bias;  // the same x and bias for both directions
  std::vector<int64_t> lengths;
  float cell_clip, proj_clip;
};

struct Result {
  std::vector<float> output, h_n, c_n, cells;
  Status status;
};

double clip(double x, double limit) { return limit > 0 ? std::min(std::max(x, -limit), limit) : x; }

// A row of factors as products of this kind hold it.
std::vector<double> held(std::vector<double> row, DType kind) {
  float most = 0;
  for (double& value : row) {
    value = static_cast<float>(value);
    most = std::max(most, std::fabs(static_cast<float>(value)));
    if (kind != DType::kBFloat16) continue;
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
    float nearest;
    std::memcpy(&nearest, &bits, 4);
    value = nearest;
  }
  for (double& value : row) {
    if (kind == DType::kInt8 && most > 0) value = std::nearbyint(static_cast<float>(value) * (127 / most)) * most / 127;
  }
  return row;
}

double product(const std::vector<double>& x, const std::vector<double>& w) {
  double sum = 0;
  for (size_t k = 0; k < x.size(); ++k) sum += x[k] * w[k];
  return sum;
}

std::vector<std::vector<double>> held_rows(const std::vector<float>& weight, int64_t rows, int64_t size, DType kind) {
  std::vector<std::vector<double>> all;
  for (int64_t i = 0; i < rows; ++i) {
    all.push_back(held({weight.begin() + i * size, weight.begin() + (i + 1) * size}, kind));
  }
  return all;
}

const char* name_of(DType kind) {
  return kind == DType::kFloat32 ? "fp32" : kind == DType::kBFloat16 ? "bf16" : "int8";
}

// Of rounded factors: h near the middle of two steps may go either way, one step in a sum.
double limit_of(DType kind) { return kind == DType::kFloat32 ? 3e-6 : kind == DType::kBFloat16 ? 4e-3 : 2e-2; }

Problem make(const Size& s, uint64_t seed, bool clips, bool has_features = true) {
  Random random(seed);
  const int64_t input = has_features ? random.below(90) : 0;
  Problem p{s, {}, {}, {}, {}, input, {}, {}, {}, {}, clips ? 1.0f : 0.0f, clips ? 0.4f : 0.0f};
  p.x = random.fill(s.B * s.T * p.input, 1.0f);
  p.bias = random.fill(4 * s.H, 3.0f);
  for (int64_t r = 0; r < s.R; ++r) {
    p.hh[r] = random.fill(4 * s.H * s.P, 2.0f / std::sqrt(static_cast<float>(s.P) + 1));
    p.ih[r] = random.fill(4 * s.H * p.input, 2.0f / std::sqrt(static_cast<float>(p.input) + 1));
    p.proj[r] = random.fill(s.P * s.H, 2.0f / std::sqrt(static_cast<float>(s.H) + 1));
  }
  p.h_0 = random.fill(s.R * s.B * s.P, 1.0f);
  p.c_0 = random.fill(s.R * s.B * s.H, 1.0f);
  for (int64_t b = 0; b < s.B; ++b) p.lengths.push_back(random.below(s.T + 1));
  return p;
}

Result run(const Problem& p, Isa isa, DType kind, int64_t threads) {
  const Size& s = p.size;
  LstmParams params;
  params.shape = {s.H, s.P, s.projection, kind};
  std::vector<std::vector<uint32_t>> packed, packed_input;
  Result result;
  for (int64_t r = 0; r < s.R; ++r) {
    packed.emplace_back(lstm_packed_bytes(params.shape) / 4);
    LstmPackParams pack;
    pack.shape = params.shape;
    pack.weight_hh = p.hh[r].data();
    pack.weight_hh_strides[0] = s.P, pack.weight_hh_strides[1] = 1;
    pack.weight_proj = s.projection ? p.proj[r].data() : nullptr;
    pack.weight_proj_strides[0] = s.H, pack.weight_proj_strides[1] = 1;
    pack.packed = packed[r].data();
    result.status = lstm_pack(pack);
    if (!result.status.ok()) return result;
    LstmPackInputParams pack_input;
    pack_input.shape = {s.H, p.input, kind};
    packed_input.emplace_back(lstm_input_packed_bytes(pack_input.shape) / 4);
    pack_input.weight_ih = p.ih[r].data();
    pack_input.weight_ih_strides[0] = p.input, pack_input.weight_ih_strides[1] = 1;
    pack_input.packed = packed_input[r].data();
    pack_input.threads = threads;
    result.status = lstm_pack_input(pack_input);
    if (!result.status.ok()) return result;
    params.x[r] = p.x.data();
    params.x_strides[r][0] = s.T * p.input, params.x_strides[r][1] = p.input;
    params.packed_input[r] = packed_input[r].data();
    params.bias[r] = p.bias.data();
    params.packed[r] = packed[r].data();
  }
  result.output.assign(s.B * s.T * s.R * s.P, NAN);
  result.h_n.assign(s.R * s.B * s.P, NAN);
  result.c_n.assign(s.R * s.B * s.H, NAN);
  result.cells.assign(s.R * s.B * s.T * s.H, NAN);
  params.input = p.input;
  params.batch = s.B, params.steps = s.T, params.directions = s.R;
  params.lengths = p.lengths.data();
  params.h_0 = p.h_0.data(), params.c_0 = p.c_0.data();
  params.cell_clip = p.cell_clip, params.proj_clip = p.proj_clip;
  params.output = result.output.data();
  params.output_strides[0] = s.T * s.R * s.P, params.output_strides[1] = s.R * s.P;
  params.h_n = result.h_n.data(), params.c_n = result.c_n.data(), params.cells = result.cells.data();
  params.threads = threads, params.isa = isa;
  result.status = lstm_forward(params);
  return result;
}

void compare(Report* report, const std::string& what, const Problem& p, const Result& got, DType kind) {
  const Size& s = p.size;
  std::vector<double> output(s.B * s.T * s.R * s.P), h_n(s.R * s.B * s.P), c_n(s.R * s.B * s.H);
  std::vector<double> cells(s.R * s.B * s.T * s.H);
  for (int64_t r = 0; r < s.R; ++r) {
    const auto x = held_rows(p.x, s.B * s.T, p.input, kind), ih = held_rows(p.ih[r], 4 * s.H, p.input, kind);
    const auto hh = held_rows(p.hh[r], 4 * s.H, s.P, kind), proj = held_rows(p.proj[r], s.P, s.H, kind);
    for (int64_t b = 0; b < s.B; ++b) {
      std::vector<double> h(p.h_0.begin() + (r * s.B + b) * s.P, p.h_0.begin() + (r * s.B + b + 1) * s.P);
      std::vector<double> c(p.c_0.begin() + (r * s.B + b) * s.H, p.c_0.begin() + (r * s.B + b + 1) * s.H);
      for (int64_t step = 0; step < p.lengths[b]; ++step) {
        const int64_t t = r == 0 ? step : p.lengths[b] - 1 - step;
        std::vector<double> m(s.H);
        const std::vector<double> read_h = held(h, kind);
        for (int64_t j = 0; j < s.H; ++j) {
          double z[4];
          for (int64_t gate = 0; gate < 4; ++gate) {
            const int64_t n = gate * s.H + j, row = b * s.T + t;
            z[gate] = p.bias[n] + product(x[row], ih[n]) + product(read_h, hh[n]);
          }
          c[j] = clip(sigmoid(z[0]) * std::tanh(z[2]) + sigmoid(z[1]) * c[j], p.cell_clip);
          m[j] = sigmoid(z[3]) * std::tanh(c[j]);
          cells[((r * s.B + b) * s.T + t) * s.H + j] = c[j];
        }
        const std::vector<double> read_m = held(m, kind);
        for (int64_t k = 0; k < s.P; ++k) {
          h[k] = clip(s.projection ? product(read_m, proj[k]) : m[k], p.proj_clip);
          output[((b * s.T + t) * s.R + r) * s.P + k] = h[k];
        }
      }
      std::copy(h.begin(), h.end(), h_n.begin() + (r * s.B + b) * s.P);
      std::copy(c.begin(), c.end(), c_n.begin() + (r * s.B + b) * s.H);
    }
  }
  report->near(what + " output", got.output, output, limit_of(kind));
  report->near(what + " h_n", got.h_n, h_n, limit_of(kind));
  report->near(what + " c_n", got.c_n, c_n, limit_of(kind));
  report->near(what + " cells", got.cells, cells, limit_of(kind));
}

void test(Report* report, const Problem& problem, DType kind) {
  const Size& size = problem.size;
  Result first;
  for (const Isa isa : runnable_isas()) {
    const Result one = run(problem, isa, kind, 1);
    const std::string what = std::string(isa_name(isa)) + " " + name_of(kind) + " B" + std::to_string(size.B) + " T" +
                             std::to_string(size.T) + " H" + std::to_string(size.H) + " P" + std::to_string(size.P);
    report->that(what + " " + one.status.message, one.status.ok());
    if (!one.status.ok()) continue;
    compare(report, what, problem, one, kind);
    const Result many = run(problem, isa, kind, 5);
    report->that(what + " same bits with 5 threads", one.output == many.output && one.c_n == many.c_n);
    if (isa == Isa::kGeneric) first = one;
    const bool exact = kind == DType::kInt8 || (kind == DType::kBFloat16 && isa != Isa::kAmx);
    if (exact) report->that(what + " same bits as generic", one.output == first.output && one.c_n == first.c_n);
  }
}

}  // namespace

int main() {
  const Size sizes[] = {{1, 3, 16, 16, 1, false}, {5, 7, 33, 33, 2, false}, {3, 4, 40, 7, 2, true},
                        {9, 3, 300, 70, 2, true}, {2, 2, 5, 129, 1, true},  {0, 3, 4, 4, 1, false},
                        {3, 0, 4, 4, 2, false},   {2, 3, 0, 5, 1, true},    {2, 3, 5, 0, 1, true},
                        {13, 5, 1, 1, 2, false},  {7, 2, 700, 65, 1, true}, {4, 3, 200, 200, 1, false}};
  Report report;
  uint64_t seed = 0;
  for (const Size& size : sizes) {
    for (const bool clips : {false, true}) {
      const Problem problem = make(size, ++seed, clips);
      for (const DType kind : {DType::kFloat32, DType::kBFloat16, DType::kInt8}) {
        test(&report, problem, kind);
      }
    }
  }
  // x is then at no address.
  const Problem empty = make(sizes[2], 1, false, false);
  for (const DType kind : {DType::kFloat32, DType::kBFloat16, DType::kInt8}) test(&report, empty, kind);
  Problem bad = make(sizes[1], 1, false);
  bad.lengths[2] = 8;
  const Status status = run(bad, Isa::kGeneric, DType::kFloat32, 1).status;
  report.that("length past the end", status.code == Code::kInvalidArgument &&
                                         status.message.find("lengths[2] is 8; expected 0..7") != std::string::npos);
  return report.finish("test_lstm");
}
