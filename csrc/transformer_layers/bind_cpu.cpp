// SPDX-License-Identifier: Apache-2.0
#include "base/bind.h"
#include "transformer_layers/transformer_layers.h"

namespace ctxfast {

static void set(PyObject* from, Activation& to) { bind::set_named(from, kActivationNames, to); }

namespace {

using bind::field, bind::option;
using P = TransformerLayersParams;

const bind::Op op([](pybind11::module_& m) {
  bind::def(m, "transformer_layers_forward", &transformer_layers_forward,
            {field<&P::tokens>("tokens"),
             field<&P::hidden>("hidden"),
             field<&P::heads>("heads"),
             field<&P::intermediate>("intermediate"),
             field<&P::sequences>("sequences"),
             field<&P::io_dtype>("io_dtype"),
             field<&P::weight_dtype>("weight_dtype"),
             field<&P::activation>("activation"),
             field<&P::eps>("eps"),
             field<&P::x>("x"),
             field<&P::cu_seqlens>("cu_seqlens"),
             field<&P::is_int64>("is_int64"),
             field<&P::layers>("layers"),
             field<&P::count>("count"),
             field<&P::all_layers>("all_layers"),
             field<&P::y>("y"),
             option<&P::threads>("threads"),
             option<&P::isa>("isa"),
             option<&P::relative_bias>("relative_bias"),
             option<&P::reach>("reach")});
});

}  // namespace
}  // namespace ctxfast
