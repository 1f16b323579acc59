// SPDX-License-Identifier: Apache-2.0
#include "base/samples.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/common.h"
#include "base/parallel.h"

namespace ctxfast {
namespace {

// Rows prefetched at a time.
constexpr int64_t kAhead = 32;
// Rows that justify a thread: some 5 us.
constexpr int64_t kRowsOfThread = 1024;

template <class Word>
Word load(const void* from) {
  Word word;
  std::memcpy(&word, from, sizeof word);
  return word;
}

template <class Word>
Word difference(const char* from, int64_t stride, int64_t count, const char* saved) {
  Word bits = 0;
  for (int64_t i = 0; i < count; ++i, from += stride, saved += sizeof(Word)) {
    bits = static_cast<Word>(bits | (load<Word>(from) ^ load<Word>(saved)));
  }
  return bits;
}

// Where the samples of a row begin, and of those after it.
class Places {
 public:
  Places(const Samples& s, int64_t row)
      : s_(s),
        chunks_(ceil_div(s.columns, s.width)),
        chunk_(row % chunks_),
        row_(pointer(s.memory) + row * s.row_stride) {}
  const char* next() {
    const char* const at = row_ + std::min(chunk_ * s_.width, s_.columns - s_.width) * s_.column_stride;
    row_ += s_.row_stride;
    chunk_ = chunk_ + 1 == chunks_ ? 0 : chunk_ + 1;
    return at;
  }

 private:
  static const char* pointer(const void* memory) { return static_cast<const char*>(memory); }
  const Samples& s_;
  const int64_t chunks_;
  int64_t chunk_;
  const char* row_;
};

// Whether any of rows from..to-1 differs(samples, saved).
template <class Differs>
bool any(const Samples& s, int64_t from, int64_t to, const Differs& differs) {
  const int64_t bytes = s.width * s.size;
  const char* saved = static_cast<const char*>(s.saved) + from * bytes;
  Places places(s, from);
  uint64_t bits = 0;
  for (int64_t row = from; row < to; ++row, saved += bytes) bits |= differs(places.next(), saved);
  return bits != 0;
}

template <class Word>
bool any_word(const Samples& s, int64_t from, int64_t to) {
  if (s.width == 1) {
    return any(s, from, to, [](const char* a, const char* b) -> uint64_t { return load<Word>(a) ^ load<Word>(b); });
  }
  return any(s, from, to, [&s](const char* a, const char* b) -> uint64_t {
    return difference<Word>(a, s.column_stride, s.width, b);
  });
}

bool differ(const Samples& s, int64_t from, int64_t to) {
  const int64_t bytes = s.width * s.size;
  if (s.column_stride == s.size && s.width > 1) {
    if (bytes == 16) {
      return any(s, from, to, [](const char* a, const char* b) {
        return (load<uint64_t>(a) ^ load<uint64_t>(b)) | (load<uint64_t>(a + 8) ^ load<uint64_t>(b + 8));
      });
    }
    return any(s, from, to,
               [bytes](const char* a, const char* b) -> uint64_t { return std::memcmp(a, b, bytes) != 0; });
  }
  switch (s.size) {
    case 1:
      return any_word<uint8_t>(s, from, to);
    case 2:
      return any_word<uint16_t>(s, from, to);
    case 4:
      return any_word<uint32_t>(s, from, to);
    case 8:
      return any_word<uint64_t>(s, from, to);
  }
  return true;
}

void fetch(const Samples& s, int64_t from, int64_t to) {
  Places places(s, from);
  for (int64_t row = from; row < to; ++row) __builtin_prefetch(places.next(), 0, 1);
}

struct Call {
  const Samples* samples;
  int64_t count, rows;
  std::atomic<bool> differs{false};
};

// The rows of all matrices one after another; this thread's share of them.
void run(void* context, int index, int count) {
  Call& call = *static_cast<Call*>(context);
  const int64_t from = call.rows * index / count, to = call.rows * (index + 1) / count;
  int64_t first = 0;
  for (int64_t i = 0; i < call.count; ++i) {
    const Samples& s = call.samples[i];
    const int64_t begin = std::max(from - first, int64_t{0}), end = std::min(to - first, s.rows);
    // Rows are far apart and each misses the cache: a few are prefetched while those before are compared.
    if (begin < end) fetch(s, begin, std::min(begin + kAhead, end));
    for (int64_t row = begin; row < end; row += kAhead) {
      const int64_t next = std::min(row + kAhead, end);
      fetch(s, next, std::min(next + kAhead, end));
      if (differ(s, row, next)) call.differs.store(true, std::memory_order_relaxed);
    }
    first += s.rows;
  }
}

}  // namespace

bool same_samples(const Samples* samples, int64_t count, int64_t threads) {
  Call call{samples, count, 0};
  for (int64_t i = 0; i < count; ++i) call.rows += samples[i].rows;
  threads = std::min(threads, std::max<int64_t>(1, call.rows / kRowsOfThread));
  return run_parallel(threads, run, &call) && !call.differs.load(std::memory_order_relaxed);
}

}  // namespace ctxfast
