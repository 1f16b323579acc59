// SPDX-License-Identifier: Apache-2.0
#include "base/bind.h"
#include "lstm/lstm.h"

namespace ctxfast {
namespace {

using bind::field, bind::option;
using S = LstmShape;
using I = LstmInputShape;

template <class P>
bind::Fields<P> shape() {
  return {field<&P::shape, &S::hidden>("hidden"), field<&P::shape, &S::proj_size>("proj_size"),
          field<&P::shape, &S::has_projection>("has_projection")};
}

template <class P>
bind::Fields<P> weight_dtype() {
  return {field<&P::shape, &S::weight_dtype>("weight_dtype")};
}

void define_packing(pybind11::module_& m) {
  using P = LstmPackParams;
  using X = LstmPackInputParams;
  const bind::Fields<S> sizes = {field<&S::hidden>("hidden"), field<&S::proj_size>("proj_size"),
                                 field<&S::has_projection>("has_projection")};
  const bind::Fields<P> weights = {
      field<&P::weight_hh>("weight_hh"),     field<&P::weight_hh_strides>("weight_hh_strides"),
      field<&P::weight_proj>("weight_proj"), field<&P::weight_proj_strides>("weight_proj_strides"),
      field<&P::packed>("packed"),           option<&P::threads>("threads")};
  const bind::Fields<S> typed = bind::join<S>({sizes, {field<&S::weight_dtype>("weight_dtype")}});
  bind::def(m, "lstm_packed_bytes", &lstm_packed_bytes, typed);
  bind::def(m, "lstm_pack", &lstm_pack, bind::join<P>({shape<P>(), weight_dtype<P>(), weights}));
  bind::def(m, "lstm_backward_packed_bytes", &lstm_backward_packed_bytes, typed);
  bind::def(m, "lstm_pack_backward", &lstm_pack_backward, bind::join<P>({shape<P>(), weight_dtype<P>(), weights}));
  bind::def(m, "lstm_input_packed_bytes", &lstm_input_packed_bytes,
            {field<&I::hidden>("hidden"), field<&I::input>("input"), field<&I::weight_dtype>("weight_dtype")});
  bind::def(
      m, "lstm_pack_input", &lstm_pack_input,
      {field<&X::shape, &I::hidden>("hidden"), field<&X::shape, &I::input>("input"),
       field<&X::shape, &I::weight_dtype>("weight_dtype"), field<&X::weight_ih>("weight_ih"),
       field<&X::weight_ih_strides>("weight_ih_strides"), field<&X::packed>("packed"), option<&X::threads>("threads")});
}

bind::Fields<LstmParams> forward_fields() {
  using P = LstmParams;
  return bind::join<P>({{field<&P::batch>("batch"), field<&P::steps>("steps"), field<&P::directions>("directions")},
                        shape<P>(),
                        weight_dtype<P>(),
                        {field<&P::input>("input"),
                         field<&P::x>("x"),
                         field<&P::x_strides>("x_strides"),
                         field<&P::packed_input>("packed_input"),
                         field<&P::bias>("bias"),
                         field<&P::packed>("packed"),
                         field<&P::lengths>("lengths"),
                         field<&P::h_0>("h_0"),
                         field<&P::c_0>("c_0"),
                         field<&P::output>("output"),
                         field<&P::output_strides>("output_strides"),
                         field<&P::h_n>("h_n"),
                         field<&P::c_n>("c_n"),
                         option<&P::cells>("cells"),
                         option<&P::z>("z"),
                         option<&P::z_dtype>("z_dtype"),
                         option<&P::cell_clip>("cell_clip"),
                         option<&P::proj_clip>("proj_clip"),
                         option<&P::threads>("threads"),
                         option<&P::isa>("isa")}});
}

bind::Fields<LstmBackwardParams> backward_fields() {
  using P = LstmBackwardParams;
  return bind::join<P>({{field<&P::batch>("batch"), field<&P::steps>("steps"), field<&P::reverse>("reverse")},
                        shape<P>(),
                        weight_dtype<P>(),
                        {field<&P::packed>("packed"),
                         field<&P::lengths>("lengths"),
                         field<&P::z>("z"),
                         field<&P::cells>("cells"),
                         field<&P::c_0>("c_0"),
                         field<&P::output>("output"),
                         field<&P::output_strides>("output_strides"),
                         field<&P::grad_output>("grad_output"),
                         field<&P::grad_output_strides>("grad_output_strides"),
                         field<&P::grad_h_n>("grad_h_n"),
                         field<&P::grad_c_n>("grad_c_n"),
                         field<&P::grad_z>("grad_z"),
                         field<&P::grad_hidden>("grad_hidden"),
                         field<&P::m>("m"),
                         field<&P::grad_bias>("grad_bias"),
                         field<&P::grad_h_0>("grad_h_0"),
                         field<&P::grad_c_0>("grad_c_0"),
                         option<&P::cell_clip>("cell_clip"),
                         option<&P::proj_clip>("proj_clip"),
                         option<&P::threads>("threads"),
                         option<&P::isa>("isa")}});
}

const bind::Op op([](pybind11::module_& m) {
  define_packing(m);
  bind::def(m, "lstm_forward", &lstm_forward, forward_fields());
  bind::def(m, "lstm_backward", &lstm_backward, backward_fields());
});

}  // namespace
}  // namespace ctxfast
