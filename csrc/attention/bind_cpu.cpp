// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.attention_forward and attention_backward: attention inside packed sequences on the CPU
// (csrc/attention/attention.h).
//
// Addresses are integers, 0 where a pointer may be null; strides in elements. ValueError for bad arguments,
// RuntimeError when memory or threads are not to be had.
//
//   attention_forward(tokens, heads, head_dim, sequences, is_half, qkv, stride_qkv, bias, cu_seqlens, is_int64, scale,
//                     dropout_p, seeds, y, stride_y, threads, isa="auto")
//   attention_backward(tokens, heads, head_dim, sequences, is_half, qkv, stride_qkv, bias, cu_seqlens, is_int64, scale,
//                      dropout_p, seeds, grad, stride_grad, grad_qkv, stride_grad_qkv, threads, isa="auto")
//       is_half: qkv, bias, y and gradients are bfloat16, else float32; is_int64: cu_seqlens are int64, else int32;
//       seeds: address of two int64.
#include "attention/attention.h"
#include "base/bindings.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

ctxfast::AttentionParams params_of(int64_t tokens, int64_t heads, int64_t head_dim, int64_t sequences, bool is_half,
                                   Address qkv, int64_t stride_qkv, Address bias, Address cu_seqlens, bool is_int64,
                                   float scale, float dropout_p, Address seeds, int64_t threads,
                                   const std::string& isa) {
  ctxfast::AttentionParams params;
  params.tokens = tokens, params.heads = heads, params.head_dim = head_dim, params.sequences = sequences;
  params.type = is_half ? ctxfast::DType::kBFloat16 : ctxfast::DType::kFloat32;
  params.qkv = pointer<const void>(qkv), params.stride_qkv = stride_qkv;
  params.bias = pointer<const void>(bias);
  params.cu_seqlens = pointer<const void>(cu_seqlens), params.is_int64 = is_int64;
  params.scale = scale;
  params.dropout_p = dropout_p, params.seeds = pointer<const int64_t>(seeds);
  params.threads = threads;
  params.isa = isa_named("attention", isa);
  return params;
}

void forward(int64_t tokens, int64_t heads, int64_t head_dim, int64_t sequences, bool is_half, Address qkv,
             int64_t stride_qkv, Address bias, Address cu_seqlens, bool is_int64, float scale, float dropout_p,
             Address seeds, Address y, int64_t stride_y, int64_t threads, const std::string& isa) {
  ctxfast::AttentionParams params = params_of(tokens, heads, head_dim, sequences, is_half, qkv, stride_qkv, bias,
                                              cu_seqlens, is_int64, scale, dropout_p, seeds, threads, isa);
  params.y = pointer<void>(y), params.stride_y = stride_y;
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::attention_forward(params);
  }
  throw_unless_ok(status);
}

void backward(int64_t tokens, int64_t heads, int64_t head_dim, int64_t sequences, bool is_half, Address qkv,
              int64_t stride_qkv, Address bias, Address cu_seqlens, bool is_int64, float scale, float dropout_p,
              Address seeds, Address grad, int64_t stride_grad, Address grad_qkv, int64_t stride_grad_qkv,
              int64_t threads, const std::string& isa) {
  const ctxfast::AttentionParams params = params_of(tokens, heads, head_dim, sequences, is_half, qkv, stride_qkv, bias,
                                                    cu_seqlens, is_int64, scale, dropout_p, seeds, threads, isa);
  const ctxfast::AttentionGradients gradients = {pointer<const void>(grad), stride_grad, pointer<void>(grad_qkv),
                                                 stride_grad_qkv};
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::attention_backward(params, gradients);
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_attention(py::module_& m) {
  using py::arg;
  m.def("attention_forward", &forward, arg("tokens"), arg("heads"), arg("head_dim"), arg("sequences"), arg("is_half"),
        arg("qkv"), arg("stride_qkv"), arg("bias"), arg("cu_seqlens"), arg("is_int64"), arg("scale"), arg("dropout_p"),
        arg("seeds"), arg("y"), arg("stride_y"), arg("threads") = 1, arg("isa") = "auto");
  m.def("attention_backward", &backward, arg("tokens"), arg("heads"), arg("head_dim"), arg("sequences"), arg("is_half"),
        arg("qkv"), arg("stride_qkv"), arg("bias"), arg("cu_seqlens"), arg("is_int64"), arg("scale"), arg("dropout_p"),
        arg("seeds"), arg("grad"), arg("stride_grad"), arg("grad_qkv"), arg("stride_grad_qkv"), arg("threads") = 1,
        arg("isa") = "auto");
}
