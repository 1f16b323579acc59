// SPDX-License-Identifier: Apache-2.0
// What the binding files share: Status becomes an exception, addresses become pointers.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "base/common.h"
#include "base/isa.h"
#include "linear_act/linear_act.h"

void bind_attention(pybind11::module_& m);
void bind_char_cnn(pybind11::module_& m);
void bind_char_cnn_cuda(pybind11::module_& m);
void bind_layer_norm(pybind11::module_& m);
void bind_linear_act(pybind11::module_& m);
void bind_lstm(pybind11::module_& m);
void bind_lstm_persistent(pybind11::module_& m);
void bind_lstm_step(pybind11::module_& m);
void bind_lstm_persistent_backward(pybind11::module_& m);
void bind_scalar_mix(pybind11::module_& m);
void bind_transformer_layers(pybind11::module_& m);

// ValueError for arguments, RuntimeError for everything else.
inline void throw_unless_ok(const ctxfast::Status& status) {
  if (status.ok()) return;
  if (status.code == ctxfast::Code::kInvalidArgument) throw pybind11::value_error(status.message);
  throw std::runtime_error(status.message);
}

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

inline ctxfast::Activation activation_named(const char* op, const std::string& name) {
  const char* const known[] = {"none", "gelu", "gelu_tanh", "relu", "tanh"};
  for (int i = 0; i < 5; ++i) {
    if (name == known[i]) return static_cast<ctxfast::Activation>(i);
  }
  throw pybind11::value_error(
      ctxfast::invalid(op, "activation", "'" + name + "'", "'none', 'gelu', 'gelu_tanh', 'relu' or 'tanh'").message);
}
