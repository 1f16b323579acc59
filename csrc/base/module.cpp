// SPDX-License-Identifier: Apache-2.0
// The Python module ctxfast._C. Everything crosses as integers (addresses, sizes, strides, streams), floats and
// strings.
//
//   build_info() -> dict    version, compiler, cuda, cuda_version, cuda_archs, cuda_reason, cpu_isas: facts of this
//                           build
//   cpu_isas() -> list      the instruction sets compiled that this machine runs, the best one last
//   cpu_isa() -> str        the last of them
//   same_samples(samples, count, threads) -> bool    whether all hold what they held; address of rows of eight words,
//                                                    see samples.h. Keeps the GIL, so that nobody frees what it reads
//   extremes(integers, count, is_int64) -> (least, most)    of one or more int64 or int32; address
//
// Ops: what their bind_*.cpp say.
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "base/bind.h"
#include "base/isa.h"
#include "base/samples.h"
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

template <class Integer>
std::pair<int64_t, int64_t> extremes(const Integer* integers, int64_t count) {
  Integer least = integers[0], most = integers[0];
  for (int64_t i = 1; i < count; ++i) least = std::min(least, integers[i]), most = std::max(most, integers[i]);
  return {least, most};
}

[[noreturn]] void lacks(const std::string& name) {
  throw py::attribute_error("ctxfast._C has no " + name + ": " +
                            (CTXFAST_WITH_CUDA ? "CUDA kernels were compiled for " CTXFAST_CUDA_ARCHS "."
                                               : "CUDA kernels were not compiled (" CTXFAST_CUDA_REASON ")."));
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
  m.def("same_samples", [](std::uintptr_t samples, int64_t count, int64_t threads) {
    return ctxfast::same_samples(reinterpret_cast<const ctxfast::Samples*>(samples), count, threads);
  });
  m.def("extremes", [](std::uintptr_t integers, int64_t count, bool is_int64) {
    return is_int64 ? extremes(reinterpret_cast<const int64_t*>(integers), count)
                    : extremes(reinterpret_cast<const int32_t*>(integers), count);
  });
  m.def("__getattr__", &lacks);  // asked for what is not there
  for (const auto define : ctxfast::bind::Op::all()) define(m);
}
