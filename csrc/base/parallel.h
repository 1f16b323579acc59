// SPDX-License-Identifier: Apache-2.0
// One parallel region over the process's OpenMP pool, and a spin barrier for the threads inside it.
#pragma once

#include <atomic>
#include <cstdint>

namespace ctxfast {

// Runs body(context, index, count) on `count` <= `threads` threads at once, index 0..count-1, and waits for all.
// Uses the OpenMP runtime already loaded in the process (torch's), so that no second pool competes with it; without
// one, and in a forked child, std::thread. `count` is 1 inside another parallel region.
// False: no thread could be started.
bool run_parallel(int64_t threads, void (*body)(void* context, int index, int count), void* context);

// For threads that all run at once. Spins, and yields after a while, for machines with more threads than cores.
class SpinBarrier {
 public:
  void wait(int count);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

}  // namespace ctxfast
