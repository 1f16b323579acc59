// SPDX-License-Identifier: Apache-2.0
// ctxfast._C.lstm_*: the CPU input product and recurrence (csrc/lstm/lstm.h).
//
// Addresses are integers, 0 where a pointer may be null; strides are in elements. ValueError for bad arguments,
// RuntimeError when memory or threads are not to be had. dtype, of the products' factors: "float32", "bfloat16",
// "int8". isa: "auto" or one of cpu_isas().
//
//   lstm_packed_bytes(hidden, proj_size, has_proj, dtype="float32") -> int
//   lstm_pack(hidden, proj_size, weight_hh, weight_proj, packed, dtype="float32", weight_hh_strides=None,
//             weight_proj_strides=None, threads=1)
//       weight_hh (4H, P), weight_proj (P, H) or 0; strides (row, column), None: contiguous.
//   lstm_input_packed_bytes(hidden, input, dtype="float32") -> int
//   lstm_pack_input(hidden, input, weight_ih, packed, dtype="float32", weight_ih_strides=None, threads=1)
//       weight_ih (4H, I); strides (row, column), None: contiguous.
//   lstm_forward(batch, steps, hidden, proj_size, has_proj, gates, gates_strides, packed, dtype, lengths, h_0, c_0,
//                output, output_strides, h_n, c_n, cells=0, z=0, cell_clip=0.0, proj_clip=0.0, threads=1,
//                isa="auto", input=-1, packed_input=[], bias=[])
//       gates, packed: one address per direction (1 or 2); gates_strides: one (batch, time) per direction;
//       lengths (B,) int64 or 0. With input 0 or more, gates holds x (B, T, input) instead, packed_input and bias
//       (addresses or 0) what turns it into gates.
//   lstm_backward_packed_bytes(hidden, proj_size, has_proj) -> int
//   lstm_pack_backward(hidden, proj_size, weight_hh, weight_proj, packed, weight_hh_strides=None,
//                      weight_proj_strides=None, threads=1)
//   lstm_backward(...)    one direction, float32; arguments as in LstmBackwardParams
#include <optional>
#include <utility>
#include <vector>

#include "base/bindings.h"
#include "lstm/lstm.h"

namespace py = pybind11;
using ctxfast::LstmPackParams;
using ctxfast::LstmParams;
using ctxfast::LstmShape;
using Address = std::uintptr_t;
using Strides = std::pair<int64_t, int64_t>;

namespace {

ctxfast::DType factors(const std::string& name) {
  if (name == "float32") return ctxfast::DType::kFloat32;
  if (name == "bfloat16") return ctxfast::DType::kBFloat16;
  if (name == "int8") return ctxfast::DType::kInt8;
  throw py::value_error(ctxfast::invalid("lstm", "dtype", "'" + name + "'", "'float32', 'bfloat16' or 'int8'").message);
}

LstmShape shape_of(int64_t hidden, int64_t proj_size, bool has_proj, const std::string& dtype) {
  return {hidden, proj_size, has_proj, factors(dtype)};
}

int64_t packed_bytes(int64_t hidden, int64_t proj_size, bool has_proj, const std::string& dtype) {
  return ctxfast::lstm_packed_bytes(shape_of(hidden, proj_size, has_proj, dtype));
}

void pack_with(ctxfast::Status (*call)(const LstmPackParams&), const LstmShape& shape, Address weight_hh,
               Address weight_proj, Address packed, std::optional<Strides> hh_strides,
               std::optional<Strides> proj_strides, int64_t threads) {
  LstmPackParams params;
  params.shape = shape;
  params.weight_hh = pointer<const float>(weight_hh);
  params.weight_proj = pointer<const float>(weight_proj);
  const Strides hh = hh_strides.value_or(Strides(shape.proj_size, 1));
  const Strides proj = proj_strides.value_or(Strides(shape.hidden, 1));
  params.weight_hh_strides[0] = hh.first, params.weight_hh_strides[1] = hh.second;
  params.weight_proj_strides[0] = proj.first, params.weight_proj_strides[1] = proj.second;
  params.packed = pointer<void>(packed);
  params.threads = threads;
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = call(params);
  }
  throw_unless_ok(status);
}

// An empty tensor's address is 0 too.
bool projects(int64_t hidden, int64_t proj_size, Address weight_proj) {
  return weight_proj != 0 || proj_size != hidden;
}

void pack(int64_t hidden, int64_t proj_size, Address weight_hh, Address weight_proj, Address packed,
          const std::string& dtype, std::optional<Strides> hh_strides, std::optional<Strides> proj_strides,
          int64_t threads) {
  const LstmShape shape = shape_of(hidden, proj_size, projects(hidden, proj_size, weight_proj), dtype);
  pack_with(&ctxfast::lstm_pack, shape, weight_hh, weight_proj, packed, hh_strides, proj_strides, threads);
}

