// SPDX-License-Identifier: Apache-2.0
#include "base/bind.h"
#include "lstm/step.h"

namespace ctxfast {
namespace {

using bind::field;
using S = LstmStepShape;

struct Asked {
  LstmStepShape shape;
  bool backward = false;
};

template <class P>
bind::Fields<P> shape() {
  return {field<&P::shape, &S::batch>("batch"),
          field<&P::shape, &S::steps>("steps"),
          field<&P::shape, &S::hidden>("hidden"),
          field<&P::shape, &S::size>("size"),
          field<&P::shape, &S::directions>("directions"),
          field<&P::shape, &S::has_proj>("has_proj"),
          field<&P::shape, &S::dtype>("dtype")};
}

bind::Fields<LstmStepForwardParams> forward_fields() {
  using P = LstmStepForwardParams;
  return bind::join<P>(
      {shape<P>(),
       {field<&P::gates>("gates"), field<&P::gates_strides>("gates_strides"), field<&P::packed>("packed"),
        field<&P::lengths>("lengths"), field<&P::h_0>("h_0"), field<&P::c_0>("c_0"), field<&P::cell_clip>("cell_clip"),
        field<&P::proj_clip>("proj_clip"), field<&P::output>("output"), field<&P::h_n>("h_n"), field<&P::c_n>("c_n"),
        field<&P::cells>("cells"), field<&P::workspace>("workspace"), field<&P::workspace_bytes>("workspace_bytes")}});
}

bind::Fields<LstmStepBackwardParams> backward_fields() {
  using P = LstmStepBackwardParams;
  return bind::join<P>(
      {shape<P>(),
       {field<&P::z>("z"), field<&P::z_strides>("z_strides"), field<&P::packed>("packed"),
        field<&P::lengths>("lengths"), field<&P::c_0>("c_0"), field<&P::cells>("cells"), field<&P::output>("output"),
        field<&P::grad_output>("grad_output"), field<&P::grad_h_n>("grad_h_n"), field<&P::grad_c_n>("grad_c_n"),
        field<&P::cell_clip>("cell_clip"), field<&P::proj_clip>("proj_clip"), field<&P::grad_gates>("grad_gates"),
        field<&P::grad_hidden>("grad_hidden"), field<&P::grad_h_0>("grad_h_0"), field<&P::grad_c_0>("grad_c_0"),
        field<&P::workspace>("workspace"), field<&P::workspace_bytes>("workspace_bytes")}});
}

bind::Fields<LstmStepPackParams> pack_fields() {
  using P = LstmStepPackParams;
  return bind::join<P>({shape<P>(),
                        {field<&P::backward>("backward"), field<&P::weight_hh>("weight_hh"),
                         field<&P::weight_hh_strides>("weight_hh_strides"), field<&P::weight_proj>("weight_proj"),
                         field<&P::weight_proj_strides>("weight_proj_strides"), field<&P::is_known>("is_known"),
                         field<&P::packed>("packed"), field<&P::packed_bytes>("packed_bytes")}});
}

bind::Fields<Asked> asked_fields() {
  return bind::join<Asked>({shape<Asked>(), {field<&Asked::backward>("backward")}});
}

int64_t packed_bytes(const Asked& wanted) { return lstm_step_packed_bytes(wanted.shape, wanted.backward); }
int64_t workspace_bytes(const Asked& wanted) { return lstm_step_workspace_bytes(wanted.shape, wanted.backward); }

const bind::Op op([](pybind11::module_& m) {
  bind::def(m, "lstm_step_workspace_bytes", &workspace_bytes, asked_fields());
  bind::def(m, "lstm_step_packed_bytes", &packed_bytes, asked_fields());
  bind::def(m, "lstm_step_pack", &lstm_step_pack, pack_fields());
  bind::def(m, "lstm_step_forward", &lstm_step_forward, forward_fields());
  bind::def(m, "lstm_step_backward", &lstm_step_backward, backward_fields());
});

}  // namespace
}  // namespace ctxfast
