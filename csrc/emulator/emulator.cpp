// SPDX-License-Identifier: Apache-2.0
#include "emulator/emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ctxfast::emulator {

namespace {

constexpr size_t kStackBytes = 64 * 1024;  // touched pages only are real
constexpr size_t kGuardBytes = 1024;       // behind shared memory: written means a block ran over its end
constexpr unsigned char kPoison = 0xFE;    // NaN as fp16 and bf16, -1.7e38 as fp32
constexpr unsigned kFibersAtOnce = 8192;   // of a launch whose blocks need not be alive together
constexpr int kBarriers = 16;
constexpr size_t kIdleRounds = 256;  // polls of every thread alive, in vain

struct Block;

struct Fiber {
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  Place place;
  Block* block = nullptr;
  bool done = false;
  std::vector<std::pair<void*, const void*>> open_copies;
  std::deque<std::vector<std::pair<void*, const void*>>> copies;
};

struct Gathering {
  int arrived = 0;
  void (*operation)(void**) = nullptr;
  std::vector<void*> arguments;
};

struct Barrier {
  int expected = 0;
  std::vector<Fiber*> waiting;
};

struct Cluster {
  std::vector<Block*> blocks;  // by rank
  std::vector<Fiber*> waiting;
  bool has_met = false;
};

struct Block {
  Cluster* cluster = nullptr;
  size_t running = 0;  // fibers
  std::vector<Fiber> fibers;
  std::vector<Gathering> warps, warpgroups;
  std::vector<Warpgroup> products;  // by warpgroup
  Barrier barriers[kBarriers];
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;  // of it, that the launch asked for
  // Relaxed stores that only this block sees so far.
  std::unordered_map<uint32_t*, size_t> place_of;
  std::vector<std::pair<uint32_t*, uint32_t>> late;
};

struct Machine {
  std::mutex one_launch;
  uint64_t seed = 0;
  std::mt19937_64 random;
  std::string error;
  bool failed = false;
  std::deque<Fiber*> ready;
  std::vector<std::unique_ptr<Block>> blocks;
  std::map<std::array<unsigned, 3>, Cluster> clusters;  // by x / cluster, y, z
  std::vector<Block*> dirty;                            // blocks with late stores, some perhaps emptied since
  Fiber* current = nullptr;
  size_t live = 0;
  size_t idle = 0;  // polls since anything but a poll happened
  std::map<const void*, size_t> shared_limits;
  char* stacks = nullptr;  // kept from launch to launch
  size_t stacks_bytes = 0;
  const std::function<void()>* thread = nullptr;
#ifdef __x86_64__
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
};

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

#ifdef __x86_64__
// Saves what a function call must keep, changes stacks, restores.
extern "C" void ctxfast_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl ctxfast_emulator_switch
.hidden ctxfast_emulator_switch
ctxfast_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void to_scheduler() { ctxfast_emulator_switch(&machine().current->stack_pointer, machine().scheduler); }
void to_fiber(Fiber* fiber) { ctxfast_emulator_switch(&machine().scheduler, fiber->stack_pointer); }
#else
void to_scheduler() { swapcontext(&machine().current->context, &machine().scheduler); }
void to_fiber(Fiber* fiber) { swapcontext(&machine().scheduler, &fiber->context); }
#endif

// A block has ended: its shared memory is another's.
void check_nothing_comes(const Block& ended) {
  const auto begin = reinterpret_cast<uintptr_t>(ended.fibers[0].place.shared), end = begin + ended.shared_bytes;
  for (const Block* block : ended.cluster->blocks) {
    for (const auto& [address, value] : block->late) {
      const auto at = reinterpret_cast<uintptr_t>(address);
      if (block == &ended || at < begin || at >= end) continue;
      machine().failed = true;
      machine().error = "a block ended before a store of its cluster to its shared memory had arrived";
    }
  }
}

void fiber_main() {
  (*machine().thread)();
  Fiber* fiber = machine().current;
  if (!fiber->copies.empty() || !fiber->open_copies.empty()) {
    machine().failed = true;
    machine().error = "a thread ended with asynchronous copies it never waited for";
  }
  fiber->done = true;
  if (--fiber->block->running == 0) check_nothing_comes(*fiber->block);
  --machine().live;
  machine().idle = 0;
  to_scheduler();
}

void prepare(Fiber* fiber, char* stack) {
#ifdef __x86_64__
  // As if fiber_main had just been called: the return address of the switch on top, aligned as the ABI asks.
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
  *top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber->stack_pointer = top;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, &fiber_main, 0);
#endif
}

