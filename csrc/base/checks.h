// SPDX-License-Identifier: Apache-2.0
// What launchers check before they touch memory. Each returns what is wrong first, in the name of `op`.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>

#include "base/common.h"

#define CTXFAST_RETURN_IF_ERROR(call)                  \
  do {                                                 \
    const ::ctxfast::Status ctxfast_status_ = (call);  \
    if (!ctxfast_status_.ok()) return ctxfast_status_; \
  } while (0)

namespace ctxfast {

struct Size {
  const char* name;
  int64_t value, least = 0, most = std::numeric_limits<int64_t>::max();
};

inline Status check_sizes(const char* op, std::initializer_list<Size> sizes) {
  for (const Size& size : sizes) {
    if (size.value >= size.least && size.value <= size.most) continue;
    const bool is_open = size.most == std::numeric_limits<int64_t>::max();
    return invalid(op, size.name, std::to_string(size.value),
                   std::to_string(size.least) + (is_open ? " or more" : ".." + std::to_string(size.most)));
  }
  return {};
}

struct Address {
  const char* name;
  const void* value;
  bool is_needed = true;  // may not be null
  uintptr_t alignment = 1;
};

inline Status check_addresses(const char* op, std::initializer_list<Address> addresses) {
  for (const Address& address : addresses) {
    if (!address.value && address.is_needed) return invalid(op, address.name, "null", "an address");
    if (reinterpret_cast<uintptr_t>(address.value) % address.alignment == 0) continue;
    return invalid(op, address.name, "misaligned", "a multiple of " + std::to_string(address.alignment));
  }
  return {};
}

inline Status check_dtype(const char* op, const char* name, DType dtype, std::initializer_list<DType> allowed) {
  std::string wanted;
  for (const DType each : allowed) {
    if (dtype == each) return {};
  }
  for (const DType each : allowed) wanted += (wanted.empty() ? "" : ", ") + std::string(dtype_name(each));
  return invalid(op, name, dtype_name(dtype), "one of " + wanted);
}

}  // namespace ctxfast
