// SPDX-License-Identifier: Apache-2.0
// Memory that an op's call needs for itself.
#pragma once

#include <cstddef>

namespace ctxfast {

// On a cache line; null: not to be had. Each calling thread keeps one, up to a size, for its next call: memory fresh
// from the system costs more than a small call. Valid until this thread asks again.
void* workspace(size_t bytes);

}  // namespace ctxfast