void write_late(Block* block, size_t at) {
  machine().idle = 0;
  auto [address, value] = block->late[at];
  *address = value;
  block->place_of.erase(address);
  if (at + 1 != block->late.size()) {
    block->late[at] = block->late.back();
    block->place_of[block->late[at].first] = at;
  }
  block->late.pop_back();
}

void flush(Block* block) {
  while (!block->late.empty()) write_late(block, block->late.size() - 1);
}

void write_some_late() {
  Machine& m = machine();
  if (m.dirty.empty()) return;
  const size_t which = m.random() % m.dirty.size();
  Block* block = m.dirty[which];
  // About a fifth at a time: a slow block must not starve everybody's spin limit.
  for (size_t i = block->late.size() / 5 + 1; i > 0 && !block->late.empty(); --i) {
    write_late(block, m.random() % block->late.size());
  }
  if (block->late.empty()) {
    m.dirty[which] = m.dirty.back();
    m.dirty.pop_back();
  }
}

std::string where(const Fiber& fiber) {
  return "block (" + std::to_string(fiber.place.block_x) + ", " + std::to_string(fiber.place.block_y) + "), thread " +
         std::to_string(fiber.place.thread);
}

// Runs the fibers of the blocks that are alive until all are done.
void schedule() {
  Machine& m = machine();
  while (m.live > 0 && !m.failed) {
    if (m.ready.empty()) {
      const Fiber* stuck = nullptr;
      for (const auto& block : m.blocks) {
        for (const Fiber& fiber : block->fibers) {
          if (!fiber.done && stuck == nullptr) stuck = &fiber;
        }
      }
      m.failed = true;
      m.error = "every thread waits for others that do not come, e.g. " + where(*stuck);
      return;
    }
    if (m.seed != 0) {
      std::swap(m.ready.front(), m.ready[m.random() % m.ready.size()]);
      if (m.random() % 16 == 0) write_some_late();
    }
    m.current = m.ready.front();
    m.ready.pop_front();
    to_fiber(m.current);
  }
}

