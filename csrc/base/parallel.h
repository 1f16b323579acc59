// SPDX-License-Identifier: Apache-2.0
// One parallel region over the process's OpenMP pool, and a spin barrier for the threads inside it.
#pragma once

#include <atomic>
#include <cstdint>

namespace ctxfast {

// Runs body(context, index, count) on `count` <= `threads` threads at once, index 0..count-1, and waits for all.
// Uses the OpenMP runtime already in the process (torch's), found at run time, so that no second pool competes
// with it; without one, and in a child that a process forked, std::thread. `count` is 1 inside another parallel region.
// False: no thread could be started.
bool run_parallel(int64_t threads, void (*body)(void* context, int index, int count), void* context);

// For threads that all run at once: spins, and after a while yields, for machines with more threads than cores.
class SpinBarrier {
 public:
  void wait(int count);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

}  // namespace ctxfast
