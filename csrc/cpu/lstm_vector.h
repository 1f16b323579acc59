// SPDX-License-Identifier: Apache-2.0
// Vectors of CTXFAST_LANES floats (4, 8 or 16) in the compiler's own types, and the functions of an LSTM on them.
//
// Everything here and in the files that include it is in an unnamed namespace and nothing of the standard library is
// used: a shared inline function compiled here could be picked by the linker for code that runs on machines without
// this instruction set.
#pragma once

#include <cstdint>

namespace ctxfast {
namespace {

constexpr int kLanes = CTXFAST_LANES;

typedef float Vec __attribute__((vector_size(4 * CTXFAST_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * CTXFAST_LANES)));
typedef uint32_t WordVec __attribute__((vector_size(4 * CTXFAST_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * CTXFAST_LANES)));
typedef uint8_t ByteVec __attribute__((vector_size(CTXFAST_LANES)));

inline Vec load(const float* from) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
inline WordVec load_words(const uint32_t* from) {
  WordVec value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, Vec value) { __builtin_memcpy(to, &value, sizeof value); }
inline Vec all(float value) { return value - Vec{}; }  // minus keeps the sign of zero, so nothing is computed
inline WordVec all_words(uint32_t value) { return value - WordVec{}; }
// Both let NaN through, as torch.clamp does.
inline Vec at_least(Vec value, float bound) { return value < all(bound) ? all(bound) : value; }
inline Vec at_most(Vec value, float bound) { return value > all(bound) ? all(bound) : value; }
inline Vec clipped(Vec value, float clip) { return clip > 0 ? at_most(at_least(value, -clip), clip) : value; }

// Number of elements, `n` at most kLanes, that are there; the rest of a vector is zero or left alone.
inline Vec load_some(const float* from, int64_t n) {
  if (n >= kLanes) return load(from);
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = from[i];
  return load(lanes);
}
inline void store_some(float* to, Vec value, int64_t n) {
  if (n >= kLanes) return store(to, value);
  float lanes[kLanes];
  store(lanes, value);
  for (int64_t i = 0; i < n; ++i) to[i] = lanes[i];
}

// Adding it rounds to a whole number, ties to even, held in the low bits: 1.5 * 2^23.
constexpr float kRounding = 12582912.0f;

// exp(x) = scale * (1 + p): n = round(x / ln 2), p = exp(x - n ln 2) - 1 by its series, 1.5e-8 off at most.
inline void exp_parts(Vec x, Vec* scale, Vec* p) {
  const Vec shifted = x * all(1.44269504f) + all(kRounding);
  const Vec n = shifted - all(kRounding);
  Vec r = x - n * all(0.693359375f);  // ln 2 in two parts; the first has few bits, so its product is exact
  r = r - n * all(-2.12194440e-4f);
  Vec q = all(1.0f / 5040) * r + all(1.0f / 720);
  q = q * r + all(1.0f / 120);
  q = q * r + all(1.0f / 24);
  q = q * r + all(1.0f / 6);
  q = q * r + all(0.5f);
  *p = r * r * q + r;
  const IntVec exponent = (IntVec)shifted - ((IntVec)all(kRounding) - 127);
  *scale = (Vec)(exponent << 23);
}

// 1 / (1 + exp(-x)); beyond +-87 it is 1, or 1.6e-38.
inline Vec sigmoid(Vec x) {
  Vec scale, p;
  exp_parts(at_most(at_least(-x, -87.0f), 87.0f), &scale, &p);
  return all(1.0f) / (all(1.0f) + (scale * p + scale));
}

// sign(x) e / (e + 2), e = exp(2|x|) - 1: no digits are lost near zero. 1 in float32 from 9.1 on.
inline Vec tanh(Vec x) {
  const WordVec sign = (WordVec)x & 0x80000000u;
  const Vec magnitude = (Vec)((WordVec)x & 0x7fffffffu);
  Vec scale, p;
  exp_parts(at_most(magnitude, 10.0f) * all(2.0f), &scale, &p);
  const Vec e = scale * p + (scale - all(1.0f));
  return (Vec)((WordVec)(e / (e + all(2.0f))) | sign);
}

// Asks for two cache lines at `ahead`, into L2: what the thread reads next.
inline void fetch(const void* ahead) {
  __builtin_prefetch(ahead, 0, 2);
  __builtin_prefetch(static_cast<const char*>(ahead) + 64, 0, 2);
}

inline int64_t less(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t panels_of(int64_t size, int64_t width) { return (size + width - 1) / width; }

inline void fill_zero(float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = 0.0f;
}

// Thread `index` of `count` and its share of [0, n).
struct Share {
  int64_t from, to;
  Share(int64_t n, int index, int count) : from(n * index / count), to(n * (index + 1) / count) {}
};

}  // namespace
}  // namespace ctxfast
