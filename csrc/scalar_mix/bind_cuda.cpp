// SPDX-License-Identifier: Apache-2.0
#include "base/bind.h"
#include "scalar_mix/scalar_mix.h"

namespace ctxfast {
namespace {

using bind::field;
using F = ScalarMixForwardParams;
using B = ScalarMixBackwardParams;

const bind::Op op([](pybind11::module_& m) {
  m.def("scalar_mix_workspace_bytes", &scalar_mix_workspace_bytes);
  bind::def(m, "scalar_mix_forward", &scalar_mix_forward,
            {field<&F::num_inputs>("num_inputs"), field<&F::numel>("numel"), field<&F::dtype>("dtype"),
             field<&F::inputs>("inputs"), field<&F::weights>("weights"), field<&F::output>("output")});
  bind::def(m, "scalar_mix_backward", &scalar_mix_backward,
            {field<&B::num_inputs>("num_inputs"), field<&B::numel>("numel"), field<&B::dtype>("dtype"),
             field<&B::grad_output>("grad_output"), field<&B::inputs>("inputs"), field<&B::weights>("weights"),
             field<&B::grad_inputs>("grad_inputs"), field<&B::grad_weights>("grad_weights"),
             field<&B::workspace>("workspace"), field<&B::workspace_bytes>("workspace_bytes")});
});

}  // namespace
}  // namespace ctxfast
