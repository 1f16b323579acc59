// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>

#include "base/common.h"
#include "base/cuda.h"

namespace ctxfast {

Status cuda_versions(int* driver, int* runtime) {
  CTXFAST_CUDA_CHECK("cuda_versions", cudaDriverGetVersion(driver));
  CTXFAST_CUDA_CHECK("cuda_versions", cudaRuntimeGetVersion(runtime));
  return {};
}

}  // namespace ctxfast
