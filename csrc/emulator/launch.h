// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/base/launch.cuh, on the emulator, which poses as an H100.
#pragma once

#include <cstring>

#include "emulator/emulator.h"

namespace ctxfast {

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const LaunchConfig& config, cudaStream_t, const Params& params) {
  const bool ran = emulator::run([&] { kernel(params); }, {config.grid.x, config.grid.y, config.grid.z}, config.threads,
                                 config.shared_bytes, config.cooperative);
  return ran ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t clear_async(void* memory, int byte, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(memory, byte, bytes);
  return cudaSuccess;
}

inline cudaError_t device_facts(int, DeviceFacts* facts) {
  *facts = {132, 9, 0, 227 * 1024, true};
  return cudaSuccess;
}

template <typename Params>
cudaError_t resident_blocks(void (*)(Params), unsigned threads, size_t shared_bytes, int* blocks) {
  const size_t by_shared = 227 * 1024 / (shared_bytes + 1024), by_threads = 2048 / threads;
  *blocks = static_cast<int>(132 * (by_shared < by_threads ? by_shared : by_threads));
  return cudaSuccess;
}

}  // namespace ctxfast
