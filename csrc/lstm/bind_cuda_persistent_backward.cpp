// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.lstm_persistent_backward*: the kernel of csrc/lstm/persistent_backward.h.
//
// Addresses are integers, 0 for none; per-direction arguments are lists; strides in elements, of batch and steps; dtype
// "float16" or "bfloat16". ValueError for bad arguments, RuntimeError for what cannot run here. The device of the
// tensors must be current.
//
//   lstm_persistent_backward_plan(batch, hidden, size, has_proj, directions) -> dict of blocks,
//       workspace_bytes, refusal ("" if there is none); in a build without the kernel: a refusal
//   lstm_persistent_backward(..., stream)
#include <array>
#include <vector>

#include "base/bindings.h"
#include "ctxfast_build_info.h"
#include "lstm/persistent_backward.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using Strides = std::array<int64_t, 2>;

namespace {

#if CTXFAST_WITH_CUDA && CTXFAST_SM90A

ctxfast::LstmPersistentBackwardPlan plan_of(int64_t batch, int64_t hidden, int64_t size, bool has_proj,
                                            int64_t directions) {
  return ctxfast::lstm_persistent_backward_plan(batch, hidden, size, has_proj, directions);
}

ctxfast::Status run(const ctxfast::LstmPersistentBackwardParams& params, CUstream_st* stream) {
  return ctxfast::lstm_persistent_backward(params, stream);
}

#else

constexpr const char* kMissing = CTXFAST_WITH_CUDA ? "this build has no kernels for sm_90a; rebuild with "
                                                     "CTXFAST_CUDA_ARCHS holding 90a."
                                                   : "this build has no CUDA kernels (" CTXFAST_CUDA_REASON ").";

ctxfast::LstmPersistentBackwardPlan plan_of(int64_t, int64_t, int64_t, bool, int64_t) {
  ctxfast::LstmPersistentBackwardPlan plan;
  plan.refusal = kMissing;
  return plan;
}

ctxfast::Status run(const ctxfast::LstmPersistentBackwardParams&, CUstream_st*) {
  return ctxfast::runtime_error("lstm", kMissing);
}

#endif

py::dict plan(int64_t batch, int64_t hidden, int64_t size, bool has_proj, int64_t directions) {
  const ctxfast::LstmPersistentBackwardPlan found = plan_of(batch, hidden, size, has_proj, directions);
  py::dict result;
  result["blocks"] = found.blocks;
  result["workspace_bytes"] = found.workspace_bytes;
  result["refusal"] = found.refusal;
  return result;
}

void check_count(const char* name, size_t count, size_t directions) {
  if (count == directions) return;
  throw py::value_error(
      ctxfast::invalid("lstm", std::string("the number of ") + name, std::to_string(count), std::to_string(directions))
          .message);
}

void backward(int64_t batch, int64_t steps, int64_t hidden, int64_t size, const std::string& dtype,
              const std::vector<Address>& weight_hh, const std::vector<Address>& weight_proj,
              const std::vector<Address>& z, const std::vector<Strides>& z_strides, Address cells, Address c_0,
              Address output, const Strides& output_strides, Address grad_output, const Strides& grad_output_strides,
              Address grad_h_n, Address grad_c_n, Address lengths, const std::vector<Address>& grad_gates,
              Address grad_hidden, Address grad_h_0, Address grad_c_0, Address workspace, int64_t workspace_bytes,
              float cell_clip, float proj_clip, Address stream) {
  ctxfast::LstmPersistentBackwardParams p;
  const size_t directions = z.size();
  if (directions < 1 || directions > 2) {
    throw py::value_error(ctxfast::invalid("lstm", "the number of z", std::to_string(directions), "1 or 2").message);
  }
  check_count("weight_hh", weight_hh.size(), directions);
  if (!weight_proj.empty()) check_count("weight_proj", weight_proj.size(), directions);
  check_count("z_strides", z_strides.size(), directions);
  check_count("grad_gates", grad_gates.size(), directions);
  p.batch = batch, p.steps = steps, p.hidden = hidden, p.size = size;
  p.has_proj = !weight_proj.empty();
  p.directions = static_cast<int64_t>(directions);
  p.dtype = dtype_named("lstm", dtype, true);
  for (size_t r = 0; r < directions; ++r) {
    p.weight_hh[r] = pointer<const void>(weight_hh[r]);
    if (p.has_proj) p.weight_proj[r] = pointer<const void>(weight_proj[r]);
    p.z[r] = pointer<const void>(z[r]);
    p.grad_gates[r] = pointer<void>(grad_gates[r]);
    for (int i = 0; i < 2; ++i) p.z_strides[r][i] = z_strides[r][i];
  }
  for (int i = 0; i < 2; ++i) {
    p.output_strides[i] = output_strides[i];
    p.grad_output_strides[i] = grad_output_strides[i];
  }
  p.cells = pointer<const float>(cells);
  p.c_0 = pointer<const float>(c_0);
  p.output = pointer<const void>(output);
  p.grad_output = pointer<const void>(grad_output);
  p.grad_h_n = pointer<const float>(grad_h_n);
  p.grad_c_n = pointer<const float>(grad_c_n);
  p.lengths = pointer<const int64_t>(lengths);
  p.grad_hidden = pointer<void>(grad_hidden);
  p.grad_h_0 = pointer<float>(grad_h_0);
  p.grad_c_0 = pointer<float>(grad_c_0);
  p.workspace = pointer<void>(workspace);
  p.workspace_bytes = workspace_bytes;
  p.cell_clip = cell_clip;
  p.proj_clip = proj_clip;
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = run(p, pointer<CUstream_st>(stream));
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_lstm_persistent_backward(py::module_& m) {
  using py::arg;
  m.def("lstm_persistent_backward_plan", &plan, arg("batch"), arg("hidden"), arg("size"), arg("has_proj"),
        arg("directions"));
  m.def("lstm_persistent_backward", &backward, arg("batch"), arg("steps"), arg("hidden"), arg("size"), arg("dtype"),
        arg("weight_hh"), arg("weight_proj"), arg("z"), arg("z_strides"), arg("cells"), arg("c_0"), arg("output"),
        arg("output_strides"), arg("grad_output"), arg("grad_output_strides"), arg("grad_h_n"), arg("grad_c_n"),
        arg("lengths"), arg("grad_gates"), arg("grad_hidden"), arg("grad_h_0"), arg("grad_c_0"), arg("workspace"),
        arg("workspace_bytes"), arg("cell_clip"), arg("proj_clip"), arg("stream"));
}
