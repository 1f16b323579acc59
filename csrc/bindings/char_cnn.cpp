// SPDX-License-Identifier: Apache-2.0
#include "ctxfast/char_cnn.h"

#include "bind.h"

namespace ctxfast {
namespace {

using bind::field, bind::option;
using P = CharCnnParams;

const bind::Op op([](pybind11::module_& m) {
  const bind::Fields<P> shared = {field<&P::words>("words"),
                                  field<&P::characters>("characters"),
                                  field<&P::size>("size"),
                                  field<&P::vocabulary>("vocabulary"),
                                  field<&P::io_dtype>("io_dtype"),
                                  field<&P::is_int64>("is_int64"),
                                  field<&P::ids>("ids"),
                                  field<&P::table>("table"),
                                  field<&P::stride_table>("stride_table"),
                                  field<&P::widths>("widths"),
                                  field<&P::filters>("filters"),
                                  field<&P::at>("at")};
  const bind::Fields<P> options = {option<&P::threads>("threads"), option<&P::isa>("isa")};
  bind::def(m, "char_cnn_forward", &char_cnn_forward,
            bind::join<P>({shared, {field<&P::is_tanh>("is_tanh"), field<&P::y>("y")}, options}));
  bind::def(m, "char_cnn_backward", &char_cnn_backward,
            bind::join<P>({shared, {field<&P::grad>("grad"), field<&P::grad_words>("grad_words")}, options}));
});

}  // namespace
}  // namespace ctxfast
