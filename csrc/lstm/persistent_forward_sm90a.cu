// SPDX-License-Identifier: Apache-2.0
// Plan and launcher of the persistent forward recurrence. The kernel: persistent_forward.cuh.
#include <algorithm>
#include <cmath>

#include "base/checks.h"
#include "base/launch.cuh"
#include "lstm/persistent_forward.cuh"
#include "lstm/persistent_forward.h"

namespace ctxfast {
namespace {

using namespace lstm_forward;

constexpr const char* kOp = "lstm";
constexpr int64_t kMaxBatch = 128;
constexpr int64_t kVector = 16;  // bytes

struct Shape {
  int cells = 0, blocks = 0, tiles = 0;  // tiles of 8 rows at once
  bool in_registers = false, in_pairs = false;
  SharedPlaces at = {};
};

// Cells of a block, the preferred first. With a projection large blocks: each then has rows of it. Without, small ones:
// less work between two exchanges.
constexpr int kCells[2][3] = {{16, 32, 64}, {64, 32, 16}};
constexpr bool are_powers_of_2() {
  for (const auto& row : kCells) {
    for (const int cells : row) {
      if (cells & (cells - 1)) return false;
    }
  }
  return true;
}
static_assert(are_powers_of_2(), "the kernel divides by shifts");

// The first shape that fits: many rows at once before few, and cells as preferred. cells = 0: none.
Shape choose(const LstmPersistentDevice& device, int64_t batch, int64_t hidden, int64_t size, bool projected,
             int64_t directions) {
  for (int tiles = batch > 16 ? 4 : batch > 8 ? 2 : 1; tiles >= 1; tiles /= 2) {
    for (const int cells : kCells[projected]) {
      if (hidden % cells != 0 || hidden / cells * directions > device.multiprocessors) continue;
      if (projected && size / 8 > hidden / cells) continue;
      if (tiles > 1 && size / 32 % (64 / cells) != 0) continue;  // K groups take equal parts
      if (tiles == 1 && ceil_div(size / 32, 256 / cells) > kMmaPairs) continue;
      const int blocks = static_cast<int>(hidden / cells);
      const bool may_keep = projected && tiles > 1 && cells == 64 && size >= 16 * kRegisterFragments;
      const bool may_pair =
          projected && tiles == 4 && hidden % 64 == 0 && blocks % 2 == 0 && blocks / 2 * directions <= device.pairs;
      for (int kept = 0; kept <= int{may_keep}; ++kept) {
        for (int paired = int{may_pair}; paired >= 0; --paired) {
          const SharedPlaces at = places_of(static_cast<int>(hidden), static_cast<int>(size), projected, cells, tiles,
                                            kept != 0, paired != 0);
          if (at.end <= device.shared_per_block) return {cells, blocks, tiles, kept != 0, paired != 0, at};
        }
      }
    }
  }
  return {};
}

std::string refusal_of(const LstmPersistentDevice& device, int64_t batch, int64_t hidden, int64_t size, bool projected,
                       int64_t directions) {
  const std::string sizes = "hidden_size " + std::to_string(hidden) + " and proj_size " + std::to_string(size);
  if (device.major != 9) {
    return "it needs a Hopper GPU (compute capability 9.0) and this one has " + std::to_string(device.major) + "." +
           std::to_string(device.minor) + ".";
  }
  if (!device.cooperative) return "this device has no cooperative launch (all blocks resident at once).";
  if (directions < 1 || directions > 2) return "it runs one or two directions, not " + std::to_string(directions) + ".";
  if (batch > kMaxBatch)
    return "it takes at most " + std::to_string(kMaxBatch) + " rows, not " + std::to_string(batch) + ".";
  if (hidden < 32 || hidden % 32 != 0 || size < 32 || size % 32 != 0) {
    return "it takes sizes in multiples of 32, not " + sizes + ".";
  }
  if (!projected && hidden != size)
    return "without a projection h has as many values as there are cells; got " + sizes + ".";
  if (choose(device, batch, hidden, size, projected, directions).cells == 0) {
    return "the weights of " + sizes + " in " + std::to_string(directions) + " directions do not fit on the chip (" +
           std::to_string(device.multiprocessors) + " multiprocessors, " + std::to_string(device.shared_per_block) +
           " bytes of shared memory each).";
  }
  return "";
}

int64_t slots_bytes(const Shape& shape, int64_t values, int64_t directions) {
  return directions * kSlots * (values / 32) * shape.tiles * 32 * kVector;
}

bool are_multiples(const int64_t (&strides)[2], int64_t of) { return strides[0] % of == 0 && strides[1] % of == 0; }

// The kernel has 32 bits for them, in units of `of` elements.
bool fit(const int64_t (&strides)[2], int64_t of) {
  const auto fits = [of](int64_t stride) { return stride >= 0 && stride / of <= int64_t{0xFFFFFFFF}; };
  return fits(strides[0]) && fits(strides[1]);
}

Status check(const LstmPersistentForwardParams& p, const LstmPersistentForwardPlan& plan) {
  if (!plan.refusal.empty()) return runtime_error(kOp, "the persistent recurrence cannot run this: " + plan.refusal);
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "dtype", p.dtype, {DType::kFloat16, DType::kBFloat16}));
  CTXFAST_RETURN_IF_ERROR(check_sizes(
      kOp,
      {{"batch", p.batch, 1}, {"steps", p.steps, 1}, {"workspace_bytes", p.workspace_bytes, plan.workspace_bytes}}));
  for (int64_t r = 0; r < p.directions; ++r) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"gates", p.gates[r], true, 4},
                                                  {"weight_hh", p.weight_hh[r], true, 16},
                                                  {"weight_proj", p.weight_proj[r], p.has_proj, 16}}));
    if (!are_multiples(p.gates_strides[r], 2)) return invalid(kOp, "a stride of gates", "odd", "even");
    if (!fit(p.gates_strides[r], 2)) return invalid(kOp, "a stride of gates", "negative or too large", "0 to 2^33");
    if (!are_multiples({p.weight_hh_stride[r], p.weight_proj_stride[r]}, 8)) {
      return invalid(kOp, "a weight's stride", "no multiple of 8 elements", "one");
    }
  }
  if (!are_multiples(p.output_strides, 8)) {
    return invalid(kOp, "a stride of output", "no multiple of 8 elements", "one");
  }
  if (!fit(p.output_strides, 8)) return invalid(kOp, "a stride of output", "negative or too large", "0 to 2^35");
  return check_addresses(kOp, {{"output", p.output, true, 16},
                               {"h_0", p.h_0, false, 16},
                               {"h_n", p.h_n, true, 16},
                               {"c_n", p.c_n},
                               {"workspace", p.workspace, true, 16}});
}