int64_t backward_packed_bytes(int64_t hidden, int64_t proj_size, bool has_proj) {
  return ctxfast::lstm_backward_packed_bytes({hidden, proj_size, has_proj, ctxfast::DType::kFloat32});
}

void pack_backward(int64_t hidden, int64_t proj_size, Address weight_hh, Address weight_proj, Address packed,
                   std::optional<Strides> hh_strides, std::optional<Strides> proj_strides, int64_t threads) {
  const LstmShape shape = shape_of(hidden, proj_size, projects(hidden, proj_size, weight_proj), "float32");
  pack_with(&ctxfast::lstm_pack_backward, shape, weight_hh, weight_proj, packed, hh_strides, proj_strides, threads);
}

int64_t input_packed_bytes(int64_t hidden, int64_t input, const std::string& dtype) {
  return ctxfast::lstm_input_packed_bytes({hidden, input, factors(dtype)});
}

void pack_input(int64_t hidden, int64_t input, Address weight_ih, Address packed, const std::string& dtype,
                std::optional<Strides> strides, int64_t threads) {
  ctxfast::LstmPackInputParams params;
  params.threads = threads;
  params.shape = {hidden, input, factors(dtype)};
  params.weight_ih = pointer<const float>(weight_ih);
  const Strides ih = strides.value_or(Strides(input, 1));
  params.weight_ih_strides[0] = ih.first, params.weight_ih_strides[1] = ih.second;
  params.packed = pointer<void>(packed);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::lstm_pack_input(params);
  }
  throw_unless_ok(status);
}

// Gradients of one direction. Shapes and meanings: LstmBackwardParams.
void backward(int64_t batch, int64_t steps, int64_t hidden, int64_t proj_size, bool has_proj, bool reverse,
              Address packed, Address lengths, Address z, Address cells, Address c_0, Address output,
              Strides output_strides, Address grad_output, Strides grad_output_strides, Address grad_h_n,
              Address grad_c_n, Address grad_z, Address grad_hidden, Address m, Address grad_h_0, Address grad_c_0,
              float cell_clip, float proj_clip, int64_t threads, const std::string& isa) {
  ctxfast::LstmBackwardParams params;
  params.shape = {hidden, proj_size, has_proj, ctxfast::DType::kFloat32};
  params.batch = batch, params.steps = steps, params.reverse = reverse;
  params.cell_clip = cell_clip, params.proj_clip = proj_clip;
  params.packed = pointer<const void>(packed);
  params.lengths = pointer<const int64_t>(lengths);
  params.z = pointer<const float>(z);
  params.grad_z = pointer<float>(grad_z);
  params.cells = pointer<const float>(cells);
  params.c_0 = pointer<const float>(c_0);
  params.output = pointer<const float>(output);
  params.output_strides[0] = output_strides.first, params.output_strides[1] = output_strides.second;
  params.grad_output = pointer<const float>(grad_output);
  params.grad_output_strides[0] = grad_output_strides.first;
  params.grad_output_strides[1] = grad_output_strides.second;
  params.grad_h_n = pointer<const float>(grad_h_n);
  params.grad_c_n = pointer<const float>(grad_c_n);
  params.grad_hidden = pointer<float>(grad_hidden);
  params.m = pointer<float>(m);
  params.grad_h_0 = pointer<float>(grad_h_0);
  params.grad_c_0 = pointer<float>(grad_c_0);
  params.threads = threads;
  params.isa = isa_named("lstm", isa);
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::lstm_backward(params);
  }
  throw_unless_ok(status);
}

