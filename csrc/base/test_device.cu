// SPDX-License-Identifier: Apache-2.0
// The instructions of csrc/base/device.cuh against plain loops. On a GPU it checks the hardware's register layouts, on
// the emulator that it agrees with them, and that it notices what a kernel does wrong.

#include <cstdlib>
#include <cstring>

#include "base/device.cuh"
#include "base/launch.cuh"
#include "base/testing.cuh"

using namespace ctxfast;

constexpr const char* kProgram = CTXFAST_PROGRAM("test_device");

namespace {

constexpr int kThreads = 128;  // one warpgroup

struct ProductParams {
  const unsigned char* a;  // (64, 16), 16-bit elements
  const unsigned char* b;  // (8, 16): column by column
  float* mma;              // (64, 8)
  float* loaded;           // (64, 8): fragments by ldmatrix
  float* wgmma_shared;     // (64, 8)
  float* wgmma_registers;  // (64, 8)
  bool warpgroups;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) product_kernel(const __grid_constant__ ProductParams p) {
  unsigned char* const a_rows = shared_memory();  // (64, 16)
  unsigned char* const b_rows = a_rows + 2048;    // (8, 16)
  unsigned char* const a_core = b_rows + 256;     // 2 x 8 core matrices
  unsigned char* const b_core = a_core + 2048;    // 2 x 1
  const int thread = thread_index(), warp = warp_index(), lane = lane_index(), g = lane / 4, t = lane % 4;
  copy_async_16(a_rows + 16 * thread, p.a + 16 * thread);
  copy_async_commit();
  if (thread < 16) copy_async_16(b_rows + 16 * thread, p.b + 16 * thread);
  copy_async_commit();
  copy_async_wait<0>();
  block_sync();
  const auto* a_pieces = reinterpret_cast<const uint4*>(a_rows);  // row r, half k8: piece 2 r + k8
  reinterpret_cast<uint4*>(a_core)[thread] = a_pieces[2 * (thread % 64) + thread / 64];
  if (thread < 16) {
    reinterpret_cast<uint4*>(b_core)[thread] = reinterpret_cast<const uint4*>(b_rows)[2 * (thread % 8) + thread / 8];
  }
  shared_written();
  block_sync();

  const auto* a_words = reinterpret_cast<const uint32_t*>(a_rows);
  const auto* b_words = reinterpret_cast<const uint32_t*>(b_rows);
  const int row = 16 * warp + g;
  const uint32_t a[4] = {a_words[8 * row + t], a_words[8 * (row + 8) + t], a_words[8 * row + t + 4],
                         a_words[8 * (row + 8) + t + 4]};
  const uint32_t b[2] = {b_words[8 * g + t], b_words[8 * g + t + 4]};
  float d[4] = {}, e[4] = {};
  mma_16x8x16<T>(d, a, b);
  uint32_t la[4], lb[2];
  ldmatrix_x4(la, a_rows + 32 * (16 * warp + lane % 16) + 16 * (lane / 16));
  ldmatrix_x2(lb, b_rows + 32 * (lane % 8) + 16 * (lane / 8 % 2));
  mma_16x8x16<T>(e, la, lb);
  float ss[1][4] = {}, rs[1][4] = {};
#if defined(CTXFAST_EMULATE) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (p.warpgroups) {
    const uint64_t of_a = wgmma_descriptor(a_core, 1024, 128), of_b = wgmma_descriptor(b_core, 128, 128);
    wgmma_fence();
    wgmma_ss<T, 8>(ss, of_a, of_b);
    wgmma_rs<T, 8>(rs, make_uint4(a[0], a[1], a[2], a[3]), of_b);
    wgmma_commit();
    wgmma_wait<0>();
  }
#endif
  for (int j = 0; j < 4; ++j) {
    const int at = (row + 8 * (j / 2)) * 8 + 2 * t + j % 2;
    p.mma[at] = d[j];
    p.loaded[at] = e[j];
    p.wgmma_shared[at] = ss[0][j];
    p.wgmma_registers[at] = rs[0][j];
  }
}

struct RingParams {
  uint4* slots;     // one per block, all bits set: empty
  uint32_t* total;  // one per block
  int rounds;
};

