// SPDX-License-Identifier: Apache-2.0
// The Python module ctxfast._C. Everything crosses as integers (addresses, sizes, strides, streams), floats and
// strings.
//
//   build_info() -> dict    version, compiler, cuda, cuda_version, cuda_archs, cuda_reason, cpu_isas: facts of this
//                           build
//   cpu_isas() -> list      the instruction sets compiled that this machine runs, the best one last
//   cpu_isa() -> str        the last of them
//   same_samples(memory, stride, size, count, kept) -> bool    see samples.h; addresses, bytes
//
// Ops: see attention.cpp, char_cnn.cpp, char_cnn_cuda.cpp, layer_norm.cpp, linear_act.cpp, lstm.cpp,
// lstm_persistent_backward.cpp, scalar_mix.cpp and transformer_layer.cpp beside this file.
#include "bindings.h"
#include "ctxfast/cpu_isa.h"
#include "ctxfast/samples.h"
#include "ctxfast_build_info.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list isas, archs;
  for (const ctxfast::Isa isa : ctxfast::compiled_isas()) isas.append(ctxfast::isa_name(isa));
  std::string rest = CTXFAST_CUDA_ARCHS;
  while (!rest.empty()) {
    const size_t end = rest.find(';');
    archs.append(rest.substr(0, end));
    rest = end == std::string::npos ? "" : rest.substr(end + 1);
  }
  py::dict info;
  info["version"] = CTXFAST_VERSION;
  info["compiler"] = CTXFAST_COMPILER;
  info["cuda"] = static_cast<bool>(CTXFAST_WITH_CUDA);
  info["cuda_version"] = CTXFAST_CUDA_VERSION;
  info["cuda_archs"] = archs;
  info["cuda_reason"] = CTXFAST_CUDA_REASON;
  info["cpu_isas"] = isas;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of ctxfast. Private: use the functions of ctxfast.functional.";
  m.def("build_info", &build_info);
  m.def("cpu_isa", [] { return ctxfast::isa_name(ctxfast::best_isa()); });
  m.def("cpu_isas", [] {
    std::vector<std::string> names;
    for (const ctxfast::Isa isa : ctxfast::runnable_isas()) names.emplace_back(ctxfast::isa_name(isa));
    return names;
  });
  m.def("same_samples", [](std::uintptr_t memory, int64_t stride, int64_t size, int64_t count, std::uintptr_t kept) {
    return ctxfast::same_samples(pointer<const void>(memory), stride, size, count, pointer<const void>(kept));
  });
  bind_attention(m);
  bind_char_cnn(m);
  bind_char_cnn_cuda(m);
  bind_layer_norm(m);
  bind_linear_act(m);
  bind_lstm(m);
  bind_lstm_persistent(m);
  bind_lstm_step(m);
  bind_lstm_persistent_backward(m);
  bind_scalar_mix(m);
  bind_transformer_layer(m);
}
