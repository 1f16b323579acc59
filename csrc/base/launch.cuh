// SPDX-License-Identifier: Apache-2.0
// Launching a kernel, and the facts of a device that launchers need. With -DCTXFAST_EMULATE: on the emulator.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "base/common.h"

namespace ctxfast {

struct LaunchConfig {
  dim3 grid = dim3(1);
  unsigned threads = 1;  // of a block
  size_t shared_bytes = 0;
  bool cooperative = false;  // all blocks resident at once, or the launch fails
  unsigned cluster = 1;      // neighbours along x that reach one another's shared memory
};

struct DeviceFacts {
  int multiprocessors = 0;
  int major = 0, minor = 0;
  int shared_per_block = 0;  // bytes, with opt-in
  bool cooperative = false;
};

}  // namespace ctxfast

#ifdef CTXFAST_EMULATE
#include "emulator/launch.h"
#endif

namespace ctxfast {

// Lets blocks of a kernel have all the shared memory that the device gives one. Never less, for one call's size:
// another thread's launch of the same kernel may need more.
inline cudaError_t allow_shared(const void* function) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({function, device}) != 0) return cudaSuccess;
  cudaFuncAttributes attributes;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(attributes.sharedSizeBytes));
  }
  if (error == cudaSuccess) allowed.insert({function, device});
  return error;
}

// CUDA's own form of a LaunchConfig, which points to these.
struct LaunchAttributes {
  cudaLaunchAttribute all[2] = {};
  unsigned count = 0;
  explicit LaunchAttributes(const LaunchConfig& config) {
    if (config.cooperative) {
      all[count].id = cudaLaunchAttributeCooperative;
      all[count++].val.cooperative = 1;
    }
    if (config.cluster > 1) {
      all[count].id = cudaLaunchAttributeClusterDimension;
      all[count++].val.clusterDim = {config.cluster, 1, 1};
    }
  }
  cudaLaunchConfig_t of(const LaunchConfig& config) {
    cudaLaunchConfig_t made = {};
    made.gridDim = config.grid;
    made.blockDim = dim3(config.threads);
    made.dynamicSmemBytes = config.shared_bytes;
    made.attrs = all;
    made.numAttrs = count;
    return made;
  }
};

template <typename Params>
cudaError_t launch(void (*kernel)(Params), const LaunchConfig& config, cudaStream_t stream, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (config.shared_bytes > 48 * 1024) {
    const cudaError_t error = allow_shared(function);
    if (error != cudaSuccess) return error;
  }
#ifdef CTXFAST_EMULATE
  return emulator::launch([&] { kernel(params); }, function, config, stream);
#else
  LaunchAttributes attributes(config);
  cudaLaunchConfig_t launch_config = attributes.of(config);
  launch_config.stream = stream;
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernelExC(&launch_config, function, arguments);
#endif
}

inline cudaError_t clear_async(void* memory, int byte, size_t bytes, cudaStream_t stream) {
  return bytes == 0 ? cudaSuccess : cudaMemsetAsync(memory, byte, bytes, stream);
}

// How many blocks of the kernel the whole device holds at once, in clusters if the launch has them.
template <typename Params>
cudaError_t resident_blocks(void (*kernel)(Params), const LaunchConfig& config, int* blocks) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared(function);
  if (error != cudaSuccess) return error;
  if (config.cluster > 1) {  // part of a device's multiprocessors have no neighbour to make a cluster with
    int clusters = 0;
    LaunchConfig asked = config;
    asked.cooperative = false;  // which is no question of room
    LaunchAttributes attributes(asked);
    const cudaLaunchConfig_t launch_config = attributes.of(asked);
    error = cudaOccupancyMaxActiveClusters(&clusters, function, &launch_config);
    *blocks = clusters * static_cast<int>(config.cluster);
    return error;
  }
  int device = 0, multiprocessors = 0, each = 0;
  if ((error = cudaGetDevice(&device)) != cudaSuccess) return error;
  if ((error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess)
    return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, static_cast<int>(config.threads),
                                                        config.shared_bytes);
  *blocks = each * multiprocessors;
  return error;
}

inline cudaError_t device_facts(int device, DeviceFacts* facts) {
  int cooperative = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } wanted[] = {{&facts->multiprocessors, cudaDevAttrMultiProcessorCount},
                {&facts->major, cudaDevAttrComputeCapabilityMajor},
                {&facts->minor, cudaDevAttrComputeCapabilityMinor},
                {&facts->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
                {&cooperative, cudaDevAttrCooperativeLaunch}};
  for (const auto& want : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(want.value, want.attribute, device);
    if (error != cudaSuccess) return error;
  }
  facts->cooperative = cooperative != 0;
  return cudaSuccess;
}

}  // namespace ctxfast

namespace ctxfast {

// The launch of a kernel whose blocks wait for one another: all have to be resident at once. An error where the device
// holds fewer: `what` begins its sentence, `way_out` ends it.
template <typename Params>
Status cooperative_config(const char* op, const char* what, const char* way_out, void (*kernel)(Params), int blocks,
                          unsigned threads, int64_t shared_bytes, LaunchConfig* config, unsigned cluster = 1) {
  config->grid = dim3(static_cast<unsigned>(blocks));
  config->threads = threads;
  config->shared_bytes = static_cast<size_t>(shared_bytes);
  config->cooperative = true;
  config->cluster = cluster;
  int resident = 0;
  CTXFAST_CUDA_CHECK(op, resident_blocks(kernel, *config, &resident));
  if (resident >= blocks) return {};
  return runtime_error(op, std::string(what) + " needs " + std::to_string(blocks) + " blocks " +
                               (cluster > 1 ? "in clusters of " + std::to_string(cluster) + " " : "") +
                               "resident at once and this device holds " + std::to_string(resident) + ". " + way_out);
}

}  // namespace ctxfast
