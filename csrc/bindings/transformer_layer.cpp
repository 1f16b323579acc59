// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.transformer_layer_forward: a whole encoder layer on the CPU (csrc/include/ctxfast/transformer_layer.h).
//
// Addresses are integers, 0 where a pointer may be null. ValueError for bad arguments, RuntimeError when memory or
// threads are not to be had.
//
//   transformer_layer_forward(tokens, hidden, heads, intermediate, sequences, is_half, is_int8, activation, eps, x,
//                             cu_seqlens, is_int64, products, norms, y, threads, isa="auto")
//       is_half: everything but packed weights is bfloat16, else float32; is_int8: packed weights are int8
//       products: qkv, project, widen, narrow as (packed, scales, sums, bias); norms: both as (weight, bias)
#include "ctxfast/transformer_layer.h"

#include <array>
#include <tuple>

#include "bindings.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using Product = std::tuple<Address, Address, Address, Address>;
using Norm = std::tuple<Address, Address>;

namespace {

void forward(int64_t tokens, int64_t hidden, int64_t heads, int64_t intermediate, int64_t sequences, bool is_half,
             bool is_int8, const std::string& activation, float eps, Address x, Address cu_seqlens, bool is_int64,
             const std::array<Product, 4>& products, const std::array<Norm, 2>& norms, Address y, int64_t threads,
             const std::string& isa) {
  ctxfast::TransformerLayerParams params;
  params.tokens = tokens, params.hidden = hidden, params.heads = heads, params.intermediate = intermediate;
  params.sequences = sequences;
  params.type = is_half ? ctxfast::DType::kBFloat16 : ctxfast::DType::kFloat32;
  params.held = is_int8 ? ctxfast::DType::kInt8 : params.type;
  params.activation = activation_named("transformer_layer", activation);
  params.eps = eps;
  params.x = pointer<const void>(x);
  params.cu_seqlens = pointer<const void>(cu_seqlens), params.is_int64 = is_int64;
  ctxfast::TransformerLayerProduct* const own[] = {&params.qkv, &params.project, &params.widen, &params.narrow};
  for (int i = 0; i < 4; ++i) {
    const auto& [packed, scales, sums, bias] = products[i];
    *own[i] = {pointer<const void>(packed), pointer<const float>(scales), pointer<const int32_t>(sums),
               pointer<const void>(bias)};
  }
  params.attention_norm = {pointer<const void>(std::get<0>(norms[0])), pointer<const void>(std::get<1>(norms[0]))};
  params.output_norm = {pointer<const void>(std::get<0>(norms[1])), pointer<const void>(std::get<1>(norms[1]))};
  params.y = pointer<void>(y);
  params.threads = threads;
  params.isa = isa_named("transformer_layer", isa);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::transformer_layer_forward(params);
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_transformer_layer(py::module_& m) {
  using py::arg;
  m.def("transformer_layer_forward", &forward, arg("tokens"), arg("hidden"), arg("heads"), arg("intermediate"),
        arg("sequences"), arg("is_half"), arg("is_int8"), arg("activation"), arg("eps"), arg("x"), arg("cu_seqlens"),
        arg("is_int64"), arg("products"), arg("norms"), arg("y"), arg("threads") = 1, arg("isa") = "auto");
}
