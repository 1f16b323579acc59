// SPDX-License-Identifier: Apache-2.0
// scalar_mix on CUDA against a plain loop in double: every dtype, aligned or not, sizes around its tiles.

#include "base/testing.cuh"
#include "scalar_mix/scalar_mix.h"

using namespace ctxfast;

constexpr const char* kProgram = CTXFAST_PROGRAM("test_scalar_mix");

namespace {

// Rounded to T, `offset` elements past an aligned address; `seen` becomes what T holds.
template <typename T>
T* at_offset(const std::vector<float>& values, int64_t offset, std::vector<float>* seen = nullptr) {
  std::vector<float> all(offset, 0.0f);
  all.insert(all.end(), values.begin(), values.end());
  T* const device = to_device(rounded<T>(&all)) + offset;
  if (seen) seen->assign(all.begin() + offset, all.end());
  return device;
}

template <typename T>
void test(Report* report, const char* name, DType dtype, double eps, int64_t K, int64_t n, int64_t offset) {
  Random random(n + 7 * K);
  const std::string what =
      std::string(name) + " K" + std::to_string(K) + " n" + std::to_string(n) + " offset" + std::to_string(offset);
  std::vector<std::vector<float>> x(K);
  std::vector<float> grad;
  const std::vector<float> weights = random.fill(K, 1.0f), nothing(n, NAN);
  ScalarMixForwardParams forward;
  ScalarMixBackwardParams backward;
  forward.num_inputs = backward.num_inputs = K;
  forward.numel = backward.numel = n;
  forward.dtype = backward.dtype = dtype;
  for (int64_t k = 0; k < K; ++k) {
    forward.inputs[k] = backward.inputs[k] = at_offset<T>(random.fill(n, 1.0f), offset, &x[k]);
    if (k != 1) backward.grad_inputs[k] = at_offset<T>(nothing, offset);
  }
  forward.weights = backward.weights = to_device(weights);
  T* output = at_offset<T>(nothing, offset);
  forward.output = output;
  backward.grad_output = at_offset<T>(random.fill(n, 1.0f), offset, &grad);
  backward.grad_weights = to_device(std::vector<float>(K, NAN));
  backward.workspace_bytes = scalar_mix_workspace_bytes(K, n);
  backward.workspace = to_device(std::vector<float>(backward.workspace_bytes / 4, NAN));

  const Status f = scalar_mix_forward(forward, nullptr), b = scalar_mix_backward(backward, nullptr);
  report->that(what + " " + f.message + b.message, f.ok() && b.ok());
  must(cudaDeviceSynchronize());
  std::vector<double> y(n), grad_weights(K);
  for (int64_t k = 0; k < K; ++k) {
    std::vector<double> grad_input(n);
    for (int64_t i = 0; i < n; ++i) {
      y[i] += double(weights[k]) * x[k][i];
      grad_weights[k] += double(grad[i]) * x[k][i];
      grad_input[i] = double(weights[k]) * grad[i];
    }
    if (k != 1)
      report->near(what + " dx", as_floats(to_host(static_cast<T*>(backward.grad_inputs[k]), n)), grad_input, eps);
  }
  report->near(what + " y", as_floats(to_host(output, n)), y, eps * K);
  const std::vector<float> once = as_floats(to_host(backward.grad_weights, K));
  report->near(what + " dw", once, grad_weights, 1e-6 * (1 + n));
  must(cudaMemset(backward.grad_weights, 0xff, K * 4));
  report->that(what + " again", scalar_mix_backward(backward, nullptr).ok());
  must(cudaDeviceSynchronize());
  report->that(what + " same bits", once == as_floats(to_host(backward.grad_weights, K)));
}

}  // namespace

int main() {
  if (!has_gpu(kProgram)) return 0;
  int64_t large = is_small() ? 4099 : 100003;
#ifdef CTXFAST_EMULATE
  emulator::set_schedule(1);
  large = 20011;
#endif
  Report report;
  for (const int64_t n : {int64_t{0}, int64_t{1}, int64_t{7}, int64_t{9}, int64_t{2047}, int64_t{2049}, large}) {
    for (const int64_t K : {1, 3, 13, 64}) {
      for (const int64_t offset : {0, 1}) {
        test<float>(&report, "fp32", DType::kFloat32, 1e-6, K, n, offset);
        test<__half>(&report, "fp16", DType::kFloat16, 1e-3, K, n, offset);
        test<__nv_bfloat16>(&report, "bf16", DType::kBFloat16, 8e-3, K, n, offset);
      }
    }
  }
  return report.finish(kProgram);
}
