// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.lstm_step_*: the recurrence on any GPU, step by step (csrc/lstm/step.h).
//
// Addresses are integers, 0 where a pointer may be null; strides are in elements; dtype: "float16", "bfloat16" or
// "float32". ValueError for bad arguments, RuntimeError for what CUDA reports, or when this build has no CUDA kernels.
// The device of the tensors must be current. `shape` below: batch, steps, hidden, size, directions, has_proj, dtype.
//
//   lstm_step_workspace_bytes(shape, backward) -> int
//   lstm_step_forward(shape, gates, gates_strides, packed_gates, packed_proj, lengths, h_0, c_0, cell_clip, proj_clip,
//                     output, h_n, c_n, cells, workspace, workspace_bytes, stream)
//   lstm_step_backward(shape, z, z_strides, packed_gates_t, packed_proj_t, lengths, c_0, cells, output, grad_output,
//                      grad_h_n, grad_c_n, cell_clip, proj_clip, grad_gates, grad_hidden, grad_h_0, grad_c_0,
//                      workspace, workspace_bytes, stream)
#include <utility>
#include <vector>

#include "base/bindings.h"
#include "ctxfast_build_info.h"
#include "lstm/step.h"

namespace py = pybind11;
using ctxfast::LstmStepShape;
using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Strides = std::vector<std::pair<int64_t, int64_t>>;

namespace {

#if CTXFAST_WITH_CUDA

LstmStepShape shape_of(int64_t batch, int64_t steps, int64_t hidden, int64_t size, int64_t directions, bool has_proj,
                       const std::string& dtype) {
  return {batch, steps, hidden, size, directions, has_proj, dtype_named("lstm", dtype, true)};
}

// One per direction, or none where `may_lack`.
template <typename T>
void take(const char* name, const Addresses& from, int64_t directions, bool may_lack, T* (&to)[2]) {
  if (may_lack && from.empty()) return;
  if (directions < 1 || directions > 2 || static_cast<int64_t>(from.size()) != directions) {
    throw py::value_error(ctxfast::invalid("lstm", std::string("the number of ") + name, std::to_string(from.size()),
                                           "one per direction, 1 or 2")
                              .message);
  }
  for (size_t r = 0; r < from.size(); ++r) to[r] = pointer<T>(from[r]);
}

void take(const Strides& from, int64_t (&to)[2][2]) {
  for (size_t r = 0; r < from.size() && r < 2; ++r) to[r][0] = from[r].first, to[r][1] = from[r].second;
}

int64_t workspace_bytes(int64_t batch, int64_t steps, int64_t hidden, int64_t size, int64_t directions, bool has_proj,
                        const std::string& dtype, bool backward) {
  return ctxfast::lstm_step_workspace_bytes(shape_of(batch, steps, hidden, size, directions, has_proj, dtype),
                                            backward);
}

void forward(int64_t batch, int64_t steps, int64_t hidden, int64_t size, int64_t directions, bool has_proj,
             const std::string& dtype, const Addresses& gates, const Strides& gates_strides,
             const Addresses& packed_gates, const Addresses& packed_proj, Address lengths, Address h_0, Address c_0,
             float cell_clip, float proj_clip, Address output, Address h_n, Address c_n, Address cells,
             Address workspace, int64_t workspace_bytes, Address stream) {
  ctxfast::LstmStepForwardParams params;
  params.shape = shape_of(batch, steps, hidden, size, directions, has_proj, dtype);
  take("gates", gates, directions, false, params.gates);
  take(gates_strides, params.gates_strides);
  take("packed_gates", packed_gates, directions, false, params.packed_gates);
  take("packed_proj", packed_proj, directions, !has_proj, params.packed_proj);
  params.lengths = pointer<const int64_t>(lengths);
  params.h_0 = pointer<const void>(h_0);
  params.c_0 = pointer<const float>(c_0);
  params.cell_clip = cell_clip;
  params.proj_clip = proj_clip;
  params.output = pointer<void>(output);
  params.h_n = pointer<void>(h_n);
  params.c_n = pointer<float>(c_n);
  params.cells = pointer<float>(cells);
  params.workspace = pointer<void>(workspace);
  params.workspace_bytes = workspace_bytes;
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::lstm_step_forward(params, pointer<CUstream_st>(stream));
  }
  throw_unless_ok(status);
}

