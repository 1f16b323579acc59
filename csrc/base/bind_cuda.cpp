// SPDX-License-Identifier: Apache-2.0
//   cuda_versions() -> (driver, runtime): see cuda.h
#include <utility>

#include "base/bind.h"
#include "base/cuda.h"

namespace ctxfast {
namespace {

const bind::Op op([](pybind11::module_& m) {
  m.def("cuda_versions", [] {
    int driver = 0, runtime = 0;
    bind::throw_unless_ok(cuda_versions(&driver, &runtime));
    return std::make_pair(driver, runtime);
  });
});

}  // namespace
}  // namespace ctxfast
