// SPDX-License-Identifier: Apache-2.0
// The functions of csrc/base/device.cuh and base/wgmma.cuh, on the emulator.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "emulator/emulator.h"

#define CTXFAST_DEVICE inline
// Words of nvcc's that CUDA's headers leave out for other compilers.
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace ctxfast {

CTXFAST_DEVICE int thread_index() { return static_cast<int>(emulator::place().thread); }
CTXFAST_DEVICE int block_index() { return static_cast<int>(emulator::place().block_x); }
CTXFAST_DEVICE int block_index_y() { return static_cast<int>(emulator::place().block_y); }
CTXFAST_DEVICE int block_index_z() { return static_cast<int>(emulator::place().block_z); }
CTXFAST_DEVICE int block_size() { return static_cast<int>(emulator::place().threads); }
CTXFAST_DEVICE int grid_size() { return static_cast<int>(emulator::place().grid.x); }
CTXFAST_DEVICE int lane_index() { return thread_index() & 31; }
CTXFAST_DEVICE int warp_index() { return thread_index() >> 5; }
CTXFAST_DEVICE unsigned char* shared_memory() { return emulator::place().shared; }

CTXFAST_DEVICE void warp_sync() {
  emulator::together(32, nullptr, [](void**) {});
}
CTXFAST_DEVICE void block_sync() { emulator::block_barrier(0, 0); }
CTXFAST_DEVICE void barrier_sync(int id, int threads) { emulator::block_barrier(id, threads); }

namespace emulated {

template <typename V>
struct Shuffle {
  V value;
  int from;  // lane
  V result;
};

template <typename V>
V shuffled(V value, int from) {
  static_assert(sizeof(V) == 4, "32-bit values are shuffled");
  Shuffle<V> mine{value, from, value};
  emulator::together(32, &mine, [](void** all) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Shuffle<V>*>(all[lane]);
      if (to->from >= 0 && to->from < 32) to->result = static_cast<Shuffle<V>*>(all[to->from])->value;
    }
  });
  return mine.result;
}

inline float value_at(const unsigned char* p, const __half*) {
  __half value;
  std::memcpy(&value, p, 2);
  return __half2float(value);
}
inline float value_at(const unsigned char* p, const __nv_bfloat16*) {
  __nv_bfloat16 value;
  std::memcpy(&value, p, 2);
  return __bfloat162float(value);
}
// Element 0 or 1 of a register.
template <typename T>
float element(const uint32_t& word, int which) {
  return value_at(reinterpret_cast<const unsigned char*>(&word) + 2 * which, static_cast<const T*>(nullptr));
}

struct Ldmatrix {
  const unsigned char* row;
  uint32_t* registers;
};

template <int Count, bool Transposed>
void ldmatrix(uint32_t* registers, const void* row) {
  Ldmatrix mine{static_cast<const unsigned char*>(row), registers};
  emulator::together(32, &mine, [](void** all) {
    const auto lane_of = [&](int lane) { return static_cast<Ldmatrix*>(all[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < Count; ++matrix) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int r = Transposed ? 2 * (lane % 4) + e : lane / 4, c = Transposed ? lane / 4 : 2 * (lane % 4) + e;
          std::memcpy(&pair[e], lane_of(8 * matrix + r)->row + 2 * c, 2);
        }
        std::memcpy(&lane_of(lane)->registers[matrix], pair, 4);
      }
    }
  });
}

// The 16 x 16 matrix of a warp's a registers.
template <typename T>
void unfold_a(const uint32_t* const (&registers)[32], float (&a)[16][16]) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int e = 0; e < 2; ++e) a[g + 8 * (i & 1)][2 * t + e + 8 * (i >> 1)] = element<T>(registers[lane][i], e);
    }
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Where the emulated wgmma keeps its descriptors' fields: start and both strides in units of 16 bytes.
struct Wgmma {
  float (*d)[4];
  const uint32_t* a_registers;  // or null
  uint64_t a, b;
  const unsigned char* shared;
};