template <typename T, int kTiles, bool kProjected, bool kInRegisters, bool kInPairs, typename Sizes>
Status launch_kernel(const Shape& shape, const Tensors& tensors, const Sizes& sizes, CUstream_st* stream) {
  const auto kernel = lstm_persistent_forward_kernel<T, kTiles, kProjected, kInRegisters, kInPairs, Sizes>;
  LaunchConfig config;
  CTXFAST_RETURN_IF_ERROR(cooperative_config(kOp, "the persistent recurrence", "Pass impl='cuda_step'.", kernel,
                                             tensors.directions * shape.blocks, kThreads, shape.at.end, &config,
                                             kInPairs ? 2 : 1));
  CTXFAST_CUDA_CHECK(kOp, launch(kernel, config, stream, KernelParams<Sizes>{tensors, sizes}));
  return {};
}

template <typename T, int kTiles, bool kInPairs>
Status launch_tiles(const LstmPersistentForwardParams& p, const Shape& shape, const Tensors& tensors,
                    CUstream_st* stream) {
  using Elmo = ElmoSizes<kTiles, kInPairs>;
  if (p.has_proj && p.hidden == Elmo::hidden && p.size == Elmo::size && shape.cells == 4 * Elmo::row_tiles &&
      shape.in_registers == Elmo::in_registers) {
    return launch_kernel<T, kTiles, true, Elmo::in_registers, kInPairs>(shape, tensors, Elmo{}, stream);
  }
  AnySizes sizes = {};
  sizes.hidden = static_cast<int>(p.hidden), sizes.size = static_cast<int>(p.size);
  sizes.row_tiles = shape.cells / 4;  // 4, 8 or 16
  while (1 << sizes.row_shift < sizes.row_tiles) ++sizes.row_shift;
  sizes.pairs = sizes.size / 32;
  sizes.cell_pairs = p.has_proj ? sizes.hidden / 32 : 0;
  sizes.at = shape.at;
  if constexpr (!kInPairs) {
    if (!p.has_proj) return launch_kernel<T, kTiles, false, false, false>(shape, tensors, sizes, stream);
  }
  if constexpr (kTiles > 1) {
    if (shape.in_registers) return launch_kernel<T, kTiles, true, true, kInPairs>(shape, tensors, sizes, stream);
  }
  return launch_kernel<T, kTiles, true, false, kInPairs>(shape, tensors, sizes, stream);
}

