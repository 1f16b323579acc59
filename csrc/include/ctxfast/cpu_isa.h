// SPDX-License-Identifier: Apache-2.0
// Instruction sets the CPU kernels are compiled for, and which of them this machine runs.
#pragma once

#include <string>
#include <vector>

namespace ctxfast {

// In rising order of preference.
enum class Isa { kGeneric, kAvx2, kAvx512 };

// "generic", "avx2", "avx512".
const char* isa_name(Isa isa);

// What this build contains.
std::vector<Isa> compiled_isas();

// The best that is compiled and that processor and operating system run.
Isa best_isa();

// True and *isa set if `name` is "auto" or an instruction set that best_isa() includes.
bool find_isa(const std::string& name, Isa* isa);

}  // namespace ctxfast