// A token of four words goes round all blocks; it is its own flag. Each block adds its number.
__global__ void __launch_bounds__(kThreads) ring_kernel(const __grid_constant__ RingParams p) {
  const int blocks = grid_size(), me = block_index();
  constexpr uint32_t kEmpty = 0xffffffffu;
  for (int round = 0; round < p.rounds; ++round) {
    if (thread_index() == 0) {
      uint4 token = make_uint4(0, 0, 0, 0);
      if (round > 0 || me > 0) {
        const uint32_t began = spin_begins();
        do {
          token = load_relaxed(p.slots + me);
          if (spun_out(began)) trap_with(1, me);
        } while (token.x == kEmpty || token.y == kEmpty || token.z == kEmpty || token.w == kEmpty);
        // Nobody writes here again before the token has gone all the way round.
        store_relaxed(p.slots + me, make_uint4(kEmpty, kEmpty, kEmpty, kEmpty));
        fence();
      }
      token.x += me;
      token.y += 1;
      token.z += any_sync(true) ? 2 : 0;
      if (me + 1 < blocks || round + 1 < p.rounds) store_relaxed(p.slots + (me + 1) % blocks, token);
      p.total[me] = token.x + token.y;
    } else if (thread_index() < 32) {
      any_sync(false);
    }
    block_sync();
  }
}

struct LaneParams {
  float* out;  // (3, 32)
};

__global__ void __launch_bounds__(32) lanes_kernel(const __grid_constant__ LaneParams p) {
  const int lane = lane_index();
  p.out[lane] = shuffle_xor(static_cast<float>(lane), 5);
  p.out[32 + lane] = shuffle(static_cast<float>(lane * lane), (lane + 3) % 32);
  p.out[64 + lane] = shuffle_down(static_cast<float>(lane), 8);
}

template <typename T>
void products(Report* report, const char* name, bool warpgroups) {
  Random random(7);
  std::vector<T> a(64 * 16), b(8 * 16);
  for (T& value : a) value = T(random.uniform(1));
  for (T& value : b) value = T(random.uniform(1));
  auto* device_a = device_bytes<unsigned char>(2048, 0);
  auto* device_b = device_bytes<unsigned char>(256, 0);
  must(cudaMemcpy(device_a, a.data(), 2048, cudaMemcpyHostToDevice));
  must(cudaMemcpy(device_b, b.data(), 256, cudaMemcpyHostToDevice));
  ProductParams params{device_a,
                       device_b,
                       device_bytes<float>(512, 0xff),
                       device_bytes<float>(512, 0xff),
                       device_bytes<float>(512, 0xff),
                       device_bytes<float>(512, 0xff),
                       warpgroups};
  must(launch(product_kernel<T>, LaunchConfig{dim3(1), kThreads, 4608}, nullptr, params));
  must(cudaDeviceSynchronize());
  std::vector<double> want(512);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 8; ++column) {
      for (int k = 0; k < 16; ++k) {
        want[8 * row + column] += double(to_float(a[16 * row + k])) * double(to_float(b[16 * column + k]));
      }
    }
  }
  report->near(std::string(name) + " mma", to_host(params.mma, 512), want, 1e-5);
  report->near(std::string(name) + " ldmatrix", to_host(params.loaded, 512), want, 1e-5);
  if (!warpgroups) return;
  report->near(std::string(name) + " wgmma, a in shared memory", to_host(params.wgmma_shared, 512), want, 1e-5);
  report->near(std::string(name) + " wgmma, a in registers", to_host(params.wgmma_registers, 512), want, 1e-5);
}

void ring(Report* report, int blocks) {
  const int rounds = 3;
  RingParams params{device_bytes<uint4>(blocks, 0xff), device_bytes<uint32_t>(blocks, 0), rounds};
  must(launch(ring_kernel, LaunchConfig{dim3(blocks), kThreads, 0, true}, nullptr, params));
  must(cudaDeviceSynchronize());
  const uint32_t each = blocks * (blocks - 1) / 2;
  report->that("ring of " + std::to_string(blocks),
               to_host(params.total, blocks).back() == static_cast<uint32_t>(rounds) * (each + blocks));
}

