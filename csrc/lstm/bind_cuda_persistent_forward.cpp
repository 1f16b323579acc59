// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.lstm_persistent_*: the kernel of csrc/lstm/persistent_forward.h.
//
// Addresses are integers, 0 for none; per-direction arguments are lists; strides in elements, of batch and steps or of
// a row; dtype "float16" or "bfloat16". ValueError for bad arguments, RuntimeError for what cannot run here. The device
// of the tensors must be current.
//
//   lstm_persistent_device(index) -> (multiprocessors, major, minor, shared_per_block, cooperative) of a CUDA device
//   lstm_persistent_forward_plan(device, batch, hidden, size, has_proj, directions) -> dict of cells, blocks,
//   tile_rows,
//       shared_bytes, workspace_bytes, refusal ("" if there is none); in a build without the kernel: a refusal
//   lstm_persistent_forward(device, ..., stream)
#include <array>
#include <tuple>
#include <vector>

#include "base/bindings.h"
#include "ctxfast_build_info.h"
#include "lstm/persistent_forward.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using Strides = std::array<int64_t, 2>;
using Facts = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;

namespace {

ctxfast::LstmPersistentDevice device_of(const Facts& facts) {
  return {std::get<0>(facts), std::get<1>(facts), std::get<2>(facts), std::get<3>(facts), std::get<4>(facts)};
}

#if CTXFAST_WITH_CUDA && CTXFAST_SM90A

ctxfast::LstmPersistentForwardPlan plan_of(const Facts& facts, int64_t batch, int64_t hidden, int64_t size,
                                           bool has_proj, int64_t directions) {
  return ctxfast::lstm_persistent_forward_plan(device_of(facts), batch, hidden, size, has_proj, directions);
}

ctxfast::Status ask(int index, ctxfast::LstmPersistentDevice* found) {
  return ctxfast::lstm_persistent_device(index, found);
}

ctxfast::Status run(const ctxfast::LstmPersistentForwardParams& params, const Facts& facts, CUstream_st* stream) {
  return ctxfast::lstm_persistent_forward(params, device_of(facts), stream);
}

#else

constexpr const char* kMissing = CTXFAST_WITH_CUDA ? "this build has no kernels for sm_90a; rebuild with "
                                                     "CTXFAST_CUDA_ARCHS holding 90a."
                                                   : "this build has no CUDA kernels (" CTXFAST_CUDA_REASON ").";

ctxfast::LstmPersistentForwardPlan plan_of(const Facts&, int64_t, int64_t, int64_t, bool, int64_t) {
  ctxfast::LstmPersistentForwardPlan plan;
  plan.refusal = kMissing;
  return plan;
}

ctxfast::Status ask(int, ctxfast::LstmPersistentDevice*) { return ctxfast::runtime_error("lstm", kMissing); }

ctxfast::Status run(const ctxfast::LstmPersistentForwardParams&, const Facts&, CUstream_st*) {
  return ctxfast::runtime_error("lstm", kMissing);
}

#endif

Facts device(int index) {
  ctxfast::LstmPersistentDevice found;
  throw_unless_ok(ask(index, &found));
  return {found.multiprocessors, found.major, found.minor, found.shared_per_block, found.cooperative};
}

py::dict plan(const Facts& facts, int64_t batch, int64_t hidden, int64_t size, bool has_proj, int64_t directions) {
  const ctxfast::LstmPersistentForwardPlan found = plan_of(facts, batch, hidden, size, has_proj, directions);
  py::dict result;
  result["cells"] = found.cells;
  result["blocks"] = found.blocks;
  result["tile_rows"] = found.tile_rows;
  result["shared_bytes"] = found.shared_bytes;
  result["workspace_bytes"] = found.workspace_bytes;
  result["refusal"] = found.refusal;
  return result;
}

void check_count(const char* name, size_t count, size_t wanted) {
  if (count == wanted) return;
  throw py::value_error(
      ctxfast::invalid("lstm", std::string("the number of ") + name, std::to_string(count), std::to_string(wanted))
          .message);
}

void forward(const Facts& facts, int64_t batch, int64_t steps, int64_t hidden, int64_t size, const std::string& dtype,
             const std::vector<Address>& gates, const std::vector<Strides>& gates_strides,
             const std::vector<Address>& weight_hh, const std::vector<int64_t>& weight_hh_stride,
             const std::vector<Address>& weight_proj, const std::vector<int64_t>& weight_proj_stride, Address lengths,
             Address h_0, Address c_0, Address output, const Strides& output_strides, Address h_n, Address c_n,
             Address cells, Address workspace, int64_t workspace_bytes, float cell_clip, float proj_clip,
             Address stream) {
  ctxfast::LstmPersistentForwardParams p;
  const size_t directions = gates.size();
  if (directions < 1 || directions > 2) {
    throw py::value_error(
        ctxfast::invalid("lstm", "the number of gates", std::to_string(directions), "1 or 2").message);
  }
  p.has_proj = !weight_proj.empty();
  check_count("gates_strides", gates_strides.size(), directions);
  check_count("weight_hh", weight_hh.size(), directions);
  check_count("weight_hh_stride", weight_hh_stride.size(), directions);
  if (p.has_proj) check_count("weight_proj", weight_proj.size(), directions);
  check_count("weight_proj_stride", weight_proj_stride.size(), weight_proj.size());
  p.batch = batch, p.steps = steps, p.hidden = hidden, p.size = size;
  p.directions = static_cast<int64_t>(directions);
  p.dtype = dtype_named("lstm", dtype, true);
  for (size_t r = 0; r < directions; ++r) {
    p.gates[r] = pointer<const void>(gates[r]);
    for (int i = 0; i < 2; ++i) p.gates_strides[r][i] = gates_strides[r][i];
    p.weight_hh[r] = pointer<const void>(weight_hh[r]);
    p.weight_hh_stride[r] = weight_hh_stride[r];
    if (!p.has_proj) continue;
    p.weight_proj[r] = pointer<const void>(weight_proj[r]);
    p.weight_proj_stride[r] = weight_proj_stride[r];
  }
  p.lengths = pointer<const int64_t>(lengths);
  p.h_0 = pointer<const void>(h_0);
  p.c_0 = pointer<const float>(c_0);
  p.cell_clip = cell_clip;
  p.proj_clip = proj_clip;
  p.output = pointer<void>(output);
  for (int i = 0; i < 2; ++i) p.output_strides[i] = output_strides[i];
  p.h_n = pointer<void>(h_n);
  p.c_n = pointer<float>(c_n);
  p.cells = pointer<float>(cells);
  p.workspace = pointer<void>(workspace);
  p.workspace_bytes = workspace_bytes;
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = run(p, facts, pointer<CUstream_st>(stream));
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_lstm_persistent(py::module_& m) {
  using py::arg;
  m.def("lstm_persistent_device", &device, arg("index"));
  m.def("lstm_persistent_forward_plan", &plan, arg("device"), arg("batch"), arg("hidden"), arg("size"), arg("has_proj"),
        arg("directions"));
  m.def("lstm_persistent_forward", &forward, arg("device"), arg("batch"), arg("steps"), arg("hidden"), arg("size"),
        arg("dtype"), arg("gates"), arg("gates_strides"), arg("weight_hh"), arg("weight_hh_stride"), arg("weight_proj"),
        arg("weight_proj_stride"), arg("lengths"), arg("h_0"), arg("c_0"), arg("output"), arg("output_strides"),
        arg("h_n"), arg("c_n"), arg("cells"), arg("workspace"), arg("workspace_bytes"), arg("cell_clip"),
        arg("proj_clip"), arg("stream"));
}