char* stacks_for(size_t fibers) {
  Machine& m = machine();
  const size_t needed = fibers * kStackBytes;
  if (needed > m.stacks_bytes) {
    if (m.stacks != nullptr) munmap(m.stacks, m.stacks_bytes);
    void* fresh = mmap(nullptr, needed, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    m.stacks = fresh == MAP_FAILED ? nullptr : static_cast<char*>(fresh);
    m.stacks_bytes = m.stacks == nullptr ? 0 : needed;
  }
  return m.stacks;
}

void run_blocks(const std::vector<Place>& places, unsigned threads, size_t shared_bytes, unsigned cluster) {
  Machine& m = machine();
  char* stack = stacks_for(places.size() * threads);
  if (stack == nullptr) {
    m.failed = true;
    m.error = "no memory for the stacks of " + std::to_string(places.size() * threads) + " threads";
    return;
  }
  for (const Place& place : places) {
    auto block = std::make_unique<Block>();
    block->shared_bytes = shared_bytes;
    block->running = threads;
    block->cluster = &m.clusters[{place.block_x / cluster, place.block_y, place.block_z}];
    block->cluster->blocks.resize(cluster);
    block->cluster->blocks[place.block_x % cluster] = block.get();
    block->shared.assign(shared_bytes + 1024 + kGuardBytes, kPoison);
    auto base = reinterpret_cast<uintptr_t>(block->shared.data());
    auto* shared = reinterpret_cast<unsigned char*>((base + 1023) / 1024 * 1024);
    block->fibers = std::vector<Fiber>(threads);
    block->warps.resize((threads + 31) / 32);
    block->warpgroups.resize((threads + 127) / 128);
    block->products.resize((threads + 127) / 128);
    for (unsigned t = 0; t < threads; ++t, stack += kStackBytes) {
      Fiber& fiber = block->fibers[t];
      fiber.place = place;
      fiber.place.thread = t;
      fiber.place.shared = shared;
      fiber.block = block.get();
      prepare(&fiber, stack);
      m.ready.push_back(&fiber);
    }
    m.live += threads;
    m.blocks.push_back(std::move(block));
  }
  schedule();
  for (const auto& block : m.blocks) {
    flush(block.get());
    for (const Warpgroup& group : block->products) {
      if (m.failed || group.accumulators.empty()) continue;
      m.failed = true;
      m.error = "a warpgroup ended with products it never waited for";
    }
    const unsigned char* end = block->fibers[0].place.shared + shared_bytes;
    if (!m.failed && std::any_of(end, end + kGuardBytes, [](unsigned char byte) { return byte != kPoison; })) {
      m.failed = true;
      m.error = "a block wrote past its " + std::to_string(shared_bytes) + " bytes of shared memory";
    }
  }
  m.ready.clear();
  m.dirty.clear();
  m.clusters.clear();
  m.blocks.clear();
  m.live = 0;
}

}  // namespace

void set_schedule(uint64_t seed) { machine().seed = seed; }

const std::string& last_error() { return machine().error; }

bool run(const std::function<void()>& thread, Grid grid, unsigned threads, size_t shared_bytes, bool cooperative,
         unsigned cluster) {
  Machine& m = machine();
  std::lock_guard<std::mutex> lock(m.one_launch);
  m.random.seed(m.seed);
  m.idle = 0;
  m.failed = false;
  m.error.clear();
  m.thread = &thread;
  std::vector<Place> places;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) places.push_back({0, x, y, z, threads, grid, nullptr});
    }
  }
  if (m.seed != 0) std::shuffle(places.begin(), places.end(), m.random);
  const size_t at_once = cooperative ? places.size() : std::max(1u, kFibersAtOnce / threads);
  for (size_t first = 0; first < places.size() && !m.failed; first += at_once) {
    const size_t last = std::min(places.size(), first + at_once);
    run_blocks({places.begin() + first, places.begin() + last}, threads, shared_bytes, cluster);
  }
  return !m.failed;
}

const Place& place() { return machine().current->place; }

void yield() {
  Machine& m = machine();
  ++m.idle;
  m.ready.push_back(m.current);
  to_scheduler();
}

bool nobody_goes_on() { return machine().idle > kIdleRounds * machine().live; }

size_t& shared_limit(const void* function) {
  return machine().shared_limits.try_emplace(function, 48 * 1024).first->second;
}

bool may_have_shared(const void* function, size_t bytes) {
  Machine& m = machine();
  std::lock_guard<std::mutex> lock(m.one_launch);
  if (bytes <= shared_limit(function)) return true;
  m.error = "a launch asks for " + std::to_string(bytes) + " bytes of shared memory a block and the kernel may have " +
            std::to_string(shared_limit(function));
  return false;
}

void fail(const std::string& what) {
  Machine& m = machine();
  if (!m.failed) m.error = what + " (" + where(*m.current) + ")";
  m.failed = true;
  to_scheduler();
  std::abort();  // the scheduler never comes back to a failed launch
}

