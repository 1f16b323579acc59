// SPDX-License-Identifier: Apache-2.0
// The persistent backward recurrence against a plain loop in double: sizes, batch tiles, lengths, states, clips, the
// same bits twice. On the emulator: under random schedules with late stores, the same bits under each.
// An argument asks for more: "all" for every batch and number of steps, "large" for 4096 cells and 512 outputs.

#include <cstring>
#include <memory>

#include "base/testing.cuh"
#include "lstm/persistent_backward.h"
#include "lstm/testing.h"

using namespace ctxfast;

constexpr const char* kProgram = CTXFAST_PROGRAM("test_lstm_persistent_backward");

namespace {

struct Gradients {
  std::vector<double> gates, hidden, h_0, c_0;
};

template <typename T>
void test(Report* report, const char* dtype_name, DType dtype, double eps, const PersistentSizes& z, int schedules) {
  const int64_t B = z.B, steps = z.T, H = z.H, P = z.P, R = z.R;
  const std::string what = std::string(dtype_name) + " " + z.name();
  Random random(B + 31 * steps + 7 * H);
  const LstmPersistentBackwardPlan plan = lstm_persistent_backward_plan(B, H, P, z.projected, R);
  report->that(what + " " + plan.refusal, plan.refusal.empty());
  LstmPersistentBackwardParams p;
  p.batch = B, p.steps = steps, p.hidden = H, p.size = P, p.directions = R, p.has_proj = z.projected;
  p.dtype = dtype, p.cell_clip = z.cell_clip, p.proj_clip = z.proj_clip;

  std::vector<int64_t> lengths(B, steps);
  for (int64_t b = 0; z.ragged && b < B; ++b) lengths[b] = b == 1 ? 0 : random.below(steps + 1);
  const float of_weights = 1.5f / std::sqrt(static_cast<float>(P)), of_proj = 3.0f / std::sqrt(static_cast<float>(H));
  std::vector<std::vector<float>> gates(R), hh(R), proj(R);
  std::vector<std::unique_ptr<Device<T>>> device_z, device_hh, device_proj, device_gates;
  for (int64_t r = 0; r < R; ++r) {
    gates[r] = random.fill(B * steps * H * 4, 2);
    hh[r] = random.fill(4 * H * P, of_weights);
    proj[r] = random.fill(z.projected ? P * H : 0, of_proj);
    device_hh.push_back(std::make_unique<Device<T>>(rounded<T>(&hh[r])));
    device_proj.push_back(std::make_unique<Device<T>>(rounded<T>(&proj[r])));
    device_z.push_back(std::make_unique<Device<T>>(rounded<T>(&gates[r])));
    device_gates.push_back(std::make_unique<Device<T>>(B * steps * H * 4));
    p.weight_hh[r] = device_hh[r]->data;
    if (z.projected) p.weight_proj[r] = device_proj[r]->data;
    p.z[r] = device_z[r]->data;
    p.z_strides[r][0] = steps * H * 4, p.z_strides[r][1] = H * 4;
    p.grad_gates[r] = device_gates[r]->data;
  }
  std::vector<float> cells = random.fill(R * B * steps * H, 1.2f), c_0 = random.fill(R * B * H, 1);
  std::vector<float> output = random.fill(B * steps * R * P, 0.6f), grad_output = random.fill(B * steps * R * P, 1);
  std::vector<float> grad_h_n = random.fill(R * B * P, 1), grad_c_n = random.fill(R * B * H, 1);
  for (float& c : cells) {
    if (z.cell_clip > 0) c = std::fmin(std::fmax(c, -z.cell_clip), z.cell_clip);
  }
  for (float& h : output) {
    if (z.proj_clip > 0) h = std::fmin(std::fmax(h, -z.proj_clip), z.proj_clip);
  }
  const Device<T> device_output(rounded<T>(&output)), device_grad(rounded<T>(&grad_output));
  const Device<float> device_cells(cells), device_c_0(c_0), device_h_n(grad_h_n), device_c_n(grad_c_n);
  const Device<int64_t> device_lengths(lengths);
  const Device<T> hidden(R * B * steps * P);
  const Device<float> h_0(R * B * P), dc_0(R * B * H);
  const Device<unsigned char> workspace(plan.workspace_bytes);
  p.cells = device_cells.data;
  p.c_0 = z.states ? device_c_0.data : nullptr;
  p.output = device_output.data, p.grad_output = device_grad.data;
  for (int64_t* strides : {p.output_strides, p.grad_output_strides}) strides[0] = steps * R * P, strides[1] = R * P;
  p.grad_h_n = z.states ? device_h_n.data : nullptr;
  p.grad_c_n = z.states ? device_c_n.data : nullptr;
  p.lengths = z.ragged ? device_lengths.data : nullptr;
  p.grad_hidden = hidden.data, p.grad_h_0 = h_0.data, p.grad_c_0 = dc_0.data;
  p.workspace = workspace.data, p.workspace_bytes = plan.workspace_bytes;

  std::vector<std::vector<float>> first;
  for (int schedule = 0; schedule < schedules; ++schedule) {
    set_schedule(static_cast<uint64_t>(schedule) * 977 * (B + steps));
    for (const auto& tensor : device_gates) must(cudaMemset(tensor->data, 0xEE, tensor->count * sizeof(T)));
    must(cudaMemset(h_0.data, 0xEE, h_0.count * 4));
    must(cudaMemset(workspace.data, 0x11, workspace.count));
    const Status status = lstm_persistent_backward(p, nullptr);
    report->that(what + " " + status.message, status.ok());
    if (!status.ok()) return;
    must(cudaDeviceSynchronize());
    std::vector<std::vector<float>> got = {hidden.floats(), h_0.floats(), dc_0.floats()};
    for (const auto& tensor : device_gates) got.push_back(tensor->floats());
    if (schedule == 0) {
      first = got;
    } else {
      report->that(what + " same bits, schedule " + std::to_string(schedule), got == first);
    }
  }

  // NaNs whose bits are those of an empty slot: nobody waits for ever, other rows keep their bits.
  if (steps > 0 && B > 1) {
    std::vector<T> poisoned = device_grad.host();
    std::memset(static_cast<void*>(poisoned.data()), 0xFF, steps * R * P * sizeof(T));
    const Device<T> device_poisoned(poisoned);
    p.grad_output = device_poisoned.data;
    const Status status = lstm_persistent_backward(p, nullptr);
    report->that(what + " NaN " + status.message, status.ok());
    must(cudaDeviceSynchronize());
    bool same = true, is_nan = lengths[0] == 0;
    for (int64_t r = 0; r < R; ++r) {
      const std::vector<float> got = device_gates[r]->floats();
      const int64_t of_row = steps * H * 4;
      same = same && std::equal(got.begin() + of_row, got.end(), first[3 + r].begin() + of_row);
      is_nan = is_nan || std::isnan(got[((r == 0 ? lengths[0] : 1) - 1) * H * 4 + 3 * H]) || z.proj_clip > 0;
    }
    report->that(what + " NaN stays in its row", same && is_nan);
  }

  // Backwards in double.
  std::vector<double> want_hidden(R * B * steps * P), want_h_0(R * B * P), want_c_0(R * B * H);
  std::vector<std::vector<double>> want_gates(R, std::vector<double>(B * steps * H * 4));
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> dh(P), dc(H), total(P), dm(H), dz(4 * H);
      for (int64_t row = 0; row < P; ++row) dh[row] = z.states ? grad_h_n[(r * B + b) * P + row] : 0;
      for (int64_t cell = 0; cell < H; ++cell) dc[cell] = z.states ? grad_c_n[(r * B + b) * H + cell] : 0;
      for (int64_t step = 0; step < lengths[b]; ++step) {
        const int64_t t = r == 0 ? lengths[b] - 1 - step : step, before = r == 0 ? t - 1 : t + 1;
        for (int64_t row = 0; row < P; ++row) {
          const int64_t at = (b * steps + t) * R * P + r * P + row;
          const bool open = z.proj_clip <= 0 || std::fabs(output[at]) < as_float(T(z.proj_clip));
          total[row] = open ? dh[row] + grad_output[at] : 0;
          want_hidden[((r * B + b) * steps + t) * P + row] = total[row];
        }
        dm = std::vector<double>(H);
        if (z.projected) {
          for (int64_t row = 0; row < P; ++row) {
            for (int64_t cell = 0; cell < H; ++cell) dm[cell] += total[row] * proj[r][row * H + cell];
          }
        } else {
          dm = total;
        }
        for (int64_t cell = 0; cell < H; ++cell) {
          const int64_t at = (b * steps + t) * 4 * H + cell;
          const double i = sigmoid(gates[r][at]), f = sigmoid(gates[r][at + H]), g = std::tanh(gates[r][at + 2 * H]);
          const double o = sigmoid(gates[r][at + 3 * H]), c = cells[((r * B + b) * steps + t) * H + cell];
          const bool first_step = step + 1 == lengths[b];
          const double c_before = !first_step ? cells[((r * B + b) * steps + before) * H + cell]
                                  : z.states  ? c_0[(r * B + b) * H + cell]
                                              : 0;
          const double tanh_c = std::tanh(c), d_o = dm[cell] * tanh_c;
          double d_c = dc[cell] + dm[cell] * o * (1 - tanh_c * tanh_c);
          if (z.cell_clip > 0 && !(std::fabs(c) < z.cell_clip)) d_c = 0;
          dc[cell] = d_c * f;
          const double four[4] = {d_c * g * i * (1 - i), d_c * c_before * f * (1 - f), d_c * i * (1 - g * g),
                                  d_o * o * (1 - o)};
          for (int64_t gate = 0; gate < 4; ++gate) {
            want_gates[r][at + gate * H] = dz[gate * H + cell] = four[gate];
          }
        }
        dh = std::vector<double>(P);
        for (int64_t k = 0; k < 4 * H; ++k) {
          for (int64_t row = 0; row < P; ++row) dh[row] += dz[k] * hh[r][k * P + row];
        }
      }
      for (int64_t row = 0; row < P; ++row) want_h_0[(r * B + b) * P + row] = dh[row];
      for (int64_t cell = 0; cell < H; ++cell) want_c_0[(r * B + b) * H + cell] = dc[cell];
    }
  }
  const auto limit = [&](const std::vector<double>& want) {
    double largest = 0;
    for (const double value : want) largest = std::fmax(largest, std::fabs(value));
    return eps * largest + 1e-12;
  };
  report->near(what + " grad_hidden", first[0], want_hidden, limit(want_hidden));
  report->near(what + " grad_h_0", first[1], want_h_0, limit(want_h_0));
  report->near(what + " grad_c_0", first[2], want_c_0, limit(want_c_0));
  for (int64_t r = 0; r < R; ++r) {
    report->near(what + " grad_gates " + std::to_string(r), first[3 + r], want_gates[r], limit(want_gates[r]));
  }
}

