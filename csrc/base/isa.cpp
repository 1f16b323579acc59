// SPDX-License-Identifier: Apache-2.0
#include "base/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ctxfast {
namespace {

#if defined(__x86_64__)

struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Leaf(unsigned leaf, unsigned sub) {
    if (!__get_cpuid_count(leaf, sub, &a, &b, &c, &d)) a = b = c = d = 0;
  }
};

bool bit(unsigned word, int index) { return (word >> index & 1) != 0; }

// Linux gives a process the 8 KiB of tile registers only when it asks (arch_prctl ARCH_REQ_XCOMP_PERM).
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kGetPermission = 0x1022, kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
  unsigned long granted = 0;
  return syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && (granted >> kTileData & 1) != 0;
#else
  return false;
#endif
}

// The newest instructions are looked up here: older compilers' __builtin_cpu_supports does not know their names.
bool runs(Isa isa) {
  // These builtins ask the operating system too whether it saves the wide registers.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
  const Leaf seven(7, 0), seven_one(7, 1);
  const bool vnni512 = avx512 && bit(seven.c, 11) && bit(seven.b, 30) && bit(seven.b, 31);  // with BW and VL
  const bool bf16 = vnni512 && bit(seven_one.a, 5);
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvxVnni:
      return avx2 && bit(seven_one.a, 4);
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Vnni:
      return vnni512;
    case Isa::kAvx512Bf16:
      return bf16;
    case Isa::kAmx:
      return bf16 && bit(seven.d, 22) && bit(seven.d, 24) && bit(seven.d, 25) && tiles_granted();
  }
  return false;
}

#else

bool runs(Isa isa) { return isa == Isa::kGeneric; }

#endif

}  // namespace

const char* isa_name(Isa isa) {
#define CTXFAST_NAME(isa_, set, ...) \
  if (isa == Isa::isa_) return #set;
  CTXFAST_SETS(CTXFAST_NAME, )
#undef CTXFAST_NAME
  return "";
}

bool includes(Isa isa, Isa part) { return isa == part || (isa > part && part != Isa::kAvxVnni); }

// The build defines CTXFAST_COMPILED_SETS: the names of what it compiles, each between spaces.
std::vector<Isa> compiled_isas() {
  const std::string compiled = CTXFAST_COMPILED_SETS;
  std::vector<Isa> isas;
#define CTXFAST_ADD(isa, set, ...) \
  if (compiled.find(" " #set " ") != std::string::npos) isas.push_back(Isa::isa);
  CTXFAST_SETS(CTXFAST_ADD, )
#undef CTXFAST_ADD
  return isas;
}

const std::vector<Isa>& runnable_isas() {
  static const std::vector<Isa> runnable = [] {
    std::vector<Isa> isas;
    for (const Isa isa : compiled_isas()) {
      if (runs(isa)) isas.push_back(isa);
    }
    return isas;
  }();
  return runnable;
}

Isa best_isa() { return runnable_isas().back(); }

bool find_isa(const std::string& name, Isa* isa) {
  if (name == "auto") {
    *isa = best_isa();
    return true;
  }
  for (const Isa candidate : runnable_isas()) {
    if (name == isa_name(candidate)) {
      *isa = candidate;
      return true;
    }
  }
  return false;
}

}  // namespace ctxfast
