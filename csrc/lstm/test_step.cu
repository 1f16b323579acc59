// SPDX-License-Identifier: Apache-2.0
// lstm step by step, forward and backward, against a plain loop in double: sizes that fit no tile, lengths, states,
// clips. Gradients in float32 are held to the loop's; those of 16 bits to be finite and the same twice.

#include <algorithm>
#include <cstring>

#include "base/device.cuh"
#include "base/testing.cuh"
#include "lstm/step.h"

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

// A matrix of doubles; the order that cuda_step.py packs, written down a second time.
struct Matrix {
  int rows, columns;
  std::vector<double> at;
  double get(int row, int column) const { return row < rows && column < columns ? at[row * columns + column] : 0.0; }
};

template <typename T>
std::vector<T> pack(const Matrix& m) {
  const int tiles = (m.rows + 15) / 16, k = (m.columns + 31) / 32 * 32;
  std::vector<T> packed;
  if (sizeof(T) == 4) {
    for (int row = 0; row < 16 * tiles; ++row) {
      for (int column = 0; column < k; ++column)
        packed.push_back(from_float<T>(static_cast<float>(m.get(row, column))));
    }
    return packed;
  }
  for (int tile = 0; tile < tiles; ++tile) {
    for (int pair = 0; pair < k / 32; ++pair) {
      for (int step = 0; step < 2; ++step) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int j = 0; j < 8; ++j) {  // four registers of two
            const int row = 16 * tile + lane / 4 + 8 * (j / 2 % 2);
            const int column = 32 * pair + 8 * (lane % 4) + 4 * step + 2 * (j / 4) + j % 2;
            packed.push_back(from_float<T>(static_cast<float>(m.get(row, column))));
          }
        }
      }
    }
  }
  return packed;
}

// Rows in tiles of 4 gates x 4 cells.
Matrix gate_tiles(const Matrix& hh) {
  const int hidden = hh.rows / 4, tiles = (hidden + 3) / 4;
  Matrix tiled{16 * tiles, hh.columns, std::vector<double>(16 * tiles * hh.columns)};
  for (int cell = 0; cell < hidden; ++cell) {
    for (int gate = 0; gate < 4; ++gate) {
      for (int k = 0; k < hh.columns; ++k) {
        tiled.at[(16 * (cell / 4) + 4 * gate + cell % 4) * hh.columns + k] = hh.get(gate * hidden + cell, k);
      }
    }
  }
  return tiled;
}
Matrix transposed(const Matrix& m, bool by_cells) {
  Matrix t{m.columns, m.rows, std::vector<double>(m.at.size())};
  const int hidden = m.rows / 4;
  for (int row = 0; row < m.rows; ++row) {
    const int to = by_cells ? 4 * (row % hidden) + row / hidden : row;
    for (int column = 0; column < m.columns; ++column) t.at[column * m.rows + to] = m.get(row, column);
  }
  return t;
}

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
    for (double& value : values) value = to_float(from_float<T>(random.uniform(scale)));
    return values;
  };
  const auto narrow = [](const std::vector<double>& values) {
    std::vector<T> found;
    for (const double value : values) found.push_back(from_float<T>(static_cast<float>(value)));
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
  f.shape = b.shape = {B, T_, H, P, R, projected, dtype};
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
    f.packed_gates[r] = to_device(pack<T>(gate_tiles(hh)));
    b.packed_gates_t[r] = to_device(pack<T>(transposed(hh, true)));
    if (projected) {
      f.packed_proj[r] = to_device(pack<T>(proj));
      b.packed_proj_t[r] = to_device(pack<T>(transposed(proj, false)));
    }
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
            for (int k = 0; k < P; ++k) z[4 * cell + gate] += hh.get(gate * H + cell, k) * h[k];
          }
          raw_c[t][cell] = squash(z[4 * cell]) * std::tanh(z[4 * cell + 2]) + squash(z[4 * cell + 1]) * c[cell];
          c[cell] = clipped(raw_c[t][cell], s.clip);
          m[cell] = squash(z[4 * cell + 3]) * std::tanh(c[cell]);
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
          const double i = squash(z[4 * cell]), keep = squash(z[4 * cell + 1]), g = std::tanh(z[4 * cell + 2]),
                       o = squash(z[4 * cell + 3]), tanh_c = std::tanh(cells[t][cell]);
          dc[cell] += dm * o * (1 - tanh_c * tanh_c);
          if (s.clip > 0 && std::fabs(raw_c[t][cell]) >= s.clip) dc[cell] = 0;
          dz[4 * cell] = dc[cell] * g * i * (1 - i);
          dz[4 * cell + 1] = dc[cell] * before[t][cell] * keep * (1 - keep);
          dz[4 * cell + 2] = dc[cell] * i * (1 - g * g);
          dz[4 * cell + 3] = dm * tanh_c * o * (1 - o);
          dc[cell] *= keep;
        }
        for (int p = 0; p < P; ++p) {
          dh[p] = 0;
          for (int cell = 0; cell < H; ++cell) {
            for (int gate = 0; gate < 4; ++gate) dh[p] += hh.get(gate * H + cell, p) * dz[4 * cell + gate];
          }
        }
      }
      std::copy(dh.begin(), dh.end(), want_dh.begin() + (size_t(r) * B + row) * P);
      std::copy(dc.begin(), dc.end(), want_dc.begin() + (size_t(r) * B + row) * H);
    }
    b.z[r] = to_device(narrow(z_all));
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
  return report.finish(kProgram);
}
