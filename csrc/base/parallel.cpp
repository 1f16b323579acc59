// SPDX-License-Identifier: Apache-2.0
#include "base/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <system_error>
#include <thread>
#include <vector>

namespace ctxfast {
namespace {

// About 50 us of pauses: longer than any wait between threads that each have a core.
constexpr int kSpinsBeforeYield = 1000;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
  int (*num_threads)();

  OpenMp() {
    *reinterpret_cast<void**>(&parallel) = dlsym(RTLD_DEFAULT, "GOMP_parallel");
    *reinterpret_cast<void**>(&thread_num) = dlsym(RTLD_DEFAULT, "omp_get_thread_num");
    *reinterpret_cast<void**>(&num_threads) = dlsym(RTLD_DEFAULT, "omp_get_num_threads");
  }
  bool there() const { return parallel && thread_num && num_threads; }
};

// The threads of an OpenMP pool stay behind when its process forks, and a child that used the pool would wait for them
// for ever. Nobody can tell whether torch has used it, so every child starts threads of its own.
std::atomic<bool> is_forked{false};
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked.store(true); });

// The core this thread runs on; -1 if unknown.
int this_core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves this thread off a core, if it may run on `count` of them, and lets it go where it likes from then on.
void leave_core(int core, int count) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < count) return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (sched_setaffinity(0, sizeof others, &others) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
#else
  (void)core, (void)count;
#endif
}

struct Region {
  void (*body)(void*, int, int);
  void* context;
  const OpenMp* openmp;
  std::atomic<int> core{-1};  // the caller's
};

void openmp_body(void* argument) {
  Region& region = *static_cast<Region*>(argument);
  // The runtime may give fewer threads than asked for (a nested region gets one): only it knows.
  const int index = region.openmp->thread_num(), count = region.openmp->num_threads();
  // A thread that slept may wake up on its caller's core: to Linux, the idle cores of a virtual machine look taken. The
  // two would then take turns at every barrier until the scheduler looks again. After a pause of 30 ms, six layers of
  // MiniLM took 9.8 ms instead of 0.8 (2 threads of a virtual Zen 4, Linux 6.18, 2026-11-28).
  const int core = this_core();
  if (index == 0) {
    region.core.store(core, std::memory_order_relaxed);
  } else if (core >= 0 && core == region.core.load(std::memory_order_relaxed)) {
    leave_core(core, count);
  }
  region.body(region.context, index, count);
}

}  // namespace

bool run_parallel(int64_t threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) {
    body(context, 0, 1);
    return true;
  }
  const int count = static_cast<int>(threads);
  // Looked up at every call, some 0.3 us: torch may be imported after this module.
  const OpenMp openmp;
  if (openmp.there() && !is_forked.load(std::memory_order_relaxed)) {
    Region region{body, context, &openmp};
    openmp.parallel(openmp_body, &region, static_cast<unsigned>(count), 0);
    return true;
  }
  // The barrier inside `body` counts on every thread: none may begin before all of them exist.
  std::atomic<int> go{0};
  std::vector<std::thread> others;
  const auto wait_and_run = [&go, body, context, count](int index) {
    while (go.load(std::memory_order_acquire) == 0) sched_yield();
    if (go.load(std::memory_order_acquire) > 0) body(context, index, count);
  };
  bool started = true;
  try {
    others.reserve(count - 1);
    for (int index = 1; index < count; ++index) others.emplace_back(wait_and_run, index);
  } catch (const std::system_error&) {
    started = false;
  }
  go.store(started ? 1 : -1, std::memory_order_release);
  if (started) body(context, 0, count);
  for (std::thread& other : others) other.join();
  return started;
}

void SpinBarrier::wait(int count) {
  if (count == 1) return;
  const int generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  int spins = 0;
  while (generation_.load(std::memory_order_acquire) == generation) {
    if (++spins < kSpinsBeforeYield) {
      pause_cpu();
    } else {
      sched_yield();
    }
  }
}

}  // namespace ctxfast
