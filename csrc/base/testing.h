// SPDX-License-Identifier: Apache-2.0
// What the test programs share: repeatable random numbers and a largest error with its limit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 2654435769u + 1) {}
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint32_t>(n)); }
  float uniform(float scale) { return scale * (static_cast<float>(bits()) / 1073741824.0f - 1.0f); }
  std::vector<float> fill(int64_t n, float scale) {
    std::vector<float> values(n);
    for (float& value : values) value = uniform(scale);
    return values;
  }
};

// A bfloat16's bits: the nearest, ties to even.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float to_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Whether small sizes are wanted, for a run under a sanitizer.
inline bool is_small() { return std::getenv("CTXFAST_SMALL") != nullptr; }

// Counts checks and failures; a NaN anywhere fails.
struct Report {
  int checks = 0, failures = 0;
  void near(const std::string& what, const std::vector<float>& got, const std::vector<double>& want, double limit) {
    double worst = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      const double error = std::fabs(got[i] - want[i]);
      if (!(error <= worst)) worst = error;
    }
    ++checks;
    if (got.size() == want.size() && worst <= limit) return;
    ++failures;
    std::printf("FAIL %s: error %g, limit %g\n", what.c_str(), worst, limit);
  }
  void that(const std::string& what, bool holds) {
    ++checks;
    if (holds) return;
    ++failures;
    std::printf("FAIL %s\n", what.c_str());
  }
  int finish(const char* program) {
    std::printf("%s: %d passed, %d failed\n", program, checks - failures, failures);
    return failures ? 1 : 0;
  }
};