void together(int count, void* argument, void (*operation)(void**)) {
  Machine& m = machine();
  Fiber* self = m.current;
  Block* block = self->block;
  const unsigned group = self->place.thread / count, member = self->place.thread % count;
  Gathering& gathering = (count == 32 ? block->warps : block->warpgroups)[group];
  if (gathering.arrived == 0) {
    gathering.arguments.assign(count, nullptr);
    gathering.operation = operation;
  } else if (gathering.operation != operation) {
    fail("threads of one warp or warpgroup are at different operations");
  }
  gathering.arguments[member] = argument;
  if (++gathering.arrived < count) {
    to_scheduler();
    return;
  }
  operation(gathering.arguments.data());
  gathering.arrived = 0;
  for (int i = 0; i < count; ++i) {
    Fiber* other = &block->fibers[group * count + i];
    if (other != self) m.ready.push_back(other);
  }
}

void block_barrier(int id, int threads) {
  Machine& m = machine();
  Fiber* self = m.current;
  if (id < 0 || id >= kBarriers) fail("barrier " + std::to_string(id) + " does not exist");
  Barrier& barrier = self->block->barriers[id];
  const int expected = threads == 0 ? static_cast<int>(self->block->fibers.size()) : threads;
  if (barrier.waiting.empty()) barrier.expected = expected;
  if (barrier.expected != expected) fail("threads disagree about how many meet at barrier " + std::to_string(id));
  barrier.waiting.push_back(self);
  if (static_cast<int>(barrier.waiting.size()) == expected) {
    m.ready.insert(m.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
    m.idle = 0;
  }
  to_scheduler();
}

void cluster_barrier() {
  Machine& m = machine();
  Fiber* self = m.current;
  Cluster& cluster = *self->block->cluster;
  cluster.waiting.push_back(self);
  if (cluster.waiting.size() == cluster.blocks.size() * self->place.threads) {
    for (Block* block : cluster.blocks) flush(block);
    m.ready.insert(m.ready.end(), cluster.waiting.begin(), cluster.waiting.end());
    cluster.waiting.clear();
    cluster.has_met = true;
    m.idle = 0;
  }
  to_scheduler();
}

void* in_cluster(void* p, int rank) {
  const Fiber* self = machine().current;
  const Cluster& cluster = *self->block->cluster;
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) {
    fail("block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster.blocks.size()));
  }
  const Block& other = *cluster.blocks[rank];
  if (!cluster.has_met) fail("a store to another block's shared memory, and the block may not have begun");
  if (other.running == 0) fail("a store to the shared memory of a block that has ended");
  return other.fibers[0].place.shared + (static_cast<unsigned char*>(p) - self->place.shared);
}

uint32_t load_word(const uint32_t* p) {
  Block* block = machine().current->block;
  if (!block->late.empty()) {
    const auto found = block->place_of.find(const_cast<uint32_t*>(p));
    if (found != block->place_of.end()) return block->late[found->second].second;
  }
  return *p;
}

void store_word(uint32_t* p, uint32_t value) {
  Machine& m = machine();
  Block* block = m.current->block;
  m.idle = 0;
  if (m.seed == 0) {
    *p = value;
    return;
  }
  if (block->late.empty()) {
    m.dirty.erase(std::remove(m.dirty.begin(), m.dirty.end(), block), m.dirty.end());
    m.dirty.push_back(block);
  }
  const auto [found, is_new] = block->place_of.try_emplace(p, block->late.size());
  if (is_new) {
    block->late.emplace_back(p, value);
  } else {
    block->late[found->second].second = value;
  }
}

void flush_stores() { flush(machine().current->block); }

Warpgroup& warpgroup() {
  Fiber* self = machine().current;
  return self->block->products[self->place.thread / 128];
}

void copy_later(void* to, const void* from) { machine().current->open_copies.emplace_back(to, from); }

void commit_copies() {
  Fiber* self = machine().current;
  self->copies.push_back(std::move(self->open_copies));
  self->open_copies.clear();
}

void wait_copies(int allowed) {
  Fiber* self = machine().current;
  while (static_cast<int>(self->copies.size()) > allowed) {
    for (const auto& [to, from] : self->copies.front()) std::memcpy(to, from, 16);
    self->copies.pop_front();
  }
}

}  // namespace ctxfast::emulator