template <typename T>
float core_element(const unsigned char* shared, uint64_t descriptor, int row, int k) {
  const size_t start = (descriptor & 0x3FFF) << 4, k_stride = (descriptor >> 16 & 0x3FFF) << 4,
               row_stride = (descriptor >> 32 & 0x3FFF) << 4;
  const size_t at = start + row / 8 * row_stride + k / 8 * k_stride + row % 8 * 16 + k % 8 * 2;
  return value_at(shared + at, static_cast<const T*>(nullptr));
}

// 128 threads' sums += a b; see base/wgmma.cuh for the layouts.
template <typename T, int N>
void multiply(const emulator::Product& product, float* sums) {
  float b_of[16][N];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < N; ++n) b_of[k][n] = core_element<T>(product.shared, product.b, n, k);
  }
  for (int warp = 0; warp < 4; ++warp) {
    float a_of[16][16];
    if (!product.a_registers.empty()) {
      const uint32_t* registers[32];
      for (int lane = 0; lane < 32; ++lane) registers[lane] = &product.a_registers[4 * (32 * warp + lane)];
      unfold_a<T>(registers, a_of);
    } else {
      for (int r = 0; r < 16; ++r) {
        for (int k = 0; k < 16; ++k) a_of[r][k] = core_element<T>(product.shared, product.a, 16 * warp + r, k);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < N / 8; ++i) {
        for (int j = 0; j < 4; ++j) {
          const int row = lane / 4 + 8 * (j >> 1), column = 8 * i + 2 * (lane % 4) + (j & 1);
          float sum = 0;
          for (int k = 0; k < 16; ++k) sum += a_of[row][k] * b_of[k][column];
          sums[(32 * warp + lane) * (N / 2) + 4 * i + j] += sum;
        }
      }
    }
  }
}

template <typename T, int N>
void wgmma(float (*d)[4], const uint32_t* a_registers, uint64_t a, uint64_t b) {
  Wgmma mine{d, a_registers, a, b, emulator::place().shared};
  emulator::together(128, &mine, [](void** all) {
    const auto thread_of = [&](int thread) -> Wgmma& { return *static_cast<Wgmma*>(all[thread]); };
    const Wgmma& first = thread_of(0);
    emulator::Warpgroup& group = emulator::warpgroup();
    if (!group.fenced) emulator::fail("wgmma without wgmma_fence since its registers could be touched");
    emulator::Product product{&multiply<T, N>, {}, first.a, first.b, first.shared, &first.d[0][0]};
    emulator::Accumulator& accumulator = group.accumulators[product.d];
    const bool is_new = accumulator.d.empty();
    for (int thread = 0; thread < 128; ++thread) {
      const Wgmma& each = thread_of(thread);
      if (each.b != first.b || each.a != first.a) emulator::fail("wgmma's descriptors differ within a warpgroup");
      if (each.a_registers != nullptr) {
        product.a_registers.insert(product.a_registers.end(), each.a_registers, each.a_registers + 4);
      }
      if (!is_new) continue;
      accumulator.d.push_back(&each.d[0][0]);
      accumulator.sums.insert(accumulator.sums.end(), &each.d[0][0], &each.d[0][0] + N / 2);
      std::fill_n(&each.d[0][0], N / 2, NAN);
    }
    group.open.push_back(std::move(product));
  });
}

