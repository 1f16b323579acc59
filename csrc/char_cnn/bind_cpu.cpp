// SPDX-License-Identifier: Apache-2.0
#include "base/bind.h"
#include "char_cnn/char_cnn.h"

namespace ctxfast {
namespace {

using bind::field, bind::option;
using P = CharCnnParams;
using F = CharCnnFilters;

// A sequence of these members of the filters of each width, kept until the thread's next call.
template <auto... kMembers>
void set_filters(bind::Arguments<P>& to, PyObject* from) {
  thread_local std::vector<F> filters;
  const pybind11::object list = bind::entries(from);
  filters.assign(PySequence_Fast_GET_SIZE(list.ptr()), F());
  PyObject** item = PySequence_Fast_ITEMS(list.ptr());
  for (F& one : filters) bind::set_all(*item++, one.*kMembers...);
  to.widths = static_cast<int64_t>(filters.size()), to.filters = filters.data();
}

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
                                  field<&P::at>("at")};
  const bind::Fields<P> options = {option<&P::threads>("threads"), option<&P::isa>("isa")};
  bind::def(m, "char_cnn_forward", &char_cnn_forward,
            bind::join<P>({shared,
                           {{"filters", &set_filters<&F::width, &F::filters, &F::packed, &F::bias>},
                            field<&P::is_tanh>("is_tanh"),
                            field<&P::y>("y")},
                           options}));
  bind::def(m, "char_cnn_backward", &char_cnn_backward,
            bind::join<P>({shared,
                           {{"filters", &set_filters<&F::width, &F::filters, &F::rows, &F::grad_rows, &F::grad_bias>},
                            field<&P::grad>("grad"),
                            field<&P::grad_words>("grad_words")},
                           options}));
});

}  // namespace
}  // namespace ctxfast
