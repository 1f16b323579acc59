// SPDX-License-Identifier: Apache-2.0
// What CUDA says of this machine.
#pragma once

#include "base/common.h"

namespace ctxfast {

// 1000 major + 10 minor; driver 0: there is none. Kernels run if the driver's major version is at least the runtime's,
// which is linked in and may be newer than the one torch brings.
Status cuda_versions(int* driver, int* runtime);

}  // namespace ctxfast
