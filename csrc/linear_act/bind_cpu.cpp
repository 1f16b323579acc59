// SPDX-License-Identifier: Apache-2.0
#include "base/bind.h"
#include "linear_act/linear_act.h"

namespace ctxfast {

static void set(PyObject* from, Activation& to) { bind::set_named(from, kActivationNames, to); }

namespace {

using bind::field, bind::option;
using P = LinearActParams;

const bind::Op op([](pybind11::module_& m) {
  bind::def(
      m, "linear_act_forward", &linear_act_forward,
      {field<&P::rows>("rows"), field<&P::in>("in"), field<&P::out>("out"), field<&P::weight_dtype>("weight_dtype"),
       field<&P::io_dtype>("io_dtype"), field<&P::activation>("activation"), field<&P::is_gated>("is_gated"),
       field<&P::x>("x"), field<&P::stride_x>("stride_x"), field<&P::packed>("packed"), field<&P::scales>("scales"),
       field<&P::sums>("sums"), field<&P::bias>("bias"), field<&P::y>("y"), option<&P::threads>("threads"),
       option<&P::isa>("isa")});
});

}  // namespace
}  // namespace ctxfast
