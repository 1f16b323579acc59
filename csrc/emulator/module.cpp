// SPDX-License-Identifier: Apache-2.0
// The Python module ctxfast_emulated: the bindings of every CUDA kernel written against base/device.cuh, on the
// emulator.
//
//   set_schedule(seed)    see emulator.h
#include "base/bind.h"
#include "emulator/emulator.h"

PYBIND11_MODULE(ctxfast_emulated, m) {
  m.def("set_schedule", &ctxfast::emulator::set_schedule);
  for (const auto define : ctxfast::bind::Op::all()) define(m);
}