void forward(int64_t batch, int64_t steps, int64_t hidden, int64_t proj_size, bool has_proj,
             const std::vector<Address>& gates, const std::vector<Strides>& gates_strides,
             const std::vector<Address>& packed, const std::string& dtype, Address lengths, Address h_0, Address c_0,
             Address output, Strides output_strides, Address h_n, Address c_n, Address cells, Address z,
             float cell_clip, float proj_clip, int64_t threads, const std::string& isa, int64_t input,
             const std::vector<Address>& packed_input, const std::vector<Address>& bias) {
  LstmParams params;
  params.shape = shape_of(hidden, proj_size, has_proj, dtype);
  const size_t directions = gates.size();
  if (directions < 1 || directions > ctxfast::kLstmMaxDirections || gates_strides.size() != directions ||
      packed.size() != directions) {
    throw py::value_error("ctxfast.lstm: gates, gates_strides, packed have " + std::to_string(directions) + ", " +
                          std::to_string(gates_strides.size()) + ", " + std::to_string(packed.size()) +
                          " entries; expected one per direction, 1 or 2.");
  }
  const bool from_x = input >= 0;
  if (from_x && (packed_input.size() != directions || bias.size() != directions)) {
    throw py::value_error("ctxfast.lstm: packed_input, bias have " + std::to_string(packed_input.size()) + ", " +
                          std::to_string(bias.size()) + " entries; expected one per direction, as in gates.");
  }
  params.from_x = from_x;
  params.input = from_x ? input : 0;
  params.isa = isa_named("lstm", isa);
  params.batch = batch;
  params.steps = steps;
  params.directions = static_cast<int64_t>(directions);
  for (size_t r = 0; r < directions; ++r) {
    (from_x ? params.x : params.gates)[r] = pointer<const float>(gates[r]);
    int64_t (&strides)[2] = (from_x ? params.x_strides : params.gates_strides)[r];
    strides[0] = gates_strides[r].first, strides[1] = gates_strides[r].second;
    if (from_x) {
      params.packed_input[r] = pointer<const void>(packed_input[r]);
      params.bias[r] = pointer<const float>(bias[r]);
    }
    params.packed[r] = pointer<const void>(packed[r]);
  }
  params.lengths = pointer<const int64_t>(lengths);
  params.h_0 = pointer<const float>(h_0);
  params.c_0 = pointer<const float>(c_0);
  params.output = pointer<float>(output);
  params.output_strides[0] = output_strides.first;
  params.output_strides[1] = output_strides.second;
  params.h_n = pointer<float>(h_n);
  params.c_n = pointer<float>(c_n);
  params.cells = pointer<float>(cells);
  params.z = pointer<float>(z);
  params.cell_clip = cell_clip;
  params.proj_clip = proj_clip;
  params.threads = threads;
  ctxfast::Status status;
  {
    py::gil_scoped_release release;
    status = ctxfast::lstm_forward(params);
  }
  throw_unless_ok(status);
}

}  // namespace

void bind_lstm(py::module_& m) {
  using py::arg;
  m.def("lstm_packed_bytes", &packed_bytes, arg("hidden"), arg("proj_size"), arg("has_proj"), arg("dtype") = "float32");
  m.def("lstm_pack", &pack, arg("hidden"), arg("proj_size"), arg("weight_hh"), arg("weight_proj"), arg("packed"),
        arg("dtype") = "float32", arg("weight_hh_strides") = py::none(), arg("weight_proj_strides") = py::none(),
        arg("threads") = 1);
  m.def("lstm_input_packed_bytes", &input_packed_bytes, arg("hidden"), arg("input"), arg("dtype") = "float32");
  m.def("lstm_pack_input", &pack_input, arg("hidden"), arg("input"), arg("weight_ih"), arg("packed"),
        arg("dtype") = "float32", arg("weight_ih_strides") = py::none(), arg("threads") = 1);
  m.def("lstm_backward_packed_bytes", &backward_packed_bytes, arg("hidden"), arg("proj_size"), arg("has_proj"));
  m.def("lstm_pack_backward", &pack_backward, arg("hidden"), arg("proj_size"), arg("weight_hh"), arg("weight_proj"),
        arg("packed"), arg("weight_hh_strides") = py::none(), arg("weight_proj_strides") = py::none(),
        arg("threads") = 1);
  m.def("lstm_backward", &backward, arg("batch"), arg("steps"), arg("hidden"), arg("proj_size"), arg("has_proj"),
        arg("reverse"), arg("packed"), arg("lengths"), arg("z"), arg("cells"), arg("c_0"), arg("output"),
        arg("output_strides"), arg("grad_output"), arg("grad_output_strides"), arg("grad_h_n"), arg("grad_c_n"),
        arg("grad_z"), arg("grad_hidden"), arg("m"), arg("grad_h_0"), arg("grad_c_0"), arg("cell_clip") = 0.0f,
        arg("proj_clip") = 0.0f, arg("threads") = 1, arg("isa") = "auto");
  m.def("lstm_forward", &forward, arg("batch"), arg("steps"), arg("hidden"), arg("proj_size"), arg("has_proj"),
        arg("gates"), arg("gates_strides"), arg("packed"), arg("dtype"), arg("lengths"), arg("h_0"), arg("c_0"),
        arg("output"), arg("output_strides"), arg("h_n"), arg("c_n"), arg("cells") = 0, arg("z") = 0,
        arg("cell_clip") = 0.0f, arg("proj_clip") = 0.0f, arg("threads") = 1, arg("isa") = "auto", arg("input") = -1,
        arg("packed_input") = std::vector<Address>(), arg("bias") = std::vector<Address>());
}
