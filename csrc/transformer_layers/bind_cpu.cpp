// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.transformer_layers_forward: encoder layers on the CPU (csrc/transformer_layers/transformer_layers.h).
//
// Addresses are integers. ValueError for bad arguments, RuntimeError when memory or threads are not to be had.
//
//   transformer_layers_forward(tokens, hidden, heads, intermediate, sequences, is_half, is_int8, activation, eps, x,
//                              cu_seqlens, is_int64, layers, count, all_layers, y, threads, isa="auto")
//       is_half: everything but packed weights is bfloat16, else float32; is_int8: packed weights are int8
//       layers: address of `count` rows of 20 addresses, 0 where a pointer may be null: qkv and project as packed,
//               scales, sums, bias each; attention_norm as weight, bias; widen and narrow; output_norm
//       y: address of the outputs' addresses: with all_layers `count`, else one
#include "base/bindings.h"
#include "transformer_layers/transformer_layers.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

void forward(int64_t tokens, int64_t hidden, int64_t heads, int64_t intermediate, int64_t sequences, bool is_half,
             bool is_int8, const std::string& activation, float eps, Address x, Address cu_seqlens, bool is_int64,
             Address layers, int64_t count, bool all_layers, Address y, int64_t threads, const std::string& isa) {
  ctxfast::TransformerLayersParams params;
  params.tokens = tokens, params.hidden = hidden, params.heads = heads, params.intermediate = intermediate;
  params.sequences = sequences;
  params.type = is_half ? ctxfast::DType::kBFloat16 : ctxfast::DType::kFloat32;
  params.held = is_int8 ? ctxfast::DType::kInt8 : params.type;
  params.activation = activation_named("transformer_layers", activation);
  params.eps = eps;
  params.x = pointer<const void>(x);
  params.cu_seqlens = pointer<const void>(cu_seqlens), params.is_int64 = is_int64;
  params.layers = pointer<const ctxfast::TransformerLayer>(layers), params.count = count;
  params.all_layers = all_layers;
  params.y = pointer<void* const>(y);
  params.threads = threads;
  params.isa = isa_named("transformer_layers", isa);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::transformer_layers_forward(params);
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_transformer_layers(py::module_& m) {
  using py::arg;
  m.def("transformer_layers_forward", &forward, arg("tokens"), arg("hidden"), arg("heads"), arg("intermediate"),
        arg("sequences"), arg("is_half"), arg("is_int8"), arg("activation"), arg("eps"), arg("x"), arg("cu_seqlens"),
        arg("is_int64"), arg("layers"), arg("count"), arg("all_layers"), arg("y"), arg("threads") = 1,
        arg("isa") = "auto");
}
