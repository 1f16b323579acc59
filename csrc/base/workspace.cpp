// SPDX-License-Identifier: Apache-2.0
#include "base/workspace.h"

#include <cstdlib>
#include <memory>

namespace ctxfast {
namespace {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Kept {
  std::unique_ptr<void, Free> memory;
  size_t size = 0;
};

// More is given back when a call comes that needs this much or less.
constexpr size_t kMostKept = size_t{64} << 20;

}  // namespace

void* workspace(size_t bytes) {
  thread_local Kept kept;
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > kept.size || (kept.size > kMostKept && bytes <= kMostKept)) {
    kept.memory.reset();  // first, so that both are never held at once
    kept.memory.reset(std::aligned_alloc(64, bytes));
    kept.size = kept.memory ? bytes : 0;
  }
  return kept.memory.get();
}

}  // namespace ctxfast
