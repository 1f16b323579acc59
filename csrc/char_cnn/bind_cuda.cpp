// SPDX-License-Identifier: Apache-2.0
#include "base/bind.h"
#include "char_cnn/cuda.h"

namespace ctxfast {

static void set(PyObject* from, CharCnnCudaFilters& to) {
  bind::set_all(from, to.width, to.filters, to.weight, to.bias, to.grad_weight, to.grad_bias);
}

namespace {

using bind::field;
using P = CharCnnCudaParams;

const bind::Op op([](pybind11::module_& m) {
  const bind::Fields<P> shared = {field<&P::words>("words"),     field<&P::characters>("characters"),
                                  field<&P::size>("size"),       field<&P::vocabulary>("vocabulary"),
                                  field<&P::dtype>("dtype"),     field<&P::is_int64>("is_int64"),
                                  field<&P::ids>("ids"),         field<&P::table>("table"),
                                  field<&P::widths>("widths"),   field<&P::columns>("columns"),
                                  field<&P::filters>("filters"), field<&P::at>("at")};
  bind::def(m, "char_cnn_cuda_forward", &char_cnn_cuda_forward,
            bind::join<P>({shared, {field<&P::is_tanh>("is_tanh"), field<&P::y>("y")}}));
  bind::def(m, "char_cnn_cuda_backward", &char_cnn_cuda_backward,
            bind::join<P>({shared, {field<&P::grad>("grad"), field<&P::grad_words>("grad_words")}}));
});

}  // namespace
}  // namespace ctxfast
