// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.scalar_mix_*: the CUDA kernels (csrc/scalar_mix/scalar_mix.h).
//
// Addresses are integers; dtype: "float32", "float16" or "bfloat16". ValueError for bad arguments, RuntimeError for
// what CUDA reports, or when this build has no CUDA kernels. The device of the tensors must be current.
//
//   scalar_mix_workspace_bytes(num_inputs, numel) -> int       of the backward pass with grad_weights
//   scalar_mix_forward(inputs, weights, output, numel, dtype, stream)
//       inputs: K addresses of numel elements; weights (K,) float32: gamma * softmax
//   scalar_mix_backward(grad_output, inputs, weights, grad_inputs, grad_weights, workspace, workspace_bytes, numel,
//                       dtype, stream)
//       grad_inputs: K addresses, 0 where not wanted, or []; grad_weights (K,) float32, or 0
#include <vector>

#include "base/bindings.h"
#include "ctxfast_build_info.h"
#include "scalar_mix/scalar_mix.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

#if CTXFAST_WITH_CUDA

void check_count(const char* name, size_t count, size_t low, size_t high) {
  if (count >= low && count <= high) return;
  throw py::value_error(ctxfast::invalid("scalar_mix", std::string("the number of ") + name, std::to_string(count),
                                         std::to_string(low) + ".." + std::to_string(high))
                            .message);
}

void forward(const std::vector<Address>& inputs, Address weights, Address output, int64_t numel,
             const std::string& dtype, Address stream) {
  check_count("inputs", inputs.size(), 1, ctxfast::kScalarMixMaxInputs);
  ctxfast::ScalarMixForwardParams params;
  params.num_inputs = static_cast<int64_t>(inputs.size());
  params.numel = numel;
  params.dtype = dtype_named("scalar_mix", dtype, true);
  for (size_t k = 0; k < inputs.size(); ++k) params.inputs[k] = pointer<const void>(inputs[k]);
  params.weights = pointer<const float>(weights);
  params.output = pointer<void>(output);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::scalar_mix_forward(params, pointer<CUstream_st>(stream));
  }
  throw_unless_ok(status);
}

void backward(Address grad_output, const std::vector<Address>& inputs, Address weights,
              const std::vector<Address>& grad_inputs, Address grad_weights, Address workspace, int64_t workspace_bytes,
              int64_t numel, const std::string& dtype, Address stream) {
  check_count("inputs", inputs.size(), 1, ctxfast::kScalarMixMaxInputs);
  if (!grad_inputs.empty()) check_count("grad_inputs", grad_inputs.size(), inputs.size(), inputs.size());
  ctxfast::ScalarMixBackwardParams params;
  params.num_inputs = static_cast<int64_t>(inputs.size());
  params.numel = numel;
  params.dtype = dtype_named("scalar_mix", dtype, true);
  params.grad_output = pointer<const void>(grad_output);
  for (size_t k = 0; k < inputs.size(); ++k) params.inputs[k] = pointer<const void>(inputs[k]);
  for (size_t k = 0; k < grad_inputs.size(); ++k) params.grad_inputs[k] = pointer<void>(grad_inputs[k]);
  params.weights = pointer<const float>(weights);
  params.grad_weights = pointer<float>(grad_weights);
  params.workspace = pointer<float>(workspace);
  params.workspace_bytes = workspace_bytes;
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::scalar_mix_backward(params, pointer<CUstream_st>(stream));
  }
  throw_unless_ok(status);
}

int64_t workspace_bytes(int64_t num_inputs, int64_t numel) {
  return ctxfast::scalar_mix_workspace_bytes(num_inputs, numel);
}

#else

[[noreturn]] void no_cuda() {
  throw std::runtime_error(
      "ctxfast.scalar_mix: this build has no CUDA kernels (" CTXFAST_CUDA_REASON
      "). Install the CUDA toolkit and rebuild with CTXFAST_CUDA=1 pip install --force-reinstall .");
}

void forward(const std::vector<Address>&, Address, Address, int64_t, const std::string&, Address) { no_cuda(); }

void backward(Address, const std::vector<Address>&, Address, const std::vector<Address>&, Address, Address, int64_t,
              int64_t, const std::string&, Address) {
  no_cuda();
}

int64_t workspace_bytes(int64_t, int64_t) { no_cuda(); }

#endif

}  // namespace

void bind_scalar_mix(py::module_& m) {
  using py::arg;
  m.def("scalar_mix_workspace_bytes", &workspace_bytes, arg("num_inputs"), arg("numel"));
  m.def("scalar_mix_forward", &forward, arg("inputs"), arg("weights"), arg("output"), arg("numel"), arg("dtype"),
        arg("stream"));
  m.def("scalar_mix_backward", &backward, arg("grad_output"), arg("inputs"), arg("weights"), arg("grad_inputs"),
        arg("grad_weights"), arg("workspace"), arg("workspace_bytes"), arg("numel"), arg("dtype"), arg("stream"));
}