template <typename T>
Status launch_dtype(const LstmPersistentForwardParams& p, const Shape& shape, const Tensors& tensors,
                    CUstream_st* stream) {
  if (shape.tiles == 1) return launch_tiles<T, 1, false>(p, shape, tensors, stream);
  if (shape.tiles == 2) return launch_tiles<T, 2, false>(p, shape, tensors, stream);
  if (shape.in_pairs) return launch_tiles<T, 4, true>(p, shape, tensors, stream);
  return launch_tiles<T, 4, false>(p, shape, tensors, stream);
}

float bound(float clip) { return clip > 0 ? clip : INFINITY; }

}  // namespace

LstmPersistentForwardPlan lstm_persistent_forward_plan(const LstmPersistentDevice& device, int64_t batch,
                                                       int64_t hidden, int64_t size, bool has_proj,
                                                       int64_t directions) {
  LstmPersistentForwardPlan plan;
  plan.refusal = refusal_of(device, batch, hidden, size, has_proj, directions);
  if (!plan.refusal.empty()) return plan;
  const Shape shape = choose(device, batch, hidden, size, has_proj, directions);
  plan.cells = shape.cells;
  plan.blocks = shape.blocks;
  plan.tile_rows = 8 * shape.tiles;
  plan.in_pairs = shape.in_pairs;
  plan.shared_bytes = shape.at.end;
  plan.workspace_bytes = slots_bytes(shape, size, directions) + (has_proj ? slots_bytes(shape, hidden, directions) : 0);
  return plan;
}

Status lstm_persistent_device(int device, LstmPersistentDevice* facts) {
  DeviceFacts properties;
  CTXFAST_CUDA_CHECK(kOp, device_facts(device, &properties));
  *facts = {properties.multiprocessors,  properties.major,       properties.minor,
            properties.shared_per_block, properties.cooperative, 0};
  if (properties.major != 9) return {};
  // Asked of the largest kernel that runs in pairs, whose blocks have a multiprocessor each.
  using Sizes = ElmoSizes<4, true>;
  const auto kernel = lstm_persistent_forward_kernel<__half, 4, true, Sizes::in_registers, true, Sizes>;
  LaunchConfig config{dim3(2), kThreads, static_cast<size_t>(Sizes::at.end)};
  config.cluster = 2;
  int before = 0, blocks = 0;
  CTXFAST_CUDA_CHECK(kOp, cudaGetDevice(&before));
  CTXFAST_CUDA_CHECK(kOp, cudaSetDevice(device));
  const cudaError_t error = resident_blocks(kernel, config, &blocks);
  CTXFAST_CUDA_CHECK(kOp, cudaSetDevice(before));
  CTXFAST_CUDA_CHECK(kOp, error);
  facts->pairs = blocks / 2;
  return {};
}

Status lstm_persistent_forward(const LstmPersistentForwardParams& p, CUstream_st* stream) {
  const LstmPersistentForwardPlan plan =
      lstm_persistent_forward_plan(p.device, p.batch, p.hidden, p.size, p.has_proj, p.directions);
  const Status status = check(p, plan);
  if (!status.ok()) return status;
  const Shape shape = choose(p.device, p.batch, p.hidden, p.size, p.has_proj, p.directions);

  Tensors k = {};
  k.batch = static_cast<int>(p.batch), k.steps = static_cast<int>(p.steps);
  k.directions = static_cast<int>(p.directions);
  for (int64_t r = 0; r < p.directions; ++r) {
    k.weight_hh[r] = p.weight_hh[r], k.hh_stride[r] = p.weight_hh_stride[r];
    k.weight_proj[r] = p.weight_proj[r], k.proj_stride[r] = p.weight_proj_stride[r];
    k.gates[r] = p.gates[r];
    for (int i = 0; i < 2; ++i) k.gates_strides[r][i] = static_cast<uint32_t>(p.gates_strides[r][i] / 2);
  }
  k.lengths = p.lengths, k.h_0 = p.h_0, k.c_0 = p.c_0;
  k.cell_clip = bound(p.cell_clip), k.proj_clip = bound(p.proj_clip);
  k.output = p.output, k.h_n = p.h_n, k.c_n = p.c_n, k.cells = p.cells;
  for (int i = 0; i < 2; ++i) k.output_strides[i] = static_cast<uint32_t>(p.output_strides[i] / 8);
  auto* slots = static_cast<unsigned char*>(p.workspace);
  k.h_slots = reinterpret_cast<uint4*>(slots);
  k.m_slots = reinterpret_cast<uint4*>(slots + slots_bytes(shape, p.size, p.directions));

  CTXFAST_CUDA_CHECK(kOp, clear_async(slots, 0xFF, static_cast<size_t>(plan.workspace_bytes), stream));
  return p.dtype == DType::kFloat16 ? launch_dtype<__half>(p, shape, k, stream)
                                    : launch_dtype<__nv_bfloat16>(p, shape, k, stream);
}

}  // namespace ctxfast
