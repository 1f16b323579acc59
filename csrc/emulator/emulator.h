// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels written against csrc/base/device.cuh on the CPU: every thread a fiber, all blocks of a cooperative
// launch alive at once, shared memory per block. One thread at a time runs, until it waits; which one runs next is
// drawn from a seed, and relaxed stores reach other blocks late and in any order. So indexing, reduction order, missing
// barriers and the flags between blocks are tested without a GPU; a warpgroup's products run when they are waited for,
// so a missing fence, commit or wait shows. What it cannot show: speed, races of plain accesses inside a block between
// two barriers that happen to run in a lucky order, loads that come early or stale (acquire is as relaxed), products
// that read shared memory before ordinary stores to it were handed over (shared_written), registers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace ctxfast::emulator {

// seed 0: threads in order, stores at once. Any other: a random order, stores delayed. Same seed, same run.
void set_schedule(uint64_t seed);

// Why the last launch failed.
const std::string& last_error();

struct Grid {
  unsigned x = 1, y = 1, z = 1;
};

// Runs the kernel to its end; false: see last_error. cluster: so many neighbours along x reach one another's shared
// memory; more than one only where cooperative.
bool run(const std::function<void()>& thread, Grid grid, unsigned threads, size_t shared_bytes, bool cooperative,
         unsigned cluster);

// Bytes of shared memory that a launch of this kernel may ask for: 48 KB, or what cudaFuncSetAttribute allowed.
size_t& shared_limit(const void* function);
// Whether it may ask for so much; else see last_error.
bool may_have_shared(const void* function, size_t bytes);

// --- for device.h: the thread that runs now

struct Place {
  unsigned thread = 0, block_x = 0, block_y = 0, block_z = 0, threads = 0;
  Grid grid;
  unsigned char* shared = nullptr;
};
const Place& place();

// Waits for all `count` threads of the aligned group this thread is in; the last to come runs `operation` on all their
// arguments (by place in the group), then all go on. Groups: a warp (32) or a warpgroup (128).
void together(int count, void* argument, void (*operation)(void** arguments));
void block_barrier(int id, int threads);  // threads 0: all of the block
void cluster_barrier();
// The place in the shared memory of this cluster's block `rank` that p is in this block's.
void* in_cluster(void* p, int rank);
void yield();
bool nobody_goes_on();  // for long: every thread polls, no store is under way
[[noreturn]] void fail(const std::string& what);

uint32_t load_word(const uint32_t* p);
void store_word(uint32_t* p, uint32_t value);
void flush_stores();

// Products of a warpgroup that run on beside its threads. Here they run when they are waited for, as late as they may:
// until then d holds NaN, and what is written to their shared memory goes into them.
struct Product {
  void (*multiply)(const Product&, float* sums);  // sums: those of thread after thread
  std::vector<uint32_t> a_registers;              // four of each thread, or none
  uint64_t a, b;                                  // descriptors
  const unsigned char* shared;
  float* d;  // that of the first thread
};
struct Accumulator {
  std::vector<float*> d;    // of each thread
  std::vector<float> sums;  // as in Product
};
struct Warpgroup {
  bool fenced = false;  // since registers were last anybody's to touch
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
  std::map<float*, Accumulator> accumulators;  // by the first thread's d
};
Warpgroup& warpgroup();  // of the thread that runs now

void copy_later(void* to, const void* from);  // 16 bytes
void commit_copies();
void wait_copies(int allowed);

}  // namespace ctxfast::emulator
