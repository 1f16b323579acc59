// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.attention_forward: attention inside packed sequences on the CPU (csrc/include/ctxfast/attention.h).
//
// Addresses are integers, 0 where a pointer may be null; strides in elements. ValueError for bad arguments,
// RuntimeError when memory or threads are not to be had.
//
//   attention_forward(tokens, heads, head_dim, sequences, is_half, qkv, stride_qkv, bias, cu_seqlens, is_int64, scale,
//                     y, stride_y, threads, isa="auto")
//       is_half: qkv, bias and y are bfloat16, else float32; is_int64: cu_seqlens are int64, else int32.
#include "ctxfast/attention.h"

#include "bindings.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

void forward(int64_t tokens, int64_t heads, int64_t head_dim, int64_t sequences, bool is_half, Address qkv,
             int64_t stride_qkv, Address bias, Address cu_seqlens, bool is_int64, float scale, Address y,
             int64_t stride_y, int64_t threads, const std::string& isa) {
  ctxfast::AttentionParams params;
  params.tokens = tokens, params.heads = heads, params.head_dim = head_dim, params.sequences = sequences;
  params.type = is_half ? ctxfast::DType::kBFloat16 : ctxfast::DType::kFloat32;
  params.qkv = pointer<const void>(qkv), params.stride_qkv = stride_qkv;
  params.bias = pointer<const void>(bias);
  params.cu_seqlens = pointer<const void>(cu_seqlens), params.is_int64 = is_int64;
  params.scale = scale;
  params.y = pointer<void>(y), params.stride_y = stride_y;
  params.threads = threads;
  params.isa = isa_named("attention", isa);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::attention_forward(params);
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_attention(py::module_& m) {
  using py::arg;
  m.def("attention_forward", &forward, arg("tokens"), arg("heads"), arg("head_dim"), arg("sequences"), arg("is_half"),
        arg("qkv"), arg("stride_qkv"), arg("bias"), arg("cu_seqlens"), arg("is_int64"), arg("scale"), arg("y"),
        arg("stride_y"), arg("threads") = 1, arg("isa") = "auto");
}
