// SPDX-License-Identifier: Apache-2.0
// The persistent forward recurrence against a plain loop in double: sizes, batch tiles, lengths, states, clips, the
// same bits twice. On the emulator: under random schedules with late stores, the same bits under each. An argument asks
// for more: "all" for every batch and number of steps, "large" for 4096 cells and 512 outputs (minutes on the
// emulator), "elmo" for the least of these that runs each kernel made for them.

#include <algorithm>
#include <cstring>
#include <memory>

#include "base/testing.cuh"
#include "lstm/persistent_forward.h"
#include "lstm/testing.h"

using namespace ctxfast;

constexpr const char* kProgram = CTXFAST_PROGRAM("test_lstm_persistent_forward");

namespace {

// alone: as if no two blocks could be neighbours.
LstmPersistentDevice device_facts_here(bool alone = false) {
  LstmPersistentDevice facts;
  const Status status = lstm_persistent_device(0, &facts);
  if (!status.ok()) std::printf("FAIL %s\n", status.message.c_str()), std::exit(1);
  if (alone) facts.pairs = 0;
  return facts;
}

template <typename T>
void test(Report* report, const char* dtype_name, DType dtype, double eps, const PersistentSizes& z, int schedules,
          bool alone = false) {
  const int64_t B = z.B, steps = z.T, H = z.H, P = z.P, R = z.R;
  Random random(B + 31 * steps + 7 * H);
  const LstmPersistentDevice facts = device_facts_here(alone);
  const LstmPersistentForwardPlan plan = lstm_persistent_forward_plan(facts, B, H, P, z.projected, R);
  const std::string what = std::string(dtype_name) + " " + z.name() + " (" + std::to_string(plan.cells) + " cells, " +
                           std::to_string(plan.tile_rows) + " rows" + (plan.in_pairs ? ", in pairs)" : ")");
  report->that(what + " " + plan.refusal, plan.refusal.empty());
  report->that(what + ": pairs where they fit", plan.in_pairs == (z.projected && plan.tile_rows == 32 && !alone));
  if (!plan.refusal.empty()) return;
  LstmPersistentForwardParams p;
  p.device = facts;
  p.batch = B, p.steps = steps, p.hidden = H, p.size = P, p.directions = R, p.has_proj = z.projected;
  p.dtype = dtype, p.cell_clip = z.cell_clip, p.proj_clip = z.proj_clip;

  std::vector<int64_t> lengths(B, steps);
  for (int64_t b = 0; z.ragged && b < B; ++b) lengths[b] = b == 1 ? 0 : random.below(steps + 1);
  const float of_weights = 1.5f / std::sqrt(static_cast<float>(P)), of_proj = 3.0f / std::sqrt(static_cast<float>(H));
  std::vector<std::vector<float>> gates(R), hh(R), proj(R);
  std::vector<std::unique_ptr<Device<T>>> device_gates, device_hh, device_proj;
  const int64_t row_stride = steps * H * 4 + 2, hh_stride = P + 8, proj_stride = H + 16;
  for (int64_t r = 0; r < R; ++r) {
    gates[r] = random.fill(B * row_stride, 2);
    hh[r] = random.fill(4 * H * hh_stride, of_weights);
    proj[r] = random.fill(z.projected ? P * proj_stride : 0, of_proj);
    device_gates.push_back(std::make_unique<Device<T>>(rounded<T>(&gates[r])));
    device_hh.push_back(std::make_unique<Device<T>>(rounded<T>(&hh[r])));
    device_proj.push_back(std::make_unique<Device<T>>(rounded<T>(&proj[r])));
    p.gates[r] = device_gates[r]->data;
    p.weight_hh[r] = device_hh[r]->data, p.weight_hh_stride[r] = hh_stride;
    if (z.projected) p.weight_proj[r] = device_proj[r]->data, p.weight_proj_stride[r] = proj_stride;
    p.gates_strides[r][0] = row_stride, p.gates_strides[r][1] = H * 4;
  }
  std::vector<float> h_0 = random.fill(R * B * P, 0.8f), c_0 = random.fill(R * B * H, 1.2f);
  const Device<T> device_h_0(rounded<T>(&h_0));
  const Device<float> device_c_0(c_0);
  const Device<int64_t> device_lengths(lengths);
  Device<T> output(B * steps * R * P), h_n(R * B * P);
  Device<float> c_n(R * B * H), cells(R * B * steps * H);
  Device<unsigned char> workspace(plan.workspace_bytes);
  p.h_0 = z.states ? device_h_0.data : nullptr;
  p.c_0 = z.states ? device_c_0.data : nullptr;
  p.lengths = z.ragged ? device_lengths.data : nullptr;
  p.output = output.data, p.h_n = h_n.data, p.c_n = c_n.data;
  p.output_strides[0] = steps * R * P, p.output_strides[1] = R * P;
  p.workspace = workspace.data, p.workspace_bytes = plan.workspace_bytes;

  std::vector<std::vector<float>> first;
  for (int schedule = 0; schedule < schedules; ++schedule) {
    set_schedule(static_cast<uint64_t>(schedule) * 977 * (B + steps));
    p.cells = schedule == 1 ? nullptr : cells.data;
    output.fill(0xEE), h_n.fill(0xEE), c_n.fill(0xEE);
    if (schedule != 1) cells.fill(0xEE);
    workspace.fill(0xEE);
    const Status status = lstm_persistent_forward(p, nullptr);
    report->that(what + " schedule " + std::to_string(schedule) + " " + status.message, status.ok());
    if (!status.ok()) return;
    must(cudaDeviceSynchronize());
    const std::vector<std::vector<float>> got = {output.floats(), h_n.floats(), c_n.floats(), cells.floats()};
    if (schedule == 0) {
      first = got;
    } else {
      report->that(what + " same bits, schedule " + std::to_string(schedule), got == first);
    }
  }

  // In double, rounded where the kernel rounds.
  const auto clip = [](double x, double bound) { return bound > 0 ? std::fmin(std::fmax(x, -bound), bound) : x; };
  const auto round_to = [](double x) { return static_cast<double>(as_float(T(static_cast<float>(x)))); };
  std::vector<double> want(B * steps * R * P), want_h(R * B * P), want_c(R * B * H), want_cells(R * B * steps * H);
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> h(P), c(H), m(H);
      for (int64_t k = 0; k < P; ++k) h[k] = z.states ? h_0[(r * B + b) * P + k] : 0;
      for (int64_t cell = 0; cell < H; ++cell) c[cell] = z.states ? c_0[(r * B + b) * H + cell] : 0;
      for (int64_t step = 0; step < lengths[b]; ++step) {
        const int64_t t = r == 0 ? step : lengths[b] - 1 - step;
        for (int64_t cell = 0; cell < H; ++cell) {
          double four[4];
          for (int64_t gate = 0; gate < 4; ++gate) {
            four[gate] = gates[r][b * row_stride + (t * 4 + gate) * H + cell];
            const float* row = hh[r].data() + (gate * H + cell) * hh_stride;
            for (int64_t k = 0; k < P; ++k) four[gate] += row[k] * h[k];
          }
          c[cell] = clip(sigmoid(four[0]) * std::tanh(four[2]) + sigmoid(four[1]) * c[cell], z.cell_clip);
          m[cell] = sigmoid(four[3]) * std::tanh(c[cell]);
          want_cells[((r * B + b) * steps + t) * H + cell] = c[cell];
        }
        for (int64_t k = 0; k < P; ++k) {
          double sum = z.projected ? 0 : m[k];
          for (int64_t cell = 0; z.projected && cell < H; ++cell)
            sum += proj[r][k * proj_stride + cell] * round_to(m[cell]);
          h[k] = round_to(clip(sum, z.proj_clip));
          want[(b * steps + t) * R * P + r * P + k] = h[k];
        }
      }
      for (int64_t k = 0; k < P; ++k) want_h[(r * B + b) * P + k] = h[k];
      for (int64_t cell = 0; cell < H; ++cell) want_c[(r * B + b) * H + cell] = c[cell];
    }
  }
  report->near(what + " output", first[0], want, eps);
  report->near(what + " h_n", first[1], want_h, eps);
  report->near(what + " c_n", first[2], want_c, eps);
  report->near(what + " cells", first[3], want_cells, eps);
}

