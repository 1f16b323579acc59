// SPDX-License-Identifier: Apache-2.0
//   lstm_persistent_device(index) -> the six facts of a CUDA device that LstmPersistentDevice holds, in its order
//   lstm_persistent_forward_plan(device, batch, hidden, size, has_proj, directions) -> dict of a plan's fields
#include <pybind11/stl.h>

#include <tuple>

#include "base/bind.h"
#include "lstm/persistent_forward.h"

namespace ctxfast {

static void set(PyObject* from, LstmPersistentDevice& to) {
  bind::set_all(from, to.multiprocessors, to.major, to.minor, to.shared_per_block, to.cooperative, to.pairs);
}

namespace {

namespace py = pybind11;
using bind::field;
using P = LstmPersistentForwardParams;
using Facts = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, int64_t>;

Facts device(int index) {
  LstmPersistentDevice facts;
  bind::throw_unless_ok(lstm_persistent_device(index, &facts));
  return {facts.multiprocessors, facts.major, facts.minor, facts.shared_per_block, facts.cooperative, facts.pairs};
}

py::dict plan(const Facts& facts, int64_t batch, int64_t hidden, int64_t size, bool has_proj, int64_t directions) {
  const auto device = std::apply([](auto... each) { return LstmPersistentDevice{each...}; }, facts);
  const auto plan = lstm_persistent_forward_plan(device, batch, hidden, size, has_proj, directions);
  return py::dict(py::arg("cells") = plan.cells, py::arg("blocks") = plan.blocks, py::arg("tile_rows") = plan.tile_rows,
                  py::arg("in_pairs") = plan.in_pairs, py::arg("shared_bytes") = plan.shared_bytes,
                  py::arg("workspace_bytes") = plan.workspace_bytes, py::arg("refusal") = plan.refusal);
}

const bind::Op op([](py::module_& m) {
  m.def("lstm_persistent_device", &device);
  m.def("lstm_persistent_forward_plan", &plan);
  bind::def(m, "lstm_persistent_forward", &lstm_persistent_forward,
            bind::join<P>({{field<&P::device>("device"), field<&P::batch>("batch"), field<&P::steps>("steps"),
                            field<&P::hidden>("hidden"), field<&P::size>("size"), field<&P::directions>("directions"),
                            field<&P::has_proj>("has_proj"), field<&P::dtype>("dtype")},
                           {field<&P::gates>("gates"), field<&P::gates_strides>("gates_strides"),
                            field<&P::weight_hh>("weight_hh"), field<&P::weight_hh_stride>("weight_hh_stride"),
                            field<&P::weight_proj>("weight_proj"), field<&P::weight_proj_stride>("weight_proj_stride"),
                            field<&P::lengths>("lengths"), field<&P::h_0>("h_0"), field<&P::c_0>("c_0")},
                           {field<&P::output>("output"), field<&P::output_strides>("output_strides"),
                            field<&P::h_n>("h_n"), field<&P::c_n>("c_n"), field<&P::cells>("cells"),
                            field<&P::workspace>("workspace"), field<&P::workspace_bytes>("workspace_bytes"),
                            field<&P::cell_clip>("cell_clip"), field<&P::proj_clip>("proj_clip")}}));
});

}  // namespace
}  // namespace ctxfast
