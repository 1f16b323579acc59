// SPDX-License-Identifier: Apache-2.0
// What the CUDA test programs share, on a GPU and on the emulator: memory of the device, values rounded to a dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "base/testing.h"
#ifdef CTXFAST_EMULATE
#include "emulator/emulator.h"
#define CTXFAST_PROGRAM(name) name ", emulated"
#else
#define CTXFAST_PROGRAM(name) name
#endif

inline void must(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("FAIL CUDA says: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// False, and a line that says so, where there is no GPU.
inline bool has_gpu(const char* program) {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
  std::printf("%s: not run, no GPU\n", program);
  return false;
}

// The order in which the emulator runs threads and lets stores arrive; a GPU has its own.
inline void set_schedule([[maybe_unused]] uint64_t seed) {
#ifdef CTXFAST_EMULATE
  ctxfast::emulator::set_schedule(seed);
#endif
}

inline float as_float(float value) { return value; }
inline float as_float(__half value) { return __half2float(value); }
inline float as_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
std::vector<float> as_floats(const std::vector<T>& values) {
  std::vector<float> floats;
  for (const T value : values) floats.push_back(as_float(value));
  return floats;
}

// Rounded to T; `values` becomes what that holds.
template <typename T>
std::vector<T> rounded(std::vector<float>* values) {
  std::vector<T> result(values->begin(), values->end());
  *values = as_floats(result);
  return result;
}

template <typename T>
std::vector<T> to_host(const T* device, size_t count) {
  std::vector<T> host(count);
  must(cudaMemcpy(static_cast<void*>(host.data()), device, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

// Memory on the device until the program ends, every byte set; one element more than asked for, so never none.
template <typename T>
T* device_bytes(size_t count, int byte) {
  void* memory = nullptr;
  must(cudaMalloc(&memory, (count + 1) * sizeof(T)));
  must(cudaMemset(memory, byte, (count + 1) * sizeof(T)));
  return static_cast<T*>(memory);
}

template <typename T>
T* to_device(const std::vector<T>& host) {
  T* const device = device_bytes<T>(host.size(), 0xEE);
  must(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

// The same, freed with the object.
template <typename T>
struct Device {
  T* data;
  int64_t count;
  explicit Device(int64_t n) : data(device_bytes<T>(n, 0xEE)), count(n) {}
  explicit Device(const std::vector<T>& values) : data(to_device(values)), count(static_cast<int64_t>(values.size())) {}
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
  void fill(int byte) { must(cudaMemset(data, byte, count * sizeof(T))); }
  std::vector<T> host() const { return to_host(data, count); }
  std::vector<float> floats() const { return as_floats(host()); }
};