// A row whose h_0 is all 0xFFFF, which in a slot means "not there yet": it turns into NaN, nobody waits, and the other
// row has the same bits as without it.
template <typename T>
void test_nan(Report* report, DType dtype, const PersistentSizes& z) {
  const int64_t H = z.H, P = z.P;
  const std::string what = "0xFFFF in h_0, " + z.name();
  const LstmPersistentDevice facts = device_facts_here();
  const LstmPersistentForwardPlan plan = lstm_persistent_forward_plan(facts, z.B, H, P, z.projected, 1);
  Random random(5);
  std::vector<float> gates = random.fill(z.B * z.T * H * 4, 2), hh = random.fill(4 * H * P, 0.1f);
  std::vector<float> proj = random.fill(P * H, 0.1f), h_0 = random.fill(z.B * P, 1);
  const Device<T> device_gates(rounded<T>(&gates)), device_hh(rounded<T>(&hh)), device_proj(rounded<T>(&proj));
  const Device<T> device_h_0(rounded<T>(&h_0)), output(z.B * z.T * P), h_n(z.B * P);
  const Device<float> c_n(z.B * H);
  const Device<unsigned char> workspace(plan.workspace_bytes);
  LstmPersistentForwardParams p;
  p.device = facts;
  p.batch = z.B, p.steps = z.T, p.hidden = H, p.size = P, p.directions = 1, p.has_proj = z.projected, p.dtype = dtype;
  p.gates[0] = device_gates.data, p.gates_strides[0][0] = z.T * H * 4, p.gates_strides[0][1] = H * 4;
  p.weight_hh[0] = device_hh.data, p.weight_hh_stride[0] = P;
  if (z.projected) p.weight_proj[0] = device_proj.data, p.weight_proj_stride[0] = H;
  p.h_0 = device_h_0.data, p.output = output.data, p.h_n = h_n.data, p.c_n = c_n.data;
  p.output_strides[0] = z.T * P, p.output_strides[1] = P;
  p.workspace = workspace.data, p.workspace_bytes = plan.workspace_bytes;
  std::vector<float> found[2];
  for (int poisoned = 0; poisoned < 2; ++poisoned) {
    if (poisoned) must(cudaMemset(device_h_0.data, 0xFF, P * sizeof(T)));
    const Status status = lstm_persistent_forward(p, nullptr);
    report->that(what + " " + status.message, status.ok());
    if (!status.ok()) return;
    must(cudaDeviceSynchronize());
    found[poisoned] = output.floats();
  }
  const int64_t row = z.T * P;
  bool all_nan = true;
  for (int64_t i = 0; i < row; ++i) all_nan = all_nan && std::isnan(found[1][i]);
  report->that(what + ": NaN in its row", all_nan);
  report->that(what + ": not in others", std::equal(found[0].begin() + row, found[0].end(), found[1].begin() + row));
  LstmPersistentForwardParams far = p;
  far.gates_strides[0][0] = int64_t{1} << 34;
  report->that("a stride past 32 bits is refused", !lstm_persistent_forward(far, nullptr).ok());
  far = p, far.output_strides[0] = -8;
  report->that("a negative stride is refused", !lstm_persistent_forward(far, nullptr).ok());
}

