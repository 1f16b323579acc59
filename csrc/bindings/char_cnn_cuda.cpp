// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.char_cnn_cuda_forward: words to vectors by the CUDA kernels (csrc/include/ctxfast/char_cnn_cuda.h).
//
// Addresses are integers, 0 where a pointer may be null; dtype: "float32", "float16" or "bfloat16". ValueError for bad
// arguments, RuntimeError for what CUDA reports, or when this build has no CUDA kernels. The device of the tensors must
// be current.
//
//   char_cnn_cuda_forward(words, characters, size, vocabulary, dtype, is_int64, ids, table, filters, is_tanh, y, at,
//                         stream)
//       filters: one (width, filters, weight, bias) per width, 16 at most
#include "ctxfast/char_cnn_cuda.h"

#include <tuple>
#include <vector>

#include "bindings.h"
#include "ctxfast_build_info.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using Filters = std::vector<std::tuple<int32_t, int32_t, Address, Address>>;

namespace {

#if CTXFAST_WITH_CUDA

void forward(int64_t words, int32_t characters, int32_t size, int32_t vocabulary, const std::string& dtype,
             bool is_int64, Address ids, Address table, const Filters& filters, bool is_tanh, Address y, Address at,
             Address stream) {
  ctxfast::CharCnnCudaParams params;
  params.words = words, params.characters = characters, params.size = size, params.vocabulary = vocabulary;
  params.widths = static_cast<int32_t>(filters.size());
  for (size_t i = 0; i < filters.size() && i < ctxfast::kCharCnnCudaMaxWidths; ++i) {
    const auto& [width, count, weight, bias] = filters[i];
    params.filters[i] = {pointer<const void>(weight), pointer<const void>(bias), width, count};
    params.columns += count;
  }
  params.dtype = dtype_named("char_cnn", dtype, true);
  params.is_int64 = is_int64, params.is_tanh = is_tanh;
  params.ids = pointer<const void>(ids), params.table = pointer<const void>(table);
  params.y = pointer<void>(y), params.at = pointer<int32_t>(at);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::char_cnn_cuda_forward(params, pointer<CUstream_st>(stream));
  }
  throw_unless_ok(status);
}

#else

void forward(int64_t, int32_t, int32_t, int32_t, const std::string&, bool, Address, Address, const Filters&, bool,
             Address, Address, Address) {
  throw std::runtime_error(
      "ctxfast.char_cnn: this build has no CUDA kernels (" CTXFAST_CUDA_REASON
      "). Install the CUDA toolkit and rebuild with CTXFAST_CUDA=1 pip install --force-reinstall .");
}

#endif

}  // namespace

void bind_char_cnn_cuda(py::module_& m) {
  using py::arg;
  m.def("char_cnn_cuda_forward", &forward, arg("words"), arg("characters"), arg("size"), arg("vocabulary"),
        arg("dtype"), arg("is_int64"), arg("ids"), arg("table"), arg("filters"), arg("is_tanh"), arg("y"), arg("at"),
        arg("stream"));
}
