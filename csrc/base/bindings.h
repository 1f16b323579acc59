// SPDX-License-Identifier: Apache-2.0
// What the binding files share: Status becomes an exception, addresses become pointers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "base/bind.h"

void bind_char_cnn_cuda(pybind11::module_& m);
void bind_lstm(pybind11::module_& m);
void bind_lstm_persistent(pybind11::module_& m);
void bind_lstm_step(pybind11::module_& m);
void bind_lstm_persistent_backward(pybind11::module_& m);
void bind_scalar_mix(pybind11::module_& m);

using ctxfast::bind::throw_unless_ok;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline ctxfast::DType dtype_named(const char* op, const std::string& name, bool has_float16) {
  if (name == "float32") return ctxfast::DType::kFloat32;
  if (name == "bfloat16") return ctxfast::DType::kBFloat16;
  if (name == "float16" && has_float16) return ctxfast::DType::kFloat16;
  throw pybind11::value_error(
      ctxfast::invalid(op, "dtype", "'" + name + "'",
                       has_float16 ? "'float32', 'float16' or 'bfloat16'" : "'float32' or 'bfloat16'")
          .message);
}

inline ctxfast::Isa isa_named(const char* op, const std::string& name) {
  ctxfast::Isa isa;
  if (ctxfast::find_isa(name, &isa)) return isa;
  std::string known = "'auto'";
  for (const ctxfast::Isa runs : ctxfast::runnable_isas()) known += std::string(", '") + ctxfast::isa_name(runs) + "'";
  throw pybind11::value_error(
      ctxfast::invalid(op, "isa", "'" + name + "'", known + ": what is compiled and this machine runs").message);
}
