// SPDX-License-Identifier: Apache-2.0
#include "base/bind.h"
#include "layer_norm/layer_norm.h"

namespace ctxfast {

static void set(PyObject* from, LayerNormSource& to) {
  bind::set_all(from, to.rows, to.stride, to.ids, to.count, to.is_int64);
}

namespace {

using bind::field, bind::option;
using P = LayerNormParams;

const bind::Op op([](pybind11::module_& m) {
  bind::def(m, "layer_norm_forward", &layer_norm_forward,
            {field<&P::rows>("rows"), field<&P::size>("size"), field<&P::io_dtype>("io_dtype"),
             field<&P::sources>("sources"), field<&P::source>("source"), field<&P::shift>("shift"),
             field<&P::weight>("weight"), field<&P::bias>("bias"), field<&P::is_rms>("is_rms"), field<&P::eps>("eps"),
             field<&P::sum>("sum"), field<&P::y>("y"), option<&P::threads>("threads"), option<&P::isa>("isa")});
});

}  // namespace
}  // namespace ctxfast
