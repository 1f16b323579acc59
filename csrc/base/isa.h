// SPDX-License-Identifier: Apache-2.0
// Instruction sets: which the CPU kernels are compiled for, which this machine runs, and the choice among kernels.
//
// A source *.isa.cpp is compiled once for each set that its line "// sets:" lists, with the flags of csrc/build.py,
// CTXFAST_ISA=<set> and CTXFAST_LANES=<floats of a vector>. It exports one constant for each:
//
//   CTXFAST_KERNELS(LayerNormKernel, layer_norm) = &rows;            // in layer_norm/kernels.isa.cpp
//   CTXFAST_DECLARE_KERNELS(LayerNormKernel, layer_norm)             // in layer_norm/kernels.h
//   best_layer_norm(isa)                                             // the best one that `isa` includes
#pragma once

#include <string>
#include <vector>

// X(enumerator, set, ...) for every instruction set, in rising order of preference.
#define CTXFAST_SETS(X, ...)              \
  X(kGeneric, generic, __VA_ARGS__)       \
  X(kAvx2, avx2, __VA_ARGS__)             \
  X(kAvxVnni, avxvnni, __VA_ARGS__)       \
  X(kAvx512, avx512, __VA_ARGS__)         \
  X(kAvx512Vnni, avx512vnni, __VA_ARGS__) \
  X(kAvx512Bf16, avx512bf16, __VA_ARGS__) \
  X(kAmx, amx, __VA_ARGS__)

namespace ctxfast {

#define CTXFAST_ENUMERATOR(isa, set, ...) isa,
enum class Isa { CTXFAST_SETS(CTXFAST_ENUMERATOR, ) };
#undef CTXFAST_ENUMERATOR

// The name of the set: "generic", "avx2", ...
const char* isa_name(Isa isa);

// Whether a machine that runs `isa` runs `part`. Every set includes those before it but one: kAvxVnni, 256-bit integer
// dot products beside AVX2, is part of no other.
bool includes(Isa isa, Isa part);

// What this build contains, in the enumeration's order.
std::vector<Isa> compiled_isas();

// What is compiled and what processor and operating system run, in the enumeration's order; never empty.
// The first call asks the operating system for AMX's tile registers on behalf of the process.
const std::vector<Isa>& runnable_isas();

// The last of runnable_isas().
Isa best_isa();

// True and *isa set if `name` is "auto" or one of runnable_isas().
bool find_isa(const std::string& name, Isa* isa);

}  // namespace ctxfast

#define CTXFAST_JOIN_(name, set) name##_##set
#define CTXFAST_JOIN(name, set) CTXFAST_JOIN_(name, set)
#define CTXFAST_KERNELS(Type, name) extern const Type CTXFAST_JOIN(name, CTXFAST_ISA)

// Weak: the address of what is not compiled is null. Static: a shared inline function could be picked by the linker
// from a source compiled for a machine that is not there.
#define CTXFAST_DECLARE_KERNELS(Type, name)                  \
  CTXFAST_SETS(CTXFAST_DECLARE_ONE, Type, name)              \
  [[maybe_unused]] static const Type& best_##name(Isa isa) { \
    const Type* best = nullptr;                              \
    CTXFAST_SETS(CTXFAST_TAKE_ONE, Type, name)               \
    return *best;                                            \
  }
#define CTXFAST_DECLARE_ONE(isa_, set, Type, name) extern const Type name##_##set __attribute__((weak));
#define CTXFAST_TAKE_ONE(isa_, set, Type, name) \
  if (&name##_##set && includes(isa, Isa::isa_)) best = &name##_##set;