void both(Report* report, const PersistentSizes& z, int schedules) {
  test<__half>(report, "fp16", DType::kFloat16, 4e-3, z, schedules);
  test<__nv_bfloat16>(report, "bf16", DType::kBFloat16, 3e-2, z, schedules);
}

}  // namespace

int main(int count, char** arguments) {
  if (!has_gpu(kProgram)) return 0;
  const bool all = count > 1 && std::strcmp(arguments[1], "all") == 0;
  Report report;
  if (count > 1 && std::strcmp(arguments[1], "large") == 0) {
    test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {33, 2, 4096, 512, 2, true, true, true, 1, 0.5f}, 2);
    test<__nv_bfloat16>(&report, "bf16", DType::kBFloat16, 3e-2, {3, 2, 4096, 512, 2, true, false, true, 0, 0}, 2);
    test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {9, 2, 1024, 1024, 2, false, true, true, 0, 0}, 2);
    return report.finish(kProgram);
  }
  if (all) {
    for (const int64_t B : {1, 3, 8, 9, 16, 32, 33}) {
      for (const int64_t T : {1, 2, 3, 7}) {
        both(&report, {B, T, 512, 64, 2, true, B % 2 == 1, T != 2, T == 3 ? 1.0f : 0.0f, T == 3 ? 0.5f : 0.0f}, 4);
        both(&report, {B, T, 128, 128, 2, false, B % 2 == 1, T != 2, T == 3 ? 1.0f : 0.0f, T == 3 ? 0.5f : 0.0f}, 4);
      }
    }
    both(&report, {65, 3, 512, 64, 1, true, true, true, 1.0f, 0.5f}, 2);
    for (const int64_t T : {1, 2, 7}) both(&report, {33, T, 320, 320, 2, false, true, true, 1.0f, 0.5f}, 4);
    both(&report, {9, 3, 576, 576, 1, false, true, true, 0, 0}, 4);
    for (const int64_t H : {128, 256, 512, 1024}) both(&report, {9, 3, H, 64, 1, true, true, true, 1.0f, 0.5f}, 4);
    both(&report, {3, 3, 1024, 128, 1, true, true, true, 1.0f, 0.5f}, 4);
    both(&report, {9, 2, 2560, 320, 1, true, true, true, 1.0f, 0.5f}, 2);
    return report.finish(kProgram);
  }
  both(&report, {3, 7, 512, 64, 2, true, true, true, 1.0f, 0.5f}, 3);
  both(&report, {9, 2, 256, 64, 1, true, false, false, 0, 0}, 3);
  // Weights that fill shared memory, so that some of them stay in registers, as ELMo's do.
  for (const int64_t B : {3, 9, 17}) {
    test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {B, 3, 1024, 512, 1, true, true, true, 1.0f, 0.5f}, 2);
  }
  test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {33, 3, 512, 64, 2, true, true, true, 0, 0}, 3);
  both(&report, {3, 7, 128, 128, 2, false, true, true, 1.0f, 0.5f}, 3);
  test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {33, 3, 192, 192, 1, false, true, true, 0, 0}, 3);
  test<__nv_bfloat16>(&report, "bf16", DType::kBFloat16, 3e-2, {32, 7, 320, 320, 1, false, true, true, 0, 0}, 3);
  test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {2, 0, 128, 128, 2, false, false, true, 0, 0}, 1);
  return report.finish(kProgram);
}
