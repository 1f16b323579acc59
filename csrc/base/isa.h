// SPDX-License-Identifier: Apache-2.0
// Instruction sets the CPU kernels are compiled for, and which of them this machine runs.
#pragma once

#include <string>
#include <vector>

namespace ctxfast {

// In rising order of preference. Not every machine that runs one runs all before it: kAvxVnni is AVX2 with 256-bit
// integer dot products and knows no AVX-512. kAvx512Bf16 includes kAvx512Vnni, kAmx (int8 and bfloat16 tiles) both.
enum class Isa { kGeneric, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };

// "generic", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx".
const char* isa_name(Isa isa);

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