void backward(int64_t batch, int64_t steps, int64_t hidden, int64_t size, int64_t directions, bool has_proj,
              const std::string& dtype, const Addresses& z, const Strides& z_strides, const Addresses& packed_gates_t,
              const Addresses& packed_proj_t, Address lengths, Address c_0, Address cells, Address output,
              Address grad_output, Address grad_h_n, Address grad_c_n, float cell_clip, float proj_clip,
              const Addresses& grad_gates, Address grad_hidden, Address grad_h_0, Address grad_c_0, Address workspace,
              int64_t workspace_bytes, Address stream) {
  ctxfast::LstmStepBackwardParams params;
  params.shape = shape_of(batch, steps, hidden, size, directions, has_proj, dtype);
  take("z", z, directions, false, params.z);
  take(z_strides, params.z_strides);
  take("packed_gates_t", packed_gates_t, directions, false, params.packed_gates_t);
  take("packed_proj_t", packed_proj_t, directions, !has_proj, params.packed_proj_t);
  params.lengths = pointer<const int64_t>(lengths);
  params.c_0 = pointer<const float>(c_0);
  params.cells = pointer<const float>(cells);
  params.output = pointer<const void>(output);
  params.grad_output = pointer<const void>(grad_output);
  params.grad_h_n = pointer<const float>(grad_h_n);
  params.grad_c_n = pointer<const float>(grad_c_n);
  params.cell_clip = cell_clip;
  params.proj_clip = proj_clip;
  take("grad_gates", grad_gates, directions, false, params.grad_gates);
  params.grad_hidden = pointer<void>(grad_hidden);
  params.grad_h_0 = pointer<float>(grad_h_0);
  params.grad_c_0 = pointer<float>(grad_c_0);
  params.workspace = pointer<void>(workspace);
  params.workspace_bytes = workspace_bytes;
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::lstm_step_backward(params, pointer<CUstream_st>(stream));
  }
  throw_unless_ok(status);
}

#endif

}  // namespace

void bind_lstm_step(py::module_& m) {
#if CTXFAST_WITH_CUDA
  using py::arg;
#define CTXFAST_SHAPE \
  arg("batch"), arg("steps"), arg("hidden"), arg("size"), arg("directions"), arg("has_proj"), arg("dtype")
  m.def("lstm_step_workspace_bytes", &workspace_bytes, CTXFAST_SHAPE, arg("backward"));
  m.def("lstm_step_forward", &forward, CTXFAST_SHAPE, arg("gates"), arg("gates_strides"), arg("packed_gates"),
        arg("packed_proj"), arg("lengths"), arg("h_0"), arg("c_0"), arg("cell_clip"), arg("proj_clip"), arg("output"),
        arg("h_n"), arg("c_n"), arg("cells"), arg("workspace"), arg("workspace_bytes"), arg("stream"));
  m.def("lstm_step_backward", &backward, CTXFAST_SHAPE, arg("z"), arg("z_strides"), arg("packed_gates_t"),
        arg("packed_proj_t"), arg("lengths"), arg("c_0"), arg("cells"), arg("output"), arg("grad_output"),
        arg("grad_h_n"), arg("grad_c_n"), arg("cell_clip"), arg("proj_clip"), arg("grad_gates"), arg("grad_hidden"),
        arg("grad_h_0"), arg("grad_c_0"), arg("workspace"), arg("workspace_bytes"), arg("stream"));
#undef CTXFAST_SHAPE
#else
  for (const char* name : {"lstm_step_workspace_bytes", "lstm_step_forward", "lstm_step_backward"}) {
    m.def(name, [](const py::args&, const py::kwargs&) {
      throw std::runtime_error(
          "ctxfast.lstm: this build has no CUDA kernels (" CTXFAST_CUDA_REASON
          "). Install the CUDA toolkit and rebuild with CTXFAST_CUDA=1 pip install --force-reinstall .");
    });
  }
#endif
}
