// SPDX-License-Identifier: Apache-2.0
// The device instructions that ctxfast's kernels are written in, one function each.
//
// Two meanings, one spelling: nvcc makes PTX of them; a C++ compiler with -DCTXFAST_EMULATE makes calls into the
// emulator of csrc/emulator, which runs the very kernel source on the CPU. So a kernel uses these functions only,
// takes its shared memory from shared_memory(), and one plain struct as its parameter.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#ifdef CTXFAST_EMULATE
#include "emulator/device.h"
#else

#include <cstdio>

#define CTXFAST_DEVICE __device__ __forceinline__

namespace ctxfast {

// --- where a thread is

CTXFAST_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
CTXFAST_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
CTXFAST_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
CTXFAST_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
CTXFAST_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
CTXFAST_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }
CTXFAST_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31); }
CTXFAST_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }

// The block's dynamic shared memory.
CTXFAST_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char ctxfast_shared[];
  return ctxfast_shared;
}

// --- threads together; every lane of a warp takes part in warp operations

constexpr unsigned kAllLanes = 0xffffffffu;

CTXFAST_DEVICE void warp_sync() { __syncwarp(); }
CTXFAST_DEVICE void block_sync() { __syncthreads(); }
CTXFAST_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <typename V>
CTXFAST_DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <typename V>
CTXFAST_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}
template <typename V>
CTXFAST_DEVICE V shuffle_down(V value, int delta) {
  return __shfl_down_sync(kAllLanes, value, delta);
}
CTXFAST_DEVICE bool any_sync(bool value) { return __any_sync(kAllLanes, value); }
CTXFAST_DEVICE bool all_sync(bool value) { return __all_sync(kAllLanes, value); }

// --- memory that blocks exchange: relaxed at GPU scope; a 16-byte access is four accesses of a word, in any order

CTXFAST_DEVICE uint4 load_relaxed(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
CTXFAST_DEVICE uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
CTXFAST_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
CTXFAST_DEVICE void store_relaxed(uint4* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
CTXFAST_DEVICE void store_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
CTXFAST_DEVICE void store_release(uint32_t* p, uint32_t v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
CTXFAST_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// --- shared memory that the blocks of a cluster exchange (Hopper): relaxed at the cluster's scope, a word at a time

// All threads of all blocks of the cluster; what each wrote before it all see after it.
CTXFAST_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
CTXFAST_DEVICE uint2 load_shared_relaxed(const uint2* p) {
  uint2 v;
  asm volatile("ld.relaxed.cluster.shared.v2.u32 {%0,%1}, [%2];"
               : "=r"(v.x), "=r"(v.y)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
  return v;
}
CTXFAST_DEVICE void store_shared_relaxed(uint2* p, uint2 v) {
  asm volatile(
      "st.relaxed.cluster.shared.v2.u32 [%0], {%1,%2};" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))),
      "r"(v.x), "r"(v.y)
      : "memory");
}
// To the place in the shared memory of the cluster's block `rank` that p is in this block's.
CTXFAST_DEVICE void store_remote(uint2* p, int rank, uint2 v) {
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "st.relaxed.cluster.shared::cluster.v2.u32 [there], {%2,%3};\n}" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(p))),
      "r"(rank), "r"(v.x), "r"(v.y)
      : "memory");
}

// What no thread writes while the kernel runs.
CTXFAST_DEVICE float load_constant(const float* p) { return __ldg(p); }
// Read once: does not displace what the caches should keep.
CTXFAST_DEVICE uint2 load_streaming(const uint2* p) { return __ldcs(p); }
CTXFAST_DEVICE uint4 load_streaming(const uint4* p) { return __ldcs(p); }
CTXFAST_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// --- copies from global to shared memory that run on beside the thread

