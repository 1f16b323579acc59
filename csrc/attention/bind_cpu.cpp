// SPDX-License-Identifier: Apache-2.0
#include "attention/attention.h"
#include "base/bind.h"

namespace ctxfast {
namespace {

using bind::field, bind::option;
using P = AttentionParams;
using G = AttentionGradients;
using L = AttentionPlaces;

const bind::Op op([](pybind11::module_& m) {
  const bind::Fields<P> shared = {
      field<&P::tokens>("tokens"),         field<&P::heads>("heads"),       field<&P::head_dim>("head_dim"),
      field<&P::sequences>("sequences"),   field<&P::io_dtype>("io_dtype"), field<&P::qkv>("qkv"),
      field<&P::stride_qkv>("stride_qkv"), field<&P::bias>("bias"),         field<&P::cu_seqlens>("cu_seqlens"),
      field<&P::is_int64>("is_int64"),     field<&P::scale>("scale"),       field<&P::dropout_p>("dropout_p"),
      field<&P::seeds>("seeds"),
  };
  const bind::Fields<P> options = {
      option<&P::threads>("threads"),
      option<&P::isa>("isa"),
      option<&P::kv_heads>("kv_heads"),
      option<&P::places, &L::relative_bias>("relative_bias"),
      option<&P::places, &L::reach>("reach"),
      option<&P::places, &L::window>("window"),
      option<&P::places, &L::rotary>("rotary"),
      option<&P::places, &L::positions>("positions"),
      option<&P::places, &L::rotated>("rotated"),
  };
  bind::def(m, "attention_forward", &attention_forward,
            bind::join<P>({shared, {field<&P::y>("y"), field<&P::stride_y>("stride_y")}, options}));
  bind::def(m, "attention_backward", &attention_backward,
            bind::join<P>(
                {shared,
                 {field<&P::gradients, &G::y>("grad"), field<&P::gradients, &G::stride_y>("stride_grad"),
                  field<&P::gradients, &G::qkv>("grad_qkv"), field<&P::gradients, &G::stride_qkv>("stride_grad_qkv")},
                 options,
                 {option<&P::gradients, &G::relative_bias>("grad_relative_bias")}}));
});

}  // namespace
}  // namespace ctxfast
