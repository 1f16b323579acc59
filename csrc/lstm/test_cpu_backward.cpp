// SPDX-License-Identifier: Apache-2.0
// lstm's backward on the CPU against a plain loop in double, on every instruction set this machine runs.
#include <algorithm>

#include "base/testing.h"
#include "lstm/lstm.h"
#include "lstm/testing.h"

using namespace ctxfast;

namespace {

struct Size {
  int64_t B, T, H, P;
  bool projection, reverse, clips, states;
};

// What the kernel is given: any z, cells and output do, related or not.
struct Problem {
  Size s;
  std::vector<float> hh, proj, z, cells, c_0, output, grad_output, grad_h_n, grad_c_n;
  std::vector<int64_t> lengths;
};

struct Gradients {
  std::vector<double> z, hidden, m, bias, h_0, c_0;
};

Problem make(const Size& s, uint64_t seed) {
  Random random(seed);
  Problem p{s, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  p.hh = random.fill(4 * s.H * s.P, 2.0f / std::sqrt(static_cast<float>(4 * s.H) + 1));
  p.proj = random.fill(s.P * s.H, 2.0f / std::sqrt(static_cast<float>(s.P) + 1));
  p.z = random.fill(s.B * s.T * 4 * s.H, 3.0f);
  p.cells = random.fill(s.B * s.T * s.H, 1.5f);
  p.c_0 = random.fill(s.states ? s.B * s.H : 0, 1.0f);
  p.output = random.fill(s.B * s.T * s.P, 1.0f);
  p.grad_output = random.fill(s.B * s.T * s.P, 1.0f);
  p.grad_h_n = random.fill(s.B * s.P, 1.0f);
  p.grad_c_n = random.fill(s.B * s.H, 1.0f);
  for (int64_t b = 0; b < s.B; ++b) p.lengths.push_back(random.below(s.T + 1));
  return p;
}

constexpr float kCellClip = 1.0f, kProjClip = 0.8f;

Gradients expected(const Problem& p) {
  const Size& s = p.s;
  Gradients g{std::vector<double>(p.z.size()),
              std::vector<double>(p.output.size()),
              std::vector<double>(s.projection ? p.cells.size() : 0),
              std::vector<double>(4 * s.H),
              std::vector<double>(s.B * s.P),
              std::vector<double>(s.B * s.H)};
  for (int64_t b = 0; b < s.B; ++b) {
    std::vector<double> dh(p.grad_h_n.begin() + b * s.P, p.grad_h_n.begin() + (b + 1) * s.P);
    std::vector<double> dc(p.grad_c_n.begin() + b * s.H, p.grad_c_n.begin() + (b + 1) * s.H);
    for (int64_t step = p.lengths[b] - 1; step >= 0; --step) {
      const auto time = [&](int64_t n) { return s.reverse ? p.lengths[b] - 1 - n : n; };
      const int64_t at = b * s.T + time(step);
      for (int64_t k = 0; k < s.P; ++k) {
        dh[k] += p.grad_output[at * s.P + k];
        if (s.clips && !(std::fabs(p.output[at * s.P + k]) < kProjClip)) dh[k] = 0;
        g.hidden[at * s.P + k] = dh[k];
      }
      for (int64_t j = 0; j < s.H; ++j) {
        double dm = s.projection ? 0 : dh[j];
        for (int64_t k = 0; s.projection && k < s.P; ++k) dm += dh[k] * p.proj[k * s.H + j];
        const float* z = p.z.data() + at * 4 * s.H + j;
        const double in = sigmoid(z[0]), forget = sigmoid(z[s.H]), enter = std::tanh(z[2 * s.H]);
        const double out = sigmoid(z[3 * s.H]), c = p.cells[at * s.H + j], bent = std::tanh(c);
        double before = 0;
        if (step > 0) before = p.cells[(b * s.T + time(step - 1)) * s.H + j];
        if (step == 0 && s.states) before = p.c_0[b * s.H + j];
        double d = dc[j] + dm * out * (1 - bent * bent);
        if (s.clips && !(std::fabs(c) < kCellClip)) d = 0;
        double* grad = g.z.data() + at * 4 * s.H + j;
        grad[0] = d * enter * in * (1 - in);
        grad[s.H] = d * before * forget * (1 - forget);
        grad[2 * s.H] = d * in * (1 - enter * enter);
        grad[3 * s.H] = dm * bent * out * (1 - out);
        for (int gate = 0; gate < 4; ++gate) g.bias[gate * s.H + j] += grad[gate * s.H];
        dc[j] = d * forget;
        if (s.projection) g.m[at * s.H + j] = out * bent;
      }
      for (int64_t k = 0; k < s.P; ++k) {
        dh[k] = 0;
        for (int64_t n = 0; n < 4 * s.H; ++n) dh[k] += g.z[at * 4 * s.H + n] * p.hh[n * s.P + k];
      }
    }
    std::copy(dh.begin(), dh.end(), g.h_0.begin() + b * s.P);
    std::copy(dc.begin(), dc.end(), g.c_0.begin() + b * s.H);
  }
  return g;
}

std::vector<float> rounded(std::vector<float> values) {
  for (float& value : values) value = to_float(to_bf16(value));
  return values;
}

// An array of float32 or bfloat16.
struct Array {
  std::vector<float> wide;
  std::vector<uint16_t> narrow;
  Array(size_t size, bool is_narrow) : wide(is_narrow ? 0 : size, NAN), narrow(is_narrow ? size : 0, 0x7fc0) {}
  Array(const std::vector<float>& values, bool is_narrow) : Array(values.size(), is_narrow) {
    for (size_t i = 0; i < values.size(); ++i)
      is_narrow ? void(narrow[i] = to_bf16(values[i])) : void(wide[i] = values[i]);
  }
  void* data() { return narrow.empty() ? static_cast<void*>(wide.data()) : narrow.data(); }
  std::vector<float> floats() const {
    std::vector<float> values = wide;
    for (const uint16_t bits : narrow) values.push_back(to_float(bits));
    return values;
  }
};

void test(Report* report, Problem p, DType dtype) {
  const bool narrow = dtype == DType::kBFloat16;
  if (narrow) p.hh = rounded(p.hh), p.proj = rounded(p.proj), p.z = rounded(p.z);
  const Size& s = p.s;
  const Gradients want = expected(p);
  LstmPackParams pack;
  pack.shape = {s.H, s.P, s.projection, dtype};
  std::vector<uint32_t> packed(lstm_backward_packed_bytes(pack.shape) / 4);
  pack.weight_hh = p.hh.data(), pack.weight_hh_strides[0] = s.P, pack.weight_hh_strides[1] = 1;
  pack.weight_proj = s.projection ? p.proj.data() : nullptr;
  pack.weight_proj_strides[0] = s.H, pack.weight_proj_strides[1] = 1;
  pack.packed = packed.data();
  report->that("pack", lstm_pack_backward(pack).ok());
  Array saved_z(p.z, narrow);
  for (const Isa isa : runnable_isas()) {
    std::vector<float> first;
    for (const int64_t threads : {1, 5}) {
      Array z(want.z.size(), narrow), hidden(want.hidden.size(), narrow), m(want.m.size(), narrow);
      std::vector<float> bias(want.bias.size(), NAN), h_0(want.h_0.size(), NAN), c_0(want.c_0.size(), NAN);
      LstmBackwardParams params;
      params.shape = pack.shape;
      params.batch = s.B, params.steps = s.T, params.reverse = s.reverse;
      params.cell_clip = s.clips ? kCellClip : 0, params.proj_clip = s.clips ? kProjClip : 0;
      params.lengths = p.lengths.data(), params.packed = packed.data();
      params.z = saved_z.data(), params.cells = p.cells.data(), params.c_0 = s.states ? p.c_0.data() : nullptr;
      params.output = p.output.data(), params.grad_output = p.grad_output.data();
      params.output_strides[0] = params.grad_output_strides[0] = s.T * s.P;
      params.output_strides[1] = params.grad_output_strides[1] = s.P;
      params.grad_h_n = p.grad_h_n.data(), params.grad_c_n = p.grad_c_n.data();
      params.grad_z = z.data(), params.grad_hidden = hidden.data(), params.m = s.projection ? m.data() : nullptr;
      params.grad_bias = bias.data(), params.grad_h_0 = h_0.data(), params.grad_c_0 = c_0.data();
      params.threads = threads, params.isa = isa;
      const Status status = lstm_backward(params);
      const std::string what = std::string(isa_name(isa)) + (narrow ? " bfloat16" : " float32") + " B" +
                               std::to_string(s.B) + " T" + std::to_string(s.T) + " H" + std::to_string(s.H) + " P" +
                               std::to_string(s.P);
      const double loose = narrow ? 2e-2 : 1e-5;  // gradients are 1 to 4 here
      report->that(what + " " + status.message, status.ok());
      report->near(what + " z", z.floats(), want.z, loose);
      report->near(what + " hidden", hidden.floats(), want.hidden, loose);
      report->near(what + " m", m.floats(), want.m, narrow ? 2e-3 : 1e-6);
      report->near(what + " bias", bias, want.bias, loose);
      report->near(what + " h_0", h_0, want.h_0, loose);
      report->near(what + " c_0", c_0, want.c_0, loose);
      std::vector<float> all = z.floats();
      all.insert(all.end(), bias.begin(), bias.end());
      if (threads > 1) report->that(what + " same bits with 5 threads", all == first);
      first = all;
    }
  }
}

}  // namespace

int main() {
  const Size sizes[] = {{1, 3, 16, 16, false, false, false, false}, {5, 6, 33, 33, false, true, true, true},
                        {3, 4, 40, 7, true, true, false, true},     {9, 3, 300, 70, true, false, true, true},
                        {2, 2, 5, 129, true, false, true, false},   {3, 0, 4, 4, false, true, false, true},
                        {0, 3, 4, 4, false, false, false, true},    {7, 3, 600, 65, true, true, true, true}};
  Report report;
  uint64_t seed = 0;
  for (const Size& size : sizes) {
    ++seed;
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) test(&report, make(size, seed), dtype);
  }
  return report.finish("test_lstm_backward");
}
