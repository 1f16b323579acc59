// SPDX-License-Identifier: Apache-2.0
// Whether memory still holds what it held at some places: how packed weights notice that their source has changed.
#pragma once

#include <cstdint>

namespace ctxfast {

template <class Word>
bool same_words(const void* memory, int64_t stride, int64_t count, const void* kept) {
  const char* from = static_cast<const char*>(memory);
  const Word* const to = static_cast<const Word*>(kept);
  Word difference = 0;
  for (int64_t i = 0; i < count; ++i, from += stride) {
    Word word;
    __builtin_memcpy(&word, from, sizeof word);
    difference = static_cast<Word>(difference | (word ^ to[i]));
  }
  return difference == 0;
}

// `count` elements of `size` bytes (1, 2, 4 or 8) at `memory`, `stride` bytes apart; at `kept` as many one after
// another. Five 64-bit words and nothing else: callers may keep it as a row of integers.
struct Samples {
  const void* memory;
  int64_t stride, size, count;
  const void* kept;
};
static_assert(sizeof(Samples) == 5 * 8, "no padding");

inline bool same_samples(const Samples& s) {
  switch (s.size) {
    case 1:
      return same_words<uint8_t>(s.memory, s.stride, s.count, s.kept);
    case 2:
      return same_words<uint16_t>(s.memory, s.stride, s.count, s.kept);
    case 4:
      return same_words<uint32_t>(s.memory, s.stride, s.count, s.kept);
    case 8:
      return same_words<uint64_t>(s.memory, s.stride, s.count, s.kept);
  }
  return false;
}

}  // namespace ctxfast
