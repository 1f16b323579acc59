// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.layer_norm_forward: add_layer_norm and embed_layer_norm on the CPU (csrc/layer_norm/layer_norm.h).
//
// Addresses are integers, 0 where a pointer may be null; strides in elements. ValueError for bad arguments,
// RuntimeError when threads are not to be had.
//
//   layer_norm_forward(rows, size, is_half, sources, shift, weight, bias, eps, y, threads, isa="auto")
//       sources: 1 to 4 of (rows, stride, ids or 0, rows there are, whether ids are int64); is_half: bfloat16, else
//       float32
#include <tuple>
#include <vector>

#include "base/bindings.h"
#include "layer_norm/layer_norm.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using Source = std::tuple<Address, int64_t, Address, int64_t, bool>;

namespace {

void forward(int64_t rows, int64_t size, bool is_half, const std::vector<Source>& sources, Address shift,
             Address weight, Address bias, float eps, Address y, int64_t threads, const std::string& isa) {
  ctxfast::LayerNormParams params;
  params.rows = rows, params.size = size;
  params.type = is_half ? ctxfast::DType::kBFloat16 : ctxfast::DType::kFloat32;
  params.sources = static_cast<int64_t>(sources.size());
  for (size_t s = 0; s < sources.size() && s < ctxfast::kLayerNormSources; ++s) {
    const auto& [address, stride, ids, count, is_int64] = sources[s];
    params.source[s] = {pointer<const void>(address), stride, pointer<const void>(ids), count, is_int64};
  }
  params.shift = pointer<const void>(shift);
  params.weight = pointer<const void>(weight), params.bias = pointer<const void>(bias);
  params.eps = eps;
  params.y = pointer<void>(y);
  params.threads = threads;
  params.isa = isa_named("layer_norm", isa);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::layer_norm_forward(params);
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_layer_norm(py::module_& m) {
  using py::arg;
  m.def("layer_norm_forward", &forward, arg("rows"), arg("size"), arg("is_half"), arg("sources"), arg("shift"),
        arg("weight"), arg("bias"), arg("eps"), arg("y"), arg("threads") = 1, arg("isa") = "auto");
}
