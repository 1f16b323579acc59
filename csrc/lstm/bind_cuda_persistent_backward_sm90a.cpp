// SPDX-License-Identifier: Apache-2.0
//   lstm_persistent_backward_plan(batch, hidden, size, has_proj, directions) -> dict of a plan's fields
#include "base/bind.h"
#include "lstm/persistent_backward.h"

namespace ctxfast {
namespace {

namespace py = pybind11;
using bind::field;
using P = LstmPersistentBackwardParams;

py::dict plan(int64_t batch, int64_t hidden, int64_t size, bool has_proj, int64_t directions) {
  const auto plan = lstm_persistent_backward_plan(batch, hidden, size, has_proj, directions);
  return py::dict(py::arg("blocks") = plan.blocks, py::arg("workspace_bytes") = plan.workspace_bytes,
                  py::arg("refusal") = plan.refusal);
}

const bind::Op op([](py::module_& m) {
  m.def("lstm_persistent_backward_plan", &plan);
  bind::def(
      m, "lstm_persistent_backward", &lstm_persistent_backward,
      bind::join<P>(
          {{field<&P::batch>("batch"), field<&P::steps>("steps"), field<&P::hidden>("hidden"), field<&P::size>("size"),
            field<&P::directions>("directions"), field<&P::has_proj>("has_proj"), field<&P::dtype>("dtype")},
           {field<&P::weight_hh>("weight_hh"), field<&P::weight_proj>("weight_proj"), field<&P::z>("z"),
            field<&P::z_strides>("z_strides"), field<&P::cells>("cells"), field<&P::c_0>("c_0"),
            field<&P::output>("output"), field<&P::output_strides>("output_strides"),
            field<&P::grad_output>("grad_output"), field<&P::grad_output_strides>("grad_output_strides"),
            field<&P::grad_h_n>("grad_h_n"), field<&P::grad_c_n>("grad_c_n"), field<&P::lengths>("lengths")},
           {field<&P::grad_gates>("grad_gates"), field<&P::grad_hidden>("grad_hidden"), field<&P::grad_h_0>("grad_h_0"),
            field<&P::grad_c_0>("grad_c_0"), field<&P::workspace>("workspace"),
            field<&P::workspace_bytes>("workspace_bytes"), field<&P::cell_clip>("cell_clip"),
            field<&P::proj_clip>("proj_clip")}}));
});

}  // namespace
}  // namespace ctxfast
