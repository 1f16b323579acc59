// SPDX-License-Identifier: Apache-2.0
// What the test programs of the LSTM's kernels share.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

namespace ctxfast {

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One case of the persistent kernels.
struct PersistentSizes {
  int64_t B, T, H, P, R;
  bool projected, ragged, states;
  float cell_clip, proj_clip;
  std::string name() const {
    return std::to_string(H) + (projected ? "/" + std::to_string(P) : "") + " R" + std::to_string(R) + " B" +
           std::to_string(B) + " T" + std::to_string(T) + (ragged ? " ragged" : "") + (states ? " states" : "") +
           (cell_clip > 0 ? " clips" : "");
  }
};

}  // namespace ctxfast