// Of the warpgroup that runs now, all committed groups of products but so many.
inline void finish_products(int allowed) {
  emulator::Warpgroup& group = emulator::warpgroup();
  group.fenced = false;
  for (; static_cast<int>(group.committed.size()) > allowed; group.committed.pop_front()) {
    for (const emulator::Product& product : group.committed.front()) {
      product.multiply(product, group.accumulators.at(product.d).sums.data());
    }
  }
  const auto is_awaited = [&](float* d) {
    const auto has = [d](const std::vector<emulator::Product>& products) {
      return std::any_of(products.begin(), products.end(),
                         [d](const emulator::Product& product) { return product.d == d; });
    };
    return has(group.open) || std::any_of(group.committed.begin(), group.committed.end(), has);
  };
  for (auto at = group.accumulators.begin(); at != group.accumulators.end();) {
    const emulator::Accumulator& accumulator = at->second;
    if (is_awaited(at->first)) {
      ++at;
      continue;
    }
    const size_t each = accumulator.sums.size() / accumulator.d.size();
    for (size_t thread = 0; thread < accumulator.d.size(); ++thread) {
      std::copy_n(accumulator.sums.data() + thread * each, each, accumulator.d[thread]);
    }
    at = group.accumulators.erase(at);
  }
}

}  // namespace emulated

template <typename V>
CTXFAST_DEVICE V shuffle(V value, int lane) {
  return emulated::shuffled(value, lane & 31);
}
template <typename V>
CTXFAST_DEVICE V shuffle_xor(V value, int mask) {
  return emulated::shuffled(value, lane_index() ^ mask);
}
template <typename V>
CTXFAST_DEVICE V shuffle_down(V value, int delta) {
  return emulated::shuffled(value, lane_index() + delta);
}
CTXFAST_DEVICE bool any_sync(bool value) {
  int mine = value;
  emulator::together(32, &mine, [](void** all) {
    int any = 0;
    for (int i = 0; i < 32; ++i) any |= *static_cast<int*>(all[i]);
    for (int i = 0; i < 32; ++i) *static_cast<int*>(all[i]) = any;
  });
  return mine != 0;
}
CTXFAST_DEVICE bool all_sync(bool value) { return !any_sync(!value); }

CTXFAST_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  emulator::yield();
  return emulator::load_word(p);
}
CTXFAST_DEVICE uint4 load_relaxed(const uint4* p) {
  emulator::yield();
  const uint32_t* words = &p->x;
  return make_uint4(emulator::load_word(words), emulator::load_word(words + 1), emulator::load_word(words + 2),
                    emulator::load_word(words + 3));
}
CTXFAST_DEVICE uint32_t load_acquire(const uint32_t* p) { return load_relaxed(p); }
CTXFAST_DEVICE void store_relaxed(uint32_t* p, uint32_t v) { emulator::store_word(p, v); }
CTXFAST_DEVICE void store_relaxed(uint4* p, uint4 v) {
  const uint32_t values[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) emulator::store_word(&p->x + i, values[i]);
}
CTXFAST_DEVICE void cluster_sync() { emulator::cluster_barrier(); }
CTXFAST_DEVICE uint2 load_shared_relaxed(const uint2* p) {
  emulator::yield();
  return make_uint2(emulator::load_word(&p->x), emulator::load_word(&p->y));
}
CTXFAST_DEVICE void store_shared_relaxed(uint2* p, uint2 v) {
  emulator::store_word(&p->x, v.x);
  emulator::store_word(&p->y, v.y);
}
CTXFAST_DEVICE void store_remote(uint2* p, int rank, uint2 v) {
  store_shared_relaxed(static_cast<uint2*>(emulator::in_cluster(p, rank)), v);
}
CTXFAST_DEVICE void fence() { emulator::flush_stores(); }
CTXFAST_DEVICE void store_release(uint32_t* p, uint32_t v) {
  emulator::flush_stores();
  emulator::store_word(p, v);
}
CTXFAST_DEVICE float load_constant(const float* p) { return *p; }
CTXFAST_DEVICE uint2 load_streaming(const uint2* p) { return *p; }
CTXFAST_DEVICE uint4 load_streaming(const uint4* p) { return *p; }
CTXFAST_DEVICE void prefetch_l2(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }

CTXFAST_DEVICE void copy_async_16(void* shared, const void* global) { emulator::copy_later(shared, global); }
CTXFAST_DEVICE void copy_async_commit() { emulator::commit_copies(); }
template <int N>
CTXFAST_DEVICE void copy_async_wait() {
  emulator::wait_copies(N);
}

CTXFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated::ldmatrix<4, false>(r, row); }
CTXFAST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) { emulated::ldmatrix<2, false>(r, row); }
CTXFAST_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulated::ldmatrix<4, true>(r, row); }

template <typename T>
CTXFAST_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulated::Mma mine{d, a, b};
  emulator::together(32, &mine, [](void** all) {
    const auto lane_of = [&](int lane) { return static_cast<emulated::Mma*>(all[lane]); };
    const uint32_t* registers[32];
    float a_of[16][16], b_of[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      registers[lane] = lane_of(lane)->a;
      for (int i = 0; i < 2; ++i) {
        for (int e = 0; e < 2; ++e) {
          b_of[2 * (lane % 4) + e + 8 * i][lane / 4] = emulated::element<T>(lane_of(lane)->b[i], e);
        }
      }
    }
    emulated::unfold_a<T>(registers, a_of);
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < 4; ++j) {
        const int row = lane / 4 + 8 * (j >> 1), column = 2 * (lane % 4) + (j & 1);
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a_of[row][k] * b_of[k][column];
        lane_of(lane)->d[j] += sum;
      }
    }
  });
}

CTXFAST_DEVICE uint64_t wgmma_descriptor(const void* shared, uint32_t k_stride_bytes, uint32_t row_stride_bytes) {
  const auto at = static_cast<uint64_t>(static_cast<const unsigned char*>(shared) - emulator::place().shared);
  return (at & 0x3FFFF) >> 4 | static_cast<uint64_t>(k_stride_bytes >> 4) << 16 |
         static_cast<uint64_t>(row_stride_bytes >> 4) << 32;
}
CTXFAST_DEVICE void wgmma_fence() {
  emulator::together(128, nullptr, [](void**) { emulator::warpgroup().fenced = true; });
}
CTXFAST_DEVICE void wgmma_commit() {
  emulator::together(128, nullptr, [](void**) {
    emulator::Warpgroup& group = emulator::warpgroup();
    group.committed.push_back(std::move(group.open));
    group.open.clear();
  });
}
template <int N>
CTXFAST_DEVICE void wgmma_wait() {
  emulator::together(128, nullptr, [](void**) { emulated::finish_products(N); });
}
template <typename T, int N>
CTXFAST_DEVICE void wgmma_rs(float (&d)[N / 8][4], const uint4& a, uint64_t b) {
  const uint32_t registers[4] = {a.x, a.y, a.z, a.w};
  emulated::wgmma<T, N>(d, registers, 0, b);
}
template <typename T, int N>
CTXFAST_DEVICE void wgmma_ss(float (&d)[N / 8][4], uint64_t a, uint64_t b) {
  emulated::wgmma<T, N>(d, nullptr, a, b);
}
CTXFAST_DEVICE void shared_written() {}

inline void trap_with(int code, int value) {
  emulator::fail("the kernel stopped itself: code " + std::to_string(code) + ", value " + std::to_string(value));
}
inline void trap_silently(int code, int value) { trap_with(code, value); }
CTXFAST_DEVICE uint32_t spin_begins() { return 0; }
CTXFAST_DEVICE bool spun_out(uint32_t) { return emulator::nobody_goes_on(); }
CTXFAST_DEVICE long long cycles() { return 0; }
CTXFAST_DEVICE void nanosleep(unsigned) { emulator::yield(); }
CTXFAST_DEVICE uint32_t max3(uint32_t a, uint32_t b, uint32_t c) { return std::max({a, b, c}); }
CTXFAST_DEVICE float clipped(float x, float bound) { return x > bound ? bound : x < -bound ? -bound : x; }
CTXFAST_DEVICE float exp_fast(float x) { return std::exp(x); }
CTXFAST_DEVICE float tanh_fast(float x) { return std::tanh(x); }

}  // namespace ctxfast
