// SPDX-License-Identifier: Apache-2.0
// Scratch memory of a call.
#pragma once

#include <cstddef>

namespace ctxfast {

// Aligned to a cache line; null where there is no memory. Each calling thread caches one workspace, up to a size, for
// its next call: fresh memory from the system costs more than a small call. Valid until this thread's next request.
void* workspace(size_t bytes);

}  // namespace ctxfast
