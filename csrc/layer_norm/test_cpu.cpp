// SPDX-License-Identifier: Apache-2.0
// layer_norm on the CPU against a plain loop in double, on every instruction set this machine runs.
#include "base/testing.h"
#include "layer_norm/layer_norm.h"

using namespace ctxfast;

namespace {

void check_size(int64_t rows, int64_t size, bool has_ids, float mean, Report* report) {
  Random random(static_cast<uint64_t>(rows * 7919 + size));
  constexpr int64_t kTable = 9;
  std::vector<float> first = random.fill(std::max(rows, kTable) * size, 1.0f);
  for (float& value : first) value += mean;
  const std::vector<float> second = random.fill(std::max(rows, kTable) * size, 1.0f), shift = random.fill(size, 1.0f);
  const std::vector<float> weight = random.fill(size, 1.0f), bias = random.fill(size, 1.0f);
  std::vector<int64_t> ids(rows);
  std::vector<int32_t> narrow_ids(rows);
  for (int64_t i = 0; i < rows; ++i)
    ids[i] = random.below(kTable), narrow_ids[i] = static_cast<int32_t>(random.below(kTable));
  std::vector<double> want(rows * size);
  for (int64_t i = 0; i < rows; ++i) {
    const float* const a = &first[(has_ids ? ids[i] : i) * size];
    const float* const b = &second[(has_ids ? narrow_ids[i] : i) * size];
    double sum = 0, squares = 0;
    for (int64_t k = 0; k < size; ++k) sum += static_cast<double>(a[k]) + shift[k] + b[k];
    for (int64_t k = 0; k < size; ++k) squares += std::pow(static_cast<double>(a[k]) + shift[k] + b[k] - sum / size, 2);
    const double scale = 1 / std::sqrt(squares / size + 1e-3);
    for (int64_t k = 0; k < size; ++k) {
      want[i * size + k] = (static_cast<double>(a[k]) + shift[k] + b[k] - sum / size) * scale * weight[k] + bias[k];
    }
  }
  LayerNormParams p;
  p.rows = rows, p.size = size, p.sources = 2, p.eps = 1e-3f;
  p.source[0] = {first.data(), size, has_ids ? ids.data() : nullptr, kTable, true};
  p.source[1] = {second.data(), size, has_ids ? narrow_ids.data() : nullptr, kTable, false};
  p.shift = shift.data(), p.weight = weight.data(), p.bias = bias.data();
  for (const Isa isa : runnable_isas()) {
    const std::string name = std::string(isa_name(isa)) + " " + std::to_string(rows) + " x " + std::to_string(size);
    std::vector<float> y(rows * size + 8, -7.0f), alone(size + 8, -7.0f);
    p.y = y.data(), p.isa = isa, p.threads = 3, p.rows = rows;
    report->that(name, layer_norm_forward(p).ok());
    for (int64_t i = rows * size; i < rows * size + 8; ++i) report->that(name + " guard", y[i] == -7.0f);
    y.resize(rows * size);
    report->near(name, y, want, 4e-6 * (1 + std::fabs(mean)));
    if (rows == 0) continue;
    p.y = alone.data(), p.rows = 1, p.threads = 1;
    report->that(name + " alone", layer_norm_forward(p).ok());
    report->that(name + " alone", std::vector<float>(alone.begin(), alone.begin() + size) ==
                                      std::vector<float>(y.begin(), y.begin() + size));
  }
}

// The sum beside its norm, with and without the mean and a bias.
void check_sum(int64_t size, bool is_rms, bool is_bf16, Report* report) {
  constexpr int64_t kRows = 3;
  Random random(static_cast<uint64_t>(size));
  const std::vector<float> first = random.fill(kRows * size, 1.0f), second = random.fill(kRows * size, 1.0f);
  const std::vector<float> weight = random.fill(size, 1.0f);
  std::vector<uint16_t> narrow[3];
  const std::vector<float>* const wide[3] = {&first, &second, &weight};
  const void* given[3];
  for (int i = 0; i < 3; ++i) {
    for (const float value : *wide[i]) narrow[i].push_back(to_bf16(value));
    given[i] = is_bf16 ? static_cast<const void*>(narrow[i].data()) : wide[i]->data();
  }
  const auto value = [&](int i, int64_t at) { return is_bf16 ? to_float(narrow[i][at]) : (*wide[i])[at]; };
  std::vector<double> sums(kRows * size), norms(kRows * size);
  for (int64_t row = 0; row < kRows; ++row) {
    double mean = 0, squares = 0;
    for (int64_t k = row * size; k < (row + 1) * size; ++k) {
      const float sum = value(0, k) + value(1, k);
      sums[k] = is_bf16 ? to_float(to_bf16(sum)) : sum;
      mean += is_rms ? 0 : sums[k] / static_cast<double>(size);
    }
    for (int64_t k = row * size; k < (row + 1) * size; ++k) squares += std::pow(sums[k] - mean, 2);
    for (int64_t k = row * size; k < (row + 1) * size; ++k) {
      norms[k] = (sums[k] - mean) / std::sqrt(squares / size + 1e-3) * value(2, k - row * size);
    }
  }
  LayerNormParams p;
  p.rows = kRows, p.size = size, p.sources = 2, p.eps = 1e-3f, p.is_rms = is_rms, p.weight = given[2];
  p.io_dtype = is_bf16 ? DType::kBFloat16 : DType::kFloat32;
  p.source[0] = {given[0], size, nullptr, 0, true}, p.source[1] = {given[1], size, nullptr, 0, true};
  for (const Isa isa : runnable_isas()) {
    const std::string name = std::string(isa_name(isa)) + " sum " + std::to_string(size);
    std::vector<float> sum(kRows * size), y(kRows * size);
    std::vector<uint16_t> narrow_sum(kRows * size), narrow_y(kRows * size);
    p.isa = isa;
    p.sum = is_bf16 ? static_cast<void*>(narrow_sum.data()) : sum.data();
    p.y = is_bf16 ? static_cast<void*>(narrow_y.data()) : y.data();
    report->that(name, layer_norm_forward(p).ok());
    for (size_t k = 0; is_bf16 && k < y.size(); ++k) sum[k] = to_float(narrow_sum[k]), y[k] = to_float(narrow_y[k]);
    report->near(name, sum, sums, 1e-7);
    report->near(name + " norm", y, norms, is_bf16 ? 2e-2 : 4e-6);
  }
}

void check_refusals(Report* report) {
  const std::vector<float> row(8, 1.0f);
  const int64_t beyond[] = {0, 9};
  std::vector<float> y(16, -7.0f);
  const auto refused = [&](const char* word, auto change) {
    LayerNormParams p;
    p.rows = 2, p.size = 8, p.sources = 1, p.source[0] = {row.data(), 0, nullptr, 0, true};
    p.weight = p.bias = row.data(), p.y = y.data();
    change(&p);
    const Status status = layer_norm_forward(p);
    report->that(word, !status.ok() && status.message.find(word) != std::string::npos);
  };
  refused("an id is 9", [&](LayerNormParams* p) { p->source[0].ids = beyond, p->source[0].count = 9; });
  refused("rows", [](LayerNormParams* p) { p->rows = -1; });
  refused("size", [](LayerNormParams* p) { p->size = 0; });
  refused("size", [](LayerNormParams* p) { p->size = 8193; });
  refused("sources", [](LayerNormParams* p) { p->sources = 5; });
  refused("source", [](LayerNormParams* p) { p->source[0].rows = nullptr; });
  refused("io_dtype", [](LayerNormParams* p) { p->io_dtype = DType::kFloat16; });
  refused("threads", [](LayerNormParams* p) { p->threads = 0; });
  refused("weight", [](LayerNormParams* p) { p->weight = nullptr; });
  refused("y", [](LayerNormParams* p) { p->y = nullptr; });
  report->that("nothing written", y == std::vector<float>(16, -7.0f));
}

}  // namespace

int main() {
  Report report;
  for (const int64_t size : {2, 3, 16, 31, 64, 127, 768, 1023, 8192}) {
    for (const bool has_ids : {false, true}) check_size(5, size, has_ids, 0.0f, &report);
  }
  check_size(60, 768, false, 30.0f, &report);
  check_size(0, 16, false, 0.0f, &report);
  for (const int64_t size : {2, 31, 768}) {
    for (const bool is_rms : {false, true}) {
      for (const bool is_bf16 : {false, true}) check_sum(size, is_rms, is_bf16, &report);
    }
  }
  check_refusals(&report);
  return report.finish("test_layer_norm");
}
