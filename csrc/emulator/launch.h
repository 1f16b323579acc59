// SPDX-License-Identifier: Apache-2.0
// The launch of csrc/base/launch.cuh, on the emulator. What else of the CUDA runtime launchers call is in emulator.cpp.
#pragma once

#include <functional>

#include "emulator/emulator.h"

namespace ctxfast::emulator {

inline cudaError_t launch(const std::function<void()>& thread, const void* function, const LaunchConfig& config,
                          cudaStream_t) {
  if (config.cluster == 0 || config.grid.x % config.cluster != 0 || (config.cluster > 1 && !config.cooperative))
    return cudaErrorInvalidValue;
  if (!may_have_shared(function, config.shared_bytes)) return cudaErrorInvalidValue;
  const bool ran = run(thread, {config.grid.x, config.grid.y, config.grid.z}, config.threads, config.shared_bytes,
                       config.cooperative, config.cluster);
  return ran ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace ctxfast::emulator