void lanes(Report* report) {
  LaneParams params{device_bytes<float>(96, 0xff)};
  must(launch(lanes_kernel, LaunchConfig{dim3(1), 32}, nullptr, params));
  must(cudaDeviceSynchronize());
  std::vector<double> want(96);
  for (int lane = 0; lane < 32; ++lane) {
    want[lane] = lane ^ 5;
    want[32 + lane] = ((lane + 3) % 32) * ((lane + 3) % 32);
    want[64 + lane] = lane + 8 < 32 ? lane + 8 : lane;
  }
  report->near("shuffles", to_host(params.out, 96), want, 0);
}

struct PairParams {
  uint32_t* taken;  // (blocks, kThreads): words that a thread got as they were sent
  int rounds;
};

// The two blocks of a cluster send each other words in turn, through shared memory; each is its own flag. Who takes a
// word empties its place, and fences before it sends the next: so the other's next word comes after.
__global__ void __launch_bounds__(kThreads) pair_kernel([[maybe_unused]] const __grid_constant__ PairParams p) {
#if defined(CTXFAST_EMULATE) || __CUDA_ARCH__ >= 900
  const int thread = thread_index(), rank = block_index() & 1;
  const uint2 empty = make_uint2(0xffffffffu, 0xffffffffu);
  uint2* const place = reinterpret_cast<uint2*>(shared_memory()) + thread;
  store_shared_relaxed(place, empty);
  cluster_sync();
  uint32_t taken = 0;
  for (int round = 0; round < p.rounds; ++round) {
    const uint32_t word = 1 + block_index() / 2 * 1000000 + thread * 1000 + round;
    if (rank == (round & 1)) {
      fence();
      store_remote(place, rank ^ 1, make_uint2(word, ~word));
      continue;
    }
    uint2 got = empty;
    for (const uint32_t began = spin_begins(); got.x == empty.x || got.y == empty.y;) {
      got = load_shared_relaxed(place);
      if (spun_out(began)) trap_with(4, round);
    }
    store_shared_relaxed(place, empty);
    taken += got.x == word && got.y == ~word;
  }
  p.taken[block_index() * kThreads + thread] = taken;
#endif
}

void pairs(Report* report, int blocks, int rounds) {
  LaunchConfig config{dim3(blocks), kThreads, kThreads * sizeof(uint2), true, 2};
  int resident = 0;
  must(resident_blocks(pair_kernel, config, &resident));
  report->that("blocks resident in pairs: " + std::to_string(resident), resident >= blocks && resident % 2 == 0);
  PairParams params{device_bytes<uint32_t>(blocks * kThreads, 0), rounds};
  must(launch(pair_kernel, config, nullptr, params));
  must(cudaDeviceSynchronize());
  bool all = true;
  for (const uint32_t taken : to_host(params.taken, blocks * kThreads)) {
    all = all && taken == static_cast<uint32_t>(rounds) / 2;
  }
  report->that("pairs: every word as it was sent", all);
}

// What a call of a large size allowed, a call of a smaller one does not take away: between the first one's question and
// its launch, another thread may do either.
void shared_limits(Report* report, int most) {
  int blocks = 0;
  for (const size_t bytes : {size_t{96 * 1024}, size_t{64 * 1024}, size_t{1024}}) {
    must(resident_blocks(lanes_kernel, LaunchConfig{dim3(1), 32, bytes}, &blocks));
    report->that("a block of " + std::to_string(bytes) + " bytes is resident", blocks > 0);
    LaneParams params{device_bytes<float>(96, 0xff)};
    must(launch(lanes_kernel, LaunchConfig{dim3(1), 32, bytes}, nullptr, params));
    cudaFuncAttributes attributes;
    must(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(lanes_kernel)));
    report->that("after it a block may have all shared memory", attributes.maxDynamicSharedSizeBytes == most);
  }
  must(cudaDeviceSynchronize());
}

#ifdef CTXFAST_EMULATE
struct Wrong {
  int kind;
  uint4* memory;
};

