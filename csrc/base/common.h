// SPDX-License-Identifier: Apache-2.0
// What every op's header shares: how a call reports failure, element types, small arithmetic.
// No torch, no Python: this and all of csrc but the bindings stand alone.
#pragma once

#include <cstdint>
#include <string>

namespace ctxfast {

enum class Code { kOk, kInvalidArgument, kRuntimeError };

// Result of every call into a kernel. An error's message reads "ctxfast.<op>: <argument> is <got>; expected <wanted>."
struct Status {
  Code code = Code::kOk;
  std::string message;

  bool ok() const { return code == Code::kOk; }
};

inline Status invalid(const char* op, const std::string& field, const std::string& got, const std::string& wanted) {
  return {Code::kInvalidArgument,
          std::string("ctxfast.") + op + ": " + field + " is " + got + "; expected " + wanted + "."};
}

inline Status runtime_error(const char* op, const std::string& what) {
  return {Code::kRuntimeError, std::string("ctxfast.") + op + ": " + what};
}

enum class DType { kFloat32, kFloat16, kBFloat16, kInt8 };
constexpr const char* kDTypeNames[] = {"float32", "float16", "bfloat16", "int8"};
inline const char* dtype_name(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace ctxfast

#if defined(__CUDACC__) || defined(CTXFAST_EMULATE)
// For functions that return Status: leaves with the CUDA error's own words. Never throws, never exits.
#define CTXFAST_CUDA_CHECK(op, call)                                                                              \
  do {                                                                                                            \
    const cudaError_t ctxfast_error_ = (call);                                                                    \
    if (ctxfast_error_ != cudaSuccess)                                                                            \
      return ::ctxfast::runtime_error(op, std::string("CUDA says: ") + cudaGetErrorString(ctxfast_error_) + "."); \
  } while (0)
#endif
