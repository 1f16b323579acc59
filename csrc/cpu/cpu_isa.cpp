// SPDX-License-Identifier: Apache-2.0
#include "ctxfast/cpu_isa.h"

namespace ctxfast {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "generic";
  }
}

std::vector<Isa> compiled_isas() {
#if defined(__x86_64__)
  return {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512};
#else
  return {Isa::kGeneric};
#endif
}

Isa best_isa() {
#if defined(__x86_64__)
  // These builtins ask the operating system too whether it saves the wide registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return __builtin_cpu_supports("avx512f") ? Isa::kAvx512 : Isa::kAvx2;
  }
#endif
  return Isa::kGeneric;
}

bool find_isa(const std::string& name, Isa* isa) {
  const Isa best = best_isa();
  if (name == "auto") {
    *isa = best;
    return true;
  }
  for (const Isa candidate : compiled_isas()) {
    if (name == isa_name(candidate) && candidate <= best) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

}  // namespace ctxfast
