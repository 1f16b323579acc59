// SPDX-License-Identifier: Apache-2.0
// lstm step by step, forward and backward, against a plain loop in double: sizes that fit no tile, lengths, states,
// clips. Gradients in float32 are held to the loop's; those of 16 bits to be finite and the same twice.

#include <algorithm>
#include <cstring>

#include "base/device.cuh"
#include "base/testing.cuh"
#include "lstm/step.h"
#include "lstm/step_pack.h"

using namespace ctxfast;

constexpr const char* kProgram = CTXFAST_PROGRAM("test_lstm_step");

namespace {

template <typename V>
V* device_garbage(size_t count) {
  return device_bytes<V>(count, 0xff);
}
template <typename V>
std::vector<float> floats(const V* device, size_t count) {
  return as_floats(to_host(device, count));
}

struct Sizes {
  int batch, steps, hidden, size, directions;
  float clip;
};

struct Matrix {
  int rows, columns;
  std::vector<double> at;
  double get(int row, int column) const { return at[row * columns + column]; }
};

double squash(double x) { return 1 / (1 + std::exp(-x)); }
double clipped(double x, double bound) { return bound > 0 ? std::min(std::max(x, -bound), bound) : x; }

template <typename T>
void test(Report* report, const char* name, DType dtype, const Sizes& s, double eps) {
  const int B = s.batch, T_ = s.steps, H = s.hidden, P = s.size, R = s.directions;
  const bool projected = P != H;
  const std::string what = std::string(name) + " B" + std::to_string(B) + " T" + std::to_string(T_) + " H" +
                           std::to_string(H) + " P" + std::to_string(P) + " R" + std::to_string(R);
  Random random(B + 10 * T_ + 100 * H + P);
  // Values that T holds.
  const auto draw = [&](size_t count, float scale) {
    std::vector<double> values(count);
    for (double& value : values) value = as_float(static_cast<T>(random.uniform(scale)));
    return values;
  };
  const auto narrow = [](const std::vector<double>& values) {
    std::vector<T> found;
    for (const double value : values) found.push_back(static_cast<T>(static_cast<float>(value)));
    return found;
  };
  const auto single = [](const std::vector<double>& values) {
    return std::vector<float>(values.begin(), values.end());
  };
  std::vector<int64_t> lengths(B);
  for (int64_t& length : lengths) length = random.below(T_ + 1);
  if (B > 0) lengths[0] = T_;
  const auto h_0 = draw(size_t(R) * B * P, 0.5f), c_0 = draw(size_t(R) * B * H, 0.5f);
  const auto grad_output = draw(size_t(B) * T_ * R * P, 1), grad_h_n = draw(size_t(R) * B * P, 1),
             grad_c_n = draw(size_t(R) * B * H, 1);
  LstmStepForwardParams f;
  LstmStepBackwardParams b;
  LstmStepPackParams w;
  f.shape = b.shape = w.shape = {B, T_, H, P, R, projected, dtype};
  f.cell_clip = b.cell_clip = f.proj_clip = b.proj_clip = s.clip;
  f.lengths = b.lengths = to_device(lengths);
  f.h_0 = to_device(narrow(h_0));
  f.c_0 = b.c_0 = to_device(single(c_0));
  T* output = device_garbage<T>(size_t(B) * T_ * R * P);
  T* h_n = device_garbage<T>(size_t(R) * B * P);
  f.output = output;
  f.h_n = h_n;
  f.c_n = device_garbage<float>(size_t(R) * B * H);
  f.cells = device_garbage<float>(size_t(R) * B * T_ * H);
  f.workspace_bytes = lstm_step_workspace_bytes(f.shape, false);
  f.workspace = device_garbage<unsigned char>(f.workspace_bytes);
  b.cells = f.cells;
  b.output = output;
  b.grad_output = to_device(narrow(grad_output));
  b.grad_h_n = to_device(single(grad_h_n));
  b.grad_c_n = to_device(single(grad_c_n));
  b.grad_hidden = device_garbage<T>(size_t(R) * B * T_ * P);
  b.grad_h_0 = device_garbage<float>(size_t(R) * B * P);
  b.grad_c_0 = device_garbage<float>(size_t(R) * B * H);
  b.workspace_bytes = lstm_step_workspace_bytes(b.shape, true);
  b.workspace = device_garbage<unsigned char>(b.workspace_bytes);

  std::vector<double> want(size_t(B) * T_ * R * P), want_h(size_t(R) * B * P), want_c(size_t(R) * B * H),
      want_dh(size_t(R) * B * P), want_dc(size_t(R) * B * H);
  std::vector<std::vector<double>> want_dz(R);
  for (int r = 0; r < R; ++r) {
    const auto gates = draw(size_t(B) * T_ * H * 4, 1);
    const Matrix hh{4 * H, P, draw(size_t(4) * H * P, 2 / std::sqrt(float(P)))};
    const Matrix proj{P, H, projected ? draw(size_t(P) * H, 3 / std::sqrt(float(H))) : std::vector<double>()};
    f.gates[r] = to_device(narrow(gates));
    // The projection lies column by column: the packing knows strides.
    w.weight_hh[r] = to_device(narrow(hh.at));
    w.weight_hh_strides[r][0] = P, w.weight_hh_strides[r][1] = 1;
    std::vector<double> turned;
    for (int k = 0; projected && k < H; ++k) {
      for (int row = 0; row < P; ++row) turned.push_back(proj.get(row, k));
    }
    if (projected) w.weight_proj[r] = to_device(narrow(turned));
    w.weight_proj_strides[r][0] = 1, w.weight_proj_strides[r][1] = P;
    f.gates_strides[r][0] = b.z_strides[r][0] = int64_t{T_} * H * 4;
    f.gates_strides[r][1] = b.z_strides[r][1] = H * 4;
    b.grad_gates[r] = device_garbage<T>(size_t(B) * T_ * H * 4);
    std::vector<double> z_all(gates);
    want_dz[r].assign(size_t(B) * T_ * H * 4, 0.0);
    for (int row = 0; row < B; ++row) {
      const int length = static_cast<int>(lengths[row]);
      std::vector<double> h(h_0.begin() + (size_t(r) * B + row) * P, h_0.begin() + (size_t(r) * B + row + 1) * P),
          c(c_0.begin() + (size_t(r) * B + row) * H, c_0.begin() + (size_t(r) * B + row + 1) * H);
      std::vector<std::vector<double>> cells(T_ + 1), raw_c(T_ + 1), raw_h(T_ + 1), before(T_ + 1);
      for (int step = 0; step < length; ++step) {
        const int t = r == 0 ? step : length - 1 - step;
        double* z = &z_all[(size_t(row) * T_ + t) * H * 4];
        before[t] = c;
        raw_c[t].resize(H);
        std::vector<double> m(H), next(P);
        for (int cell = 0; cell < H; ++cell) {
          for (int gate = 0; gate < 4; ++gate) {
            for (int k = 0; k < P; ++k) z[gate * H + cell] += hh.get(gate * H + cell, k) * h[k];
          }
          raw_c[t][cell] = squash(z[cell]) * std::tanh(z[2 * H + cell]) + squash(z[H + cell]) * c[cell];
          c[cell] = clipped(raw_c[t][cell], s.clip);
          m[cell] = squash(z[3 * H + cell]) * std::tanh(c[cell]);
        }
        for (int p = 0; p < P; ++p) {
          next[p] = projected ? 0 : m[p];
          for (int k = 0; projected && k < H; ++k) next[p] += proj.get(p, k) * m[k];
        }
        raw_h[t] = next;
        cells[t] = c;
        for (int p = 0; p < P; ++p) {
          h[p] = clipped(next[p], s.clip);
          want[((size_t(row) * T_ + t) * R + r) * P + p] = h[p];
        }
      }
      std::copy(h.begin(), h.end(), want_h.begin() + (size_t(r) * B + row) * P);
      std::copy(c.begin(), c.end(), want_c.begin() + (size_t(r) * B + row) * H);
      std::vector<double> dh(grad_h_n.begin() + (size_t(r) * B + row) * P,
                             grad_h_n.begin() + (size_t(r) * B + row + 1) * P),
          dc(grad_c_n.begin() + (size_t(r) * B + row) * H, grad_c_n.begin() + (size_t(r) * B + row + 1) * H);
      for (int step = length - 1; step >= 0; --step) {
        const int t = r == 0 ? step : length - 1 - step;
        const double* z = &z_all[(size_t(row) * T_ + t) * H * 4];
        double* dz = &want_dz[r][(size_t(row) * T_ + t) * H * 4];
        for (int p = 0; p < P; ++p) {
          dh[p] += grad_output[((size_t(row) * T_ + t) * R + r) * P + p];
          if (s.clip > 0 && std::fabs(raw_h[t][p]) >= s.clip) dh[p] = 0;
        }
        for (int cell = 0; cell < H; ++cell) {
          double dm = projected ? 0 : dh[cell];
          for (int p = 0; projected && p < P; ++p) dm += proj.get(p, cell) * dh[p];
          const double i = squash(z[cell]), keep = squash(z[H + cell]), g = std::tanh(z[2 * H + cell]),
                       o = squash(z[3 * H + cell]), tanh_c = std::tanh(cells[t][cell]);
          dc[cell] += dm * o * (1 - tanh_c * tanh_c);
          if (s.clip > 0 && std::fabs(raw_c[t][cell]) >= s.clip) dc[cell] = 0;
          dz[cell] = dc[cell] * g * i * (1 - i);
          dz[H + cell] = dc[cell] * before[t][cell] * keep * (1 - keep);
          dz[2 * H + cell] = dc[cell] * i * (1 - g * g);
          dz[3 * H + cell] = dm * tanh_c * o * (1 - o);
          dc[cell] *= keep;
        }
        for (int p = 0; p < P; ++p) {
          dh[p] = 0;
          for (int cell = 0; cell < H; ++cell) {
            for (int gate = 0; gate < 4; ++gate) dh[p] += hh.get(gate * H + cell, p) * dz[gate * H + cell];
          }
        }
      }
      std::copy(dh.begin(), dh.end(), want_dh.begin() + (size_t(r) * B + row) * P);
      std::copy(dc.begin(), dc.end(), want_dc.begin() + (size_t(r) * B + row) * H);
    }
    b.z[r] = to_device(narrow(z_all));
  }

  // Packed over garbage, and again where nothing has changed: the same bits.
  for (const bool back : {false, true}) {
    w.backward = back;
    w.packed_bytes = lstm_step_packed_bytes(w.shape, back);
    w.packed = device_garbage<unsigned char>(w.packed_bytes);
    (back ? b.packed : f.packed) = w.packed;
    std::vector<unsigned char> before;
    for (const bool known : {false, true}) {
      w.is_known = known;
      const Status packed = lstm_step_pack(w, nullptr);
      report->that(what + " " + packed.message, packed.ok());
      must(cudaDeviceSynchronize());
      const auto now = to_host(static_cast<const unsigned char*>(w.packed), w.packed_bytes);
      if (known) report->that(what + " packed twice", now == before);
      before = now;
    }
  }
  const Status forward = lstm_step_forward(f, nullptr);
  report->that(what + " " + forward.message, forward.ok());
  must(cudaDeviceSynchronize());
  report->near(what + " output", floats(output, want.size()), want, eps);
  report->near(what + " h_n", floats(h_n, want_h.size()), want_h, eps);
  report->near(what + " c_n", floats(f.c_n, want_c.size()), want_c, eps * 2);

  std::vector<std::vector<float>> twice[2];
  for (auto& found : twice) {
    const Status backward = lstm_step_backward(b, nullptr);
    report->that(what + " " + backward.message, backward.ok());
    must(cudaDeviceSynchronize());
    for (int r = 0; r < R; ++r) found.push_back(floats(static_cast<const T*>(b.grad_gates[r]), want_dz[r].size()));
    found.push_back(floats(b.grad_h_0, want_dh.size()));
    found.push_back(floats(b.grad_c_0, want_dc.size()));
  }
  for (size_t i = 0; i < twice[0].size(); ++i) {
    report->that(what + " same bits " + std::to_string(i), twice[0][i] == twice[1][i]);
    const auto& wanted = i < size_t(R) ? want_dz[i] : i == size_t(R) ? want_dh : want_dc;
    // In 16 bits values near a clip fall on either side of it.
    if (sizeof(T) == 4 || s.clip == 0)
      report->near(what + " gradient " + std::to_string(i), twice[0][i], wanted, eps * 30);
  }
}

// What is packed of weights that change: all of what was looked at, and nothing that was not.
void changes(Report* report, int hidden, int size, bool is_large) {
  using T = __half;
  LstmStepPackParams w;
  w.shape = {1, 1, hidden, size, 1, size != hidden, DType::kFloat16};
  Random random(hidden);
  const auto draw = [&](int64_t count) {
    std::vector<T> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(static_cast<T>(random.uniform(1)));
    return values;
  };
  std::vector<T> hh = draw(int64_t{4} * hidden * size), proj = draw(int64_t{size} * hidden);
  T* device_hh = to_device(hh);
  T* device_proj = to_device(proj);
  w.weight_hh[0] = device_hh;
  w.weight_hh_strides[0][0] = size, w.weight_hh_strides[0][1] = 1;
  w.weight_proj[0] = device_proj;
  w.weight_proj_strides[0][0] = hidden, w.weight_proj_strides[0][1] = 1;
  w.packed_bytes = lstm_step_packed_bytes(w.shape, false);
  const auto pack = [&](void* to, bool known) {
    w.packed = to, w.is_known = known;
    const Status status = lstm_step_pack(w, nullptr);
    report->that("changes " + status.message, status.ok());
    must(cudaDeviceSynchronize());
    // Without the flags at the end.
    return to_host(static_cast<const unsigned char*>(to), lstm_step::packed_places(w.shape, false).changed);
  };
  const auto put = [&](T* to, const std::vector<T>& values) {
    must(cudaMemcpy(static_cast<void*>(to), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  };
  auto* kept = device_garbage<unsigned char>(w.packed_bytes);
  auto* fresh = device_garbage<unsigned char>(w.packed_bytes);
  const std::string what = "weights of " + std::to_string(hidden) + " cells: ";
  pack(kept, false);
  // One entry: of a weight of at most 160 KiB it is seen, of a larger one where a sample lies.
  hh[0] = static_cast<T>(3.0f);
  put(device_hh, hh);
  report->that(what + "an entry in the sample", pack(kept, true) == pack(fresh, false));
  const int unseen = size - 1;  // the end of the first row
  hh[unseen] = static_cast<T>(4.0f);
  put(device_hh, hh);
  report->that(what + "an entry outside it", (pack(kept, true) != pack(fresh, false)) == is_large);
  for (int row = 0; row < 4 * hidden; ++row) hh[int64_t{row} * size + 1] = static_cast<T>(5.0f);  // a column
  put(device_hh, hh);
  report->that(what + "a column", pack(kept, true) == pack(fresh, false));
  if (size == hidden) return;
  for (int k = 0; k < hidden; ++k) proj[hidden + k] = static_cast<T>(6.0f);  // a row, of the other matrix
  put(device_proj, proj);
  report->that(what + "a row", pack(kept, true) == pack(fresh, false));
}

}  // namespace

int main() {
  if (!has_gpu(kProgram)) return 0;
  set_schedule(3);
  Report report;
  std::vector<Sizes> sizes = {{1, 1, 4, 4, 1, 0}, {3, 3, 7, 7, 2, 0}, {9, 2, 13, 5, 2, 0.4f}, {2, 4, 40, 24, 1, 0}};
  if (!is_small()) {
    sizes.push_back({33, 2, 20, 20, 2, 0.5f});
    sizes.push_back({8, 3, 96, 33, 2, 0});
    sizes.push_back({2, 0, 8, 8, 2, 0});
    sizes.push_back({0, 3, 8, 8, 1, 0});
  }
  for (const Sizes& s : sizes) {
    test<float>(&report, "fp32", DType::kFloat32, s, 2e-5);
    test<__half>(&report, "fp16", DType::kFloat16, s, 4e-3);
    test<__nv_bfloat16>(&report, "bf16", DType::kBFloat16, s, 3e-2);
  }
  changes(&report, 24, 24, false);
  changes(&report, 256, 96, true);
  return report.finish(kProgram);
}