void wrong_kernel(Wrong p) {
  if (p.kind == 0 && thread_index() != 3) block_sync();
  if (p.kind == 1) *reinterpret_cast<uint32_t*>(shared_memory() + 64) = 1;
  if (p.kind == 2) copy_async_16(shared_memory(), p.memory);
  if (p.kind == 3) {
    const uint32_t began = spin_begins();
    while (load_relaxed(&p.memory->x) != 7) {
      if (spun_out(began)) trap_with(3, 7);
    }
  }
  if (p.kind == 4 && lane_index() < 16) {
    any_sync(true);
  } else if (p.kind == 4) {
    shuffle_xor(1.0f, 1);
  }
  if (p.kind >= 7) {
    const int rank = block_index() & 1;
    if (p.kind == 8) cluster_sync();
    for (int i = 0; i < 500 && rank == 0; ++i) load_relaxed(&p.memory->x);  // the other block ends meanwhile
    if (rank == 0) store_remote(reinterpret_cast<uint2*>(shared_memory()), 1, make_uint2(1, 1));
  } else if (p.kind >= 5) {
    float d[1][4] = {};
    if (p.kind == 6) wgmma_fence();
    wgmma_ss<__half, 8>(d, wgmma_descriptor(shared_memory(), 1024, 128), wgmma_descriptor(shared_memory(), 128, 128));
    wgmma_commit();
  }
}

struct LateParams {
  float* out;  // (128, 2): one of a thread's sums before its products were waited for, and after
};

// Products of halves of 1, and what a kernel must not do: d is read, and b is overwritten by 2, before they end.
void late_kernel(LateParams p) {
  const int thread = thread_index();
  auto* const values = reinterpret_cast<__half*>(shared_memory());  // a: (64, 16), then b: (8, 16)
  for (int i = thread; i < 72 * 16; i += 128) values[i] = __half(1.0f);
  shared_written();
  block_sync();
  float d[1][4] = {};
  wgmma_fence();
  wgmma_ss<__half, 8>(d, wgmma_descriptor(values, 1024, 128), wgmma_descriptor(values + 64 * 16, 128, 128));
  wgmma_commit();
  p.out[2 * thread] = d[0][0];
  values[64 * 16 + thread] = __half(2.0f);
  block_sync();
  wgmma_wait<0>();
  p.out[2 * thread + 1] = d[0][0];
}

// What a kernel gets wrong must be seen, or the tests above and the kernels' own would prove little.
void notices(Report* report) {
  uint4 memory = {};
  const char* const expected[] = {
      "waits for others",    "past its 64 bytes",        "never waited for",   "code 3", "different operations",
      "without wgmma_fence", "products it never waited", "may not have begun", "ended"};
  for (int kind = 0; kind < 9; ++kind) {
    LaunchConfig config = {dim3(1), kind < 5 ? 32u : 128u, kind < 5 ? size_t{64} : size_t{4096}};
    if (kind >= 7) config.grid = dim3(2), config.cooperative = true, config.cluster = 2;
    const cudaError_t error = launch(wrong_kernel, config, nullptr, Wrong{kind, &memory});
    report->that(std::string("notices: ") + expected[kind] + "; says: " + cudaGetErrorString(error),
                 error != cudaSuccess && std::strstr(cudaGetErrorString(error), expected[kind]) != nullptr);
  }
  std::vector<float> out(256);
  must(launch(late_kernel, LaunchConfig{dim3(1), 128, 4096}, nullptr, LateParams{out.data()}));
  for (int thread = 0; thread < 128; ++thread) {
    const bool was_nan = std::isnan(out[2 * thread]), is_late = out[2 * thread + 1] == 32;
    if (!was_nan || !is_late || thread == 0) report->that("notices: products run late", was_nan && is_late);
  }
}
#endif

}  // namespace

int main() {
  Report report;
  if (!has_gpu(kProgram)) return 0;
  DeviceFacts facts;
  must(device_facts(0, &facts));
  const bool warpgroups = facts.major == 9;
  shared_limits(&report, facts.shared_per_block);
#ifdef CTXFAST_EMULATE
  for (const uint64_t seed : {0, 1, 2}) {
    emulator::set_schedule(seed);
    notices(&report);
#else
  {
#endif
    products<__half>(&report, "fp16", warpgroups);
    products<__nv_bfloat16>(&report, "bf16", warpgroups);
    ring(&report, 2);
    ring(&report, 60);
    lanes(&report);
    if (warpgroups) pairs(&report, 6, 20);
  }
  return report.finish(kProgram);
}