void both(Report* report, const PersistentSizes& z, int schedules) {
  test<__half>(report, "fp16", DType::kFloat16, 4e-3, z, schedules);
  test<__nv_bfloat16>(report, "bf16", DType::kBFloat16, 3e-2, z, schedules);
}

void test_refusals(Report* report) {
  const LstmPersistentDevice h100 = {132, 9, 0, 227 * 1024, true, 66};
  const auto refusal = [&](LstmPersistentDevice device, int64_t B, int64_t H, int64_t P, bool projected, int64_t R) {
    return lstm_persistent_forward_plan(device, B, H, P, projected, R).refusal;
  };
  const auto says = [&](const std::string& got, const char* part) {
    report->that("refusal '" + got + "' says " + part, got.find(part) != std::string::npos);
  };
  for (const int64_t B : {1, 8, 9, 16, 17, 32, 33, 128}) {
    for (const int64_t R : {1, 2}) {
      for (const int64_t P : {128, 256, 512}) {
        report->that("runs " + std::to_string(8 * P), refusal(h100, B, 8 * P, P, true, R).empty());
      }
      for (const int64_t H : {32, 128, 256, 320, 512, 768, 1024}) {
        report->that("runs " + std::to_string(H), refusal(h100, B, H, H, false, R).empty());
      }
    }
  }
  // ELMo's 128 blocks are 64 pairs; a block alone where the device holds fewer.
  for (const int64_t pairs : {66, 64, 63, 0}) {
    LstmPersistentDevice device = h100;
    device.pairs = pairs;
    const auto in_pairs = [&](int64_t B, int64_t R) {
      return lstm_persistent_forward_plan(device, B, 4096, 512, true, R).in_pairs;
    };
    const std::string of = " of " + std::to_string(pairs) + " pairs";
    report->that("32 rows, two directions" + of, in_pairs(32, 2) == (pairs >= 64));
    report->that("32 rows, one direction" + of, in_pairs(32, 1) == (pairs >= 32));
    report->that("16 rows" + of, !in_pairs(16, 2));
  }
  LstmPersistentDevice other = h100;
  other.major = 8, other.minor = 9;
  says(refusal(other, 1, 512, 512, false, 2), "Hopper");
  other = h100, other.multiprocessors = 60;
  says(refusal(other, 1, 4096, 512, true, 2), "do not fit");
  other = h100, other.cooperative = false;
  says(refusal(other, 1, 512, 512, false, 2), "cooperative");
  says(refusal(h100, 129, 512, 512, false, 2), "128 rows");
  says(refusal(h100, 1, 500, 500, false, 2), "multiples of 32");
  says(refusal(h100, 1, 512, 256, false, 2), "without a projection");
  says(refusal(h100, 1, 8192, 512, true, 2), "do not fit");
  says(refusal(h100, 1, 2048, 2048, false, 2), "do not fit");
}

}  // namespace