CTXFAST_DEVICE void copy_async_16(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
CTXFAST_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are under way.
template <int N>
CTXFAST_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- matrix products

// Fragments of 8x8 matrices of 16-bit elements: lane 8 i + j gives the address of row j (16 bytes) of matrix i.
CTXFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
CTXFAST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
CTXFAST_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), registers as PTX's mma.m16n8k16 has them; T is __half or __nv_bfloat16.
template <typename T>
CTXFAST_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
CTXFAST_DEVICE void mma_16x8x16<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
CTXFAST_DEVICE void mma_16x8x16<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace ctxfast

#include "base/wgmma.cuh"

namespace ctxfast {

// --- the rest

// Says once what went wrong and where, then stops the kernel. For what cannot happen unless the machine breaks a
// promise: a block that was never scheduled, a peer that died.
static __device__ __noinline__ void trap_with(int code, int value) {
  printf("ctxfast: a kernel stopped itself: code %d, value %d, block (%u, %u), thread %u.\n", code, value, blockIdx.x,
         blockIdx.y, threadIdx.x);
  __trap();
}

// For kernels with wgmma, silent: a function call anywhere in one makes ptxas wait for every product. To debug one,
// compile it with -DCTXFAST_TRAPS_SPEAK: slower, and it says what happened.
CTXFAST_DEVICE void trap_silently([[maybe_unused]] int code, [[maybe_unused]] int value) {
#ifdef CTXFAST_TRAPS_SPEAK
  trap_with(code, value);
#else
  asm volatile("trap;");
#endif
}

// The end of a spin: a peer answers within microseconds or never; but a kernel on another stream, or another process,
// may hold multiprocessors that its block needs. Reading the clock costs a poll nothing; a count would end a spin
// sooner the faster its memory answers.
CTXFAST_DEVICE uint32_t spin_begins() {
  uint32_t high;
  asm volatile("mov.u32 %0, %%clock_hi;" : "=r"(high)::"memory");
  return high;
}
// After 4 to 5 times 2^32 cycles: about 10 seconds at 1.98 GHz.
CTXFAST_DEVICE bool spun_out(uint32_t began) { return spin_begins() - began > 4; }

CTXFAST_DEVICE long long cycles() { return clock64(); }
CTXFAST_DEVICE void nanosleep(unsigned ns) { __nanosleep(ns); }

CTXFAST_DEVICE uint32_t max3(uint32_t a, uint32_t b, uint32_t c) { return __vimax3_u32(a, b, c); }
// The nearest of -bound .. bound; NaN stays NaN.
CTXFAST_DEVICE float clipped(float x, float bound) {
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-bound));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));
  return x;
}
CTXFAST_DEVICE float exp_fast(float x) { return __expf(x); }
CTXFAST_DEVICE float tanh_fast(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace ctxfast

#endif  // CTXFAST_EMULATE

namespace ctxfast {

CTXFAST_DEVICE float sigmoid_fast(float x) { return 0.5f * tanh_fast(0.5f * x) + 0.5f; }
CTXFAST_DEVICE float tanh_exact(float x) { return tanhf(x); }
CTXFAST_DEVICE float sigmoid_exact(float x) { return 1.0f / (1.0f + expf(-x)); }

CTXFAST_DEVICE float to_float(float x) { return x; }
CTXFAST_DEVICE float to_float(__half x) { return __half2float(x); }
CTXFAST_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
CTXFAST_DEVICE T from_float(float x);
template <>
CTXFAST_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
CTXFAST_DEVICE __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
CTXFAST_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T>
CTXFAST_DEVICE float bits_to_float(uint16_t bits) {
  T value;
  memcpy(static_cast<void*>(&value), &bits, sizeof(bits));
  return to_float(value);
}

// Two 16-bit values in a word, the first in its low half.
template <typename T>
CTXFAST_DEVICE uint32_t pack2(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}
template <typename T>
CTXFAST_DEVICE float2 unpack2(uint32_t word) {
  T pair[2];
  memcpy(static_cast<void*>(pair), &word, sizeof(word));
  return make_float2(to_float(pair[0]), to_float(pair[1]));
}

}  // namespace ctxfast
