// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.char_cnn_cuda_*: words to vectors by the CUDA kernels (csrc/char_cnn/cuda.h).
//
// Addresses are integers, 0 where a pointer may be null; dtype: "float32", "float16" or "bfloat16". ValueError for bad
// arguments, RuntimeError for what CUDA reports, or when this build has no CUDA kernels. The device of the tensors must
// be current.
//
//   char_cnn_cuda_forward(words, characters, size, vocabulary, dtype, is_int64, ids, table, filters, is_tanh, y, at,
//                         stream)
//       filters: one (width, filters, weight, bias) per width, 16 at most
//   char_cnn_cuda_backward(words, characters, size, vocabulary, dtype, is_int64, ids, table, filters, at, grad,
//                          grad_words, stream)
//       filters: one (width, filters, weight, grad_weight, grad_bias) per width; dtype: of table and weights, gradients
//       are float32
#include <tuple>
#include <vector>

#include "base/bindings.h"
#include "char_cnn/cuda.h"
#include "ctxfast_build_info.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using Filters = std::vector<std::tuple<int32_t, int32_t, Address, Address>>;
using BackwardFilters = std::vector<std::tuple<int32_t, int32_t, Address, Address, Address>>;

namespace {

#if CTXFAST_WITH_CUDA

ctxfast::CharCnnCudaParams params_of(int64_t words, int32_t characters, int32_t size, int32_t vocabulary,
                                     const std::string& dtype, bool is_int64, Address ids, Address table,
                                     size_t widths) {
  if (widths < 1 || widths > ctxfast::kCharCnnCudaMaxWidths) {
    throw py::value_error(ctxfast::invalid("char_cnn", "widths", std::to_string(widths), "1..16").message);
  }
  ctxfast::CharCnnCudaParams params;
  params.words = words, params.characters = characters, params.size = size, params.vocabulary = vocabulary;
  params.widths = static_cast<int32_t>(widths);
  params.dtype = dtype_named("char_cnn", dtype, true);
  params.is_int64 = is_int64;
  params.ids = pointer<const void>(ids), params.table = pointer<const void>(table);
  return params;
}

void run(ctxfast::Status (*function)(const ctxfast::CharCnnCudaParams&, CUstream_st*),
         const ctxfast::CharCnnCudaParams& params, Address stream) {
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = function(params, pointer<CUstream_st>(stream));
  }
  throw_unless_ok(status);
}

void forward(int64_t words, int32_t characters, int32_t size, int32_t vocabulary, const std::string& dtype,
             bool is_int64, Address ids, Address table, const Filters& filters, bool is_tanh, Address y, Address at,
             Address stream) {
  ctxfast::CharCnnCudaParams params =
      params_of(words, characters, size, vocabulary, dtype, is_int64, ids, table, filters.size());
  for (size_t i = 0; i < filters.size(); ++i) {
    const auto& [width, count, weight, bias] = filters[i];
    params.filters[i] = {pointer<const void>(weight), pointer<const void>(bias), width, count};
    params.columns += count;
  }
  params.is_tanh = is_tanh;
  params.y = pointer<void>(y), params.at = pointer<int32_t>(at);
  run(ctxfast::char_cnn_cuda_forward, params, stream);
}

void backward(int64_t words, int32_t characters, int32_t size, int32_t vocabulary, const std::string& dtype,
              bool is_int64, Address ids, Address table, const BackwardFilters& filters, Address at, Address grad,
              Address grad_words, Address stream) {
  ctxfast::CharCnnCudaParams params =
      params_of(words, characters, size, vocabulary, dtype, is_int64, ids, table, filters.size());
  for (size_t i = 0; i < filters.size(); ++i) {
    const auto& [width, count, weight, grad_weight, grad_bias] = filters[i];
    params.filters[i] = {pointer<const void>(weight), nullptr, width, count, pointer<float>(grad_weight),
                         pointer<float>(grad_bias)};
    params.columns += count;
  }
  params.at = pointer<int32_t>(at), params.grad = pointer<const float>(grad);
  params.grad_words = pointer<float>(grad_words);
  run(ctxfast::char_cnn_cuda_backward, params, stream);
}

#else

[[noreturn]] void no_cuda() {
  throw std::runtime_error(
      "ctxfast.char_cnn: this build has no CUDA kernels (" CTXFAST_CUDA_REASON
      "). Install the CUDA toolkit and rebuild with CTXFAST_CUDA=1 pip install --force-reinstall .");
}

void forward(int64_t, int32_t, int32_t, int32_t, const std::string&, bool, Address, Address, const Filters&, bool,
             Address, Address, Address) {
  no_cuda();
}

void backward(int64_t, int32_t, int32_t, int32_t, const std::string&, bool, Address, Address, const BackwardFilters&,
              Address, Address, Address, Address) {
  no_cuda();
}

#endif

}  // namespace

void bind_char_cnn_cuda(py::module_& m) {
  using py::arg;
  m.def("char_cnn_cuda_forward", &forward, arg("words"), arg("characters"), arg("size"), arg("vocabulary"),
        arg("dtype"), arg("is_int64"), arg("ids"), arg("table"), arg("filters"), arg("is_tanh"), arg("y"), arg("at"),
        arg("stream"));
  m.def("char_cnn_cuda_backward", &backward, arg("words"), arg("characters"), arg("size"), arg("vocabulary"),
        arg("dtype"), arg("is_int64"), arg("ids"), arg("table"), arg("filters"), arg("at"), arg("grad"),
        arg("grad_words"), arg("stream"));
}
