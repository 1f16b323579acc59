// SPDX-License-Identifier: Apache-2.0
// The Python module ctxfast_emulated: the bindings of every CUDA kernel written against base/device.cuh, on the
// emulator.
//
//   set_schedule(seed)    see emulator.h
#include "base/bindings.h"
#include "emulator/emulator.h"

PYBIND11_MODULE(ctxfast_emulated, m) {
  m.def("set_schedule", &ctxfast::emulator::set_schedule);
  bind_char_cnn_cuda(m);
  bind_lstm_persistent(m);
  bind_lstm_step(m);
  bind_lstm_persistent_backward(m);
  bind_scalar_mix(m);
}
