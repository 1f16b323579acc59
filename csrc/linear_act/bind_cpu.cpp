// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.linear_act_*: the CPU product with bias and activation (csrc/linear_act/linear_act.h).
//
// Addresses are integers, 0 where a pointer may be null; strides in elements. ValueError for bad arguments,
// RuntimeError when memory or threads are not to be had. held: "float32", "bfloat16" or "int8".
//
//   linear_act_packed_bytes(in, out, held) -> int
//   linear_act_forward(rows, in, out, held, is_half, activation, x, stride_x, packed, scales, sums, bias, y, threads,
//                      isa="auto")
//       is_half: x, bias and y are bfloat16, else float32; activation: "none", "gelu", "gelu_tanh", "relu", "tanh".
#include "base/bindings.h"
#include "linear_act/linear_act.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

ctxfast::DType held_as(const std::string& name) {
  return name == "int8" ? ctxfast::DType::kInt8 : dtype_named("linear_act", name, false);
}

void forward(int64_t rows, int64_t in, int64_t out, const std::string& held, bool is_half,
             const std::string& activation, Address x, int64_t stride_x, Address packed, Address scales, Address sums,
             Address bias, Address y, int64_t threads, const std::string& isa) {
  ctxfast::LinearActParams params;
  params.rows = rows, params.in = in, params.out = out;
  params.held = held_as(held);
  params.type = is_half ? ctxfast::DType::kBFloat16 : ctxfast::DType::kFloat32;
  params.activation = activation_named("linear_act", activation);
  params.x = pointer<const void>(x), params.stride_x = stride_x;
  params.packed = pointer<const void>(packed);
  params.scales = pointer<const float>(scales), params.sums = pointer<const int32_t>(sums);
  params.bias = pointer<const void>(bias), params.y = pointer<void>(y);
  params.threads = threads;
  params.isa = isa_named("linear_act", isa);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::linear_act_forward(params);
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_linear_act(py::module_& m) {
  using py::arg;
  m.def(
      "linear_act_packed_bytes",
      [](int64_t in, int64_t out, const std::string& held) {
        return ctxfast::linear_act_packed_bytes(in, out, held_as(held));
      },
      arg("in"), arg("out"), arg("held"));
  m.def("linear_act_forward", &forward, arg("rows"), arg("in"), arg("out"), arg("held"), arg("is_half"),
        arg("activation"), arg("x"), arg("stride_x"), arg("packed"), arg("scales"), arg("sums"), arg("bias"), arg("y"),
        arg("threads") = 1, arg("isa") = "auto");
}