int main(int count, char** arguments) {
  if (!has_gpu(kProgram)) return 0;
  Report report;
  test_refusals(&report);
  if (device_facts_here().major != 9) {
    std::printf("not run: needs a Hopper GPU\n");
    return report.finish(kProgram);
  }
  if (count > 1 && std::strcmp(arguments[1], "elmo") == 0) {
    for (const int64_t B : {3, 9, 17}) {
      test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {B, 2, 4096, 512, 1, true, true, true, 1, 0.5f}, 1);
    }
    test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {17, 2, 4096, 512, 1, true, true, true, 1, 0.5f}, 1, true);
    return report.finish(kProgram);
  }
  if (count > 1 && std::strcmp(arguments[1], "large") == 0) {
    test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {3, 2, 4096, 512, 2, true, true, true, 1, 0.5f}, 2);
    test<__nv_bfloat16>(&report, "bf16", DType::kBFloat16, 3e-2, {33, 2, 4096, 512, 2, true, false, true, 0, 0}, 2);
    test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {16, 2, 4096, 512, 1, true, false, true, 0, 0}, 2);
    test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {3, 3, 1024, 1024, 2, false, true, true, 0, 0}, 2);
    test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {17, 2, 1024, 1024, 2, false, true, true, 0, 0}, 2);
    return report.finish(kProgram);
  }
  if (count > 1 && std::strcmp(arguments[1], "all") == 0) {
    for (const int64_t B : {1, 3, 8, 9, 16, 17, 32, 33}) {
      for (const int64_t T : {1, 2, 3, 7}) {
        const float cell_clip = T == 3 ? 1.0f : 0.0f, proj_clip = T == 3 ? 0.5f : 0.0f;
        both(&report, {B, T, 128, 32, 2, true, B % 2 == 1, T != 2, cell_clip, proj_clip}, 4);
        both(&report, {B, T, 256, 32, 1, true, B % 2 == 1, T != 2, cell_clip, proj_clip}, 4);
        both(&report, {B, T, 96, 96, 2, false, B % 2 == 1, T != 2, cell_clip, proj_clip}, 4);
      }
    }
    for (const int64_t B : {3, 9, 33}) {
      both(&report, {B, 3, 512, 128, 2, true, true, true, 1.0f, 0.5f}, 4);
      both(&report, {B, 3, 1024, 128, 1, true, true, true, 0, 0}, 3);
      both(&report, {B, 7, 512, 64, 2, true, true, true, 1.0f, 0.5f}, 4);
      both(&report, {B, 3, 576, 576, 1, false, true, true, 0, 0}, 3);
    }
    return report.finish(kProgram);
  }
  test_nan<__half>(&report, DType::kFloat16, {3, 2, 128, 32, 1, true, false, true, 0, 0});
  test_nan<__nv_bfloat16>(&report, DType::kBFloat16, {9, 2, 64, 64, 1, false, false, true, 0, 0});
  both(&report, {3, 7, 128, 32, 2, true, true, true, 1.0f, 0.5f}, 4);
  both(&report, {9, 3, 256, 32, 1, true, true, true, 0, 0}, 3);
  test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {33, 3, 128, 32, 2, true, true, true, 0, 0}, 4);
  both(&report, {17, 5, 256, 32, 2, true, true, true, 1.0f, 0.5f}, 4);
  test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {33, 3, 256, 32, 1, true, true, true, 0, 0}, 3);
  test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {33, 3, 256, 32, 1, true, true, true, 0, 0}, 2, true);
  both(&report, {3, 7, 96, 96, 2, false, true, true, 1.0f, 0.5f}, 4);
  test<__half>(&report, "fp16", DType::kFloat16, 4e-3, {33, 3, 64, 64, 2, false, true, true, 0, 0}, 4);
  test<__nv_bfloat16>(&report, "bf16", DType::kBFloat16, 3e-2, {16, 3, 160, 160, 1, false, true, true, 0, 0}, 3);
  return report.finish(kProgram);
}
