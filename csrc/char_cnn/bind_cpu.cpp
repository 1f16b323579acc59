// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.char_cnn_*: words to vectors on the CPU (csrc/char_cnn/char_cnn.h).
//
// Addresses are integers, 0 where a pointer may be null; strides in elements. ValueError for bad arguments,
// RuntimeError when threads are not to be had. is_half: table, biases and y are bfloat16, else float32.
//
//   char_cnn_forward(words, characters, size, vocabulary, is_half, is_int64, ids, table, stride_table, filters,
//   is_tanh,
//                    y, at, threads, isa="auto")
//       filters: one (width, filters, packed, bias) per width
//   char_cnn_backward(words, characters, size, vocabulary, is_half, is_int64, ids, table, stride_table, filters, at,
//                     grad, grad_words, threads, isa="auto")
//       filters: one (width, filters, rows, grad_rows, grad_bias) per width
#include <tuple>
#include <vector>

#include "base/bindings.h"
#include "char_cnn/char_cnn.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using Filters = std::vector<ctxfast::CharCnnFilters>;

namespace {

ctxfast::CharCnnParams params_of(int64_t words, int64_t characters, int64_t size, int64_t vocabulary, bool is_half,
                                 bool is_int64, Address ids, Address table, int64_t stride_table,
                                 const Filters& filters, int64_t threads, const std::string& isa) {
  ctxfast::CharCnnParams params;
  params.words = words, params.characters = characters, params.size = size, params.vocabulary = vocabulary;
  params.type = is_half ? ctxfast::DType::kBFloat16 : ctxfast::DType::kFloat32;
  params.is_int64 = is_int64;
  params.ids = pointer<const void>(ids);
  params.table = pointer<const void>(table), params.stride_table = stride_table;
  params.widths = static_cast<int64_t>(filters.size()), params.filters = filters.data();
  params.threads = threads;
  params.isa = isa_named("char_cnn", isa);
  return params;
}

void run(ctxfast::Status (*function)(const ctxfast::CharCnnParams&), const ctxfast::CharCnnParams& params) {
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = function(params);
  }
  throw_unless_ok(status);
}

void forward(int64_t words, int64_t characters, int64_t size, int64_t vocabulary, bool is_half, bool is_int64,
             Address ids, Address table, int64_t stride_table,
             const std::vector<std::tuple<int64_t, int64_t, Address, Address>>& given, bool is_tanh, Address y,
             Address at, int64_t threads, const std::string& isa) {
  Filters filters;
  for (const auto& [width, count, packed, bias] : given) {
    ctxfast::CharCnnFilters& one = filters.emplace_back();
    one.width = width, one.filters = count;
    one.packed = pointer<const float>(packed), one.bias = pointer<const void>(bias);
  }
  ctxfast::CharCnnParams params = params_of(words, characters, size, vocabulary, is_half, is_int64, ids, table,
                                            stride_table, filters, threads, isa);
  params.is_tanh = is_tanh;
  params.y = pointer<void>(y), params.at = pointer<int32_t>(at);
  run(ctxfast::char_cnn_forward, params);
}

void backward(int64_t words, int64_t characters, int64_t size, int64_t vocabulary, bool is_half, bool is_int64,
              Address ids, Address table, int64_t stride_table,
              const std::vector<std::tuple<int64_t, int64_t, Address, Address, Address>>& given, Address at,
              Address grad, Address grad_words, int64_t threads, const std::string& isa) {
  Filters filters;
  for (const auto& [width, count, rows, grad_rows, grad_bias] : given) {
    ctxfast::CharCnnFilters& one = filters.emplace_back();
    one.width = width, one.filters = count;
    one.rows = pointer<const float>(rows);
    one.grad_rows = pointer<float>(grad_rows), one.grad_bias = pointer<float>(grad_bias);
  }
  ctxfast::CharCnnParams params = params_of(words, characters, size, vocabulary, is_half, is_int64, ids, table,
                                            stride_table, filters, threads, isa);
  params.at = pointer<int32_t>(at), params.grad = pointer<const float>(grad);
  params.grad_words = pointer<float>(grad_words);
  run(ctxfast::char_cnn_backward, params);
}

}  // namespace

void bind_char_cnn(py::module_& m) {
  using py::arg;
  m.def("char_cnn_forward", &forward, arg("words"), arg("characters"), arg("size"), arg("vocabulary"), arg("is_half"),
        arg("is_int64"), arg("ids"), arg("table"), arg("stride_table"), arg("filters"), arg("is_tanh"), arg("y"),
        arg("at"), arg("threads") = 1, arg("isa") = "auto");
  m.def("char_cnn_backward", &backward, arg("words"), arg("characters"), arg("size"), arg("vocabulary"), arg("is_half"),
        arg("is_int64"), arg("ids"), arg("table"), arg("stride_table"), arg("filters"), arg("at"), arg("grad"),
        arg("grad_words"), arg("threads") = 1, arg("isa") = "auto");
}
