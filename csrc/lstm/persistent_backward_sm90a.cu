// SPDX-License-Identifier: Apache-2.0
// Plan and launcher of the persistent backward recurrence. The kernel and its argument:
// persistent_backward.cuh.
#include <algorithm>

#include "base/checks.h"
#include "base/launch.cuh"
#include "lstm/persistent_backward.cuh"
#include "lstm/persistent_backward.h"

namespace ctxfast {
namespace {

using namespace lstm_backward;

constexpr const char* kOp = "lstm";
constexpr int kRegisterPairs = 4;            // kpairs of the weights a warp keeps in registers, where it must
constexpr int64_t kVector = 16;              // bytes
constexpr int64_t kSharedBytes = 232448;     // of a block on Hopper
constexpr int64_t kFlagBytes = 512;          // the `cleared` words of both directions, at the workspace's end
constexpr int64_t kZeroBytes = 64;           // zeros behind them
constexpr int64_t kGatherBytes = 64 * 1024;  // dz of one step that a block may read whole to save an exchange

// Everything about a call that its sizes decide.
struct Shape {
  bool projected = false;
  int columns = 1, tiles = 1;  // of 8 batch rows, see the kernel
  int rows = 4;                // tiles of 16 rows of dh of a block
  int registers = 0;           // kRegisterPairs or 0
  int blocks = 0, k_groups = 0, row_pairs = 0, cell_pairs = 0;
  int64_t x_bytes = 0, d_bytes = 0, s_bytes = 0;  // of both directions
  int64_t shared_bytes = 0;
};

Shape shape_of(int64_t batch, int64_t hidden, int64_t size, bool projected, int64_t directions) {
  Shape shape;
  shape.projected = projected;
  shape.columns = batch <= 8 ? 1 : 2;
  shape.tiles = batch <= 16 ? 1 : 2;
  const int64_t columns = 8 * shape.columns * shape.tiles;
  if (projected) {
    shape.k_groups = static_cast<int>(hidden / size);
    shape.blocks = static_cast<int>(hidden / 64);
    shape.cell_pairs = static_cast<int>(size / 32);
  } else {
    // Few bytes: every block reads all dz and finishes its own dh. Many: K groups and one more exchange.
    const bool gather = 4 * hidden * columns * 2 <= kGatherBytes;
    shape.rows = gather ? 1 : 4;
    shape.k_groups = gather ? 1 : 4;
    shape.blocks = static_cast<int>(hidden / 16);
  }
  shape.row_pairs = static_cast<int>(hidden / 8 / shape.k_groups);
  const int64_t row_bytes = int64_t{shape.row_pairs} * 2 * shape.rows * 32 * kVector;
  const int64_t cell_bytes = int64_t{shape.cell_pairs} * 256 * kVector;
  const int64_t fragments = shape.rows * shape.columns * 32;
  const int64_t rest = fragments * kWarps * kVector * (shape.rows == 4 ? 1 : shape.tiles) + columns * 4;
  if (row_bytes + cell_bytes + rest > kSharedBytes) shape.registers = kRegisterPairs;
  shape.shared_bytes =
      row_bytes + cell_bytes + rest - int64_t{shape.registers} * kWarps * 2 * shape.rows * 32 * kVector;
  const int64_t slots = directions * kSlots * shape.tiles * kVector;
  shape.x_bytes = slots * shape.cell_pairs * shape.columns * 32;
  shape.d_bytes = slots * (hidden / 8) * shape.columns * 32;
  shape.s_bytes = shape.rows == 4 ? slots * shape.blocks * fragments : 0;
  return shape;
}

std::string refusal_of(int64_t hidden, int64_t size, bool projected, int64_t directions) {
  const std::string sizes = "hidden_size " + std::to_string(hidden) + " and proj_size " + std::to_string(size);
  if (directions < 1 || directions > 2) return "it runs one or two directions, not " + std::to_string(directions) + ".";
  if (!projected) {
    if (hidden != size) return "without a projection h has as many values as there are cells; got " + sizes + ".";
    if (hidden < 128 || hidden > 1024 || hidden % 64 != 0) {
      return "without a projection it takes hidden_size 128 to 1024 in multiples of 64, not " + std::to_string(hidden) +
             ".";
    }
    return "";
  }
  const int64_t ratio = size > 0 && hidden % size == 0 ? hidden / size : 0;
  const bool in_range = size >= 64 && size <= 512 && size % 64 == 0 && hidden <= 4096;
  if (!in_range || (ratio != 2 && ratio != 4 && ratio != 8 && ratio != 16)) {
    return "with a projection it takes proj_size 64 to 512 in multiples of 64 and hidden_size 2, 4, 8 or 16 times "
           "that, "
           "at most 4096, not " +
           sizes + ".";
  }
  return "";
}

using Kernel = void (*)(KernelParams);

template <typename T, int kColumns, int kTiles>
Kernel choose(const Shape& shape) {
  if (shape.projected) {
    if (shape.registers > 0) return lstm_persistent_backward_kernel<T, kColumns, kTiles, true, 4, kRegisterPairs>;
    return lstm_persistent_backward_kernel<T, kColumns, kTiles, true, 4, 0>;
  }
  if (shape.rows == 4) return lstm_persistent_backward_kernel<T, kColumns, kTiles, false, 4, 0>;
  return lstm_persistent_backward_kernel<T, kColumns, kTiles, false, 1, 0>;
}

template <typename T>
Kernel choose(const Shape& shape) {
  if (shape.columns == 1) return choose<T, 1, 1>(shape);
  return shape.tiles == 1 ? choose<T, 2, 1>(shape) : choose<T, 2, 2>(shape);
}

Status check(const LstmPersistentBackwardParams& p, const LstmPersistentBackwardPlan& plan) {
  if (!plan.refusal.empty()) return runtime_error(kOp, "the persistent backward pass cannot run this: " + plan.refusal);
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "dtype", p.dtype, {DType::kFloat16, DType::kBFloat16}));
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"batch", p.batch}, {"steps", p.steps}}));
  if (p.batch == 0) return {};
  const bool has_steps = p.steps > 0;
  for (int64_t r = 0; r < p.directions; ++r) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"weight_hh", p.weight_hh[r], true, 16},
                                                  {"weight_proj", p.weight_proj[r], p.has_proj, 16},
                                                  {"z", p.z[r], has_steps},
                                                  {"grad_gates", p.grad_gates[r], has_steps}}));
  }
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"workspace_bytes", p.workspace_bytes, plan.workspace_bytes}}));
  return check_addresses(kOp, {{"cells", p.cells, has_steps},
                               {"output", p.output, has_steps && p.proj_clip > 0},
                               {"grad_h_0", p.grad_h_0},
                               {"grad_c_0", p.grad_c_0},
                               {"workspace", p.workspace, true, 16}});
}

}  // namespace

LstmPersistentBackwardPlan lstm_persistent_backward_plan(int64_t batch, int64_t hidden, int64_t size, bool has_proj,
                                                         int64_t directions) {
  LstmPersistentBackwardPlan plan;
  plan.refusal = refusal_of(hidden, size, has_proj, directions);
  if (!plan.refusal.empty()) return plan;
  const Shape shape = shape_of(batch, hidden, size, has_proj, directions);
  plan.blocks = shape.blocks;
  plan.workspace_bytes = shape.x_bytes + shape.d_bytes + shape.s_bytes + kFlagBytes + kZeroBytes;
  return plan;
}

Status lstm_persistent_backward(const LstmPersistentBackwardParams& p, CUstream_st* stream) {
  const LstmPersistentBackwardPlan plan =
      lstm_persistent_backward_plan(p.batch, p.hidden, p.size, p.has_proj, p.directions);
  const Status status = check(p, plan);
  if (!status.ok() || p.batch == 0) return status;
  const Shape shape = shape_of(p.batch, p.hidden, p.size, p.has_proj, p.directions);
  const Kernel kernel = p.dtype == DType::kFloat16 ? choose<__half>(shape) : choose<__nv_bfloat16>(shape);

  KernelParams k = {};
  for (int64_t r = 0; r < p.directions; ++r) {
    k.weight_hh[r] = static_cast<const uint4*>(p.weight_hh[r]);
    k.weight_proj[r] = static_cast<const uint4*>(p.weight_proj[r]);
    k.z[r] = static_cast<const uint16_t*>(p.z[r]);
    k.z_strides[r][0] = p.z_strides[r][0];
    k.z_strides[r][1] = p.z_strides[r][1];
    k.grad_gates[r] = static_cast<uint16_t*>(p.grad_gates[r]);
  }
  for (int i = 0; i < 2; ++i) {
    k.output_strides[i] = p.output_strides[i];
    k.grad_output_strides[i] = p.grad_output_strides[i];
  }
  k.cells = p.cells, k.c_0 = p.c_0, k.output = p.output, k.grad_output = p.grad_output;
  k.grad_h_n = p.grad_h_n, k.grad_c_n = p.grad_c_n, k.lengths = p.lengths;
  k.grad_hidden = p.grad_hidden, k.grad_h_0 = p.grad_h_0, k.grad_c_0 = p.grad_c_0;
  auto* exchange = static_cast<unsigned char*>(p.workspace);
  k.x = reinterpret_cast<uint4*>(exchange);
  k.d = reinterpret_cast<uint4*>(exchange + shape.x_bytes);
  k.s = reinterpret_cast<uint4*>(exchange + shape.x_bytes + shape.d_bytes);
  const int64_t exchanged = shape.x_bytes + shape.d_bytes + shape.s_bytes;
  k.cleared = reinterpret_cast<uint32_t*>(exchange + exchanged);
  k.zeros = reinterpret_cast<const float*>(exchange + exchanged + kFlagBytes);
  k.directions = static_cast<int>(p.directions), k.batch = static_cast<int>(p.batch);
  k.steps = static_cast<int>(p.steps), k.hidden = static_cast<int>(p.hidden), k.size = static_cast<int>(p.size);
  k.blocks = shape.blocks, k.k_shift = 0;
  while (1 << k.k_shift < shape.k_groups) ++k.k_shift;
  k.row_pairs = shape.row_pairs, k.cell_pairs = shape.cell_pairs;
  k.cell_clip = p.cell_clip, k.proj_clip = p.proj_clip;

  LaunchConfig config;
  const int blocks = static_cast<int>(p.directions) * shape.blocks;
  CTXFAST_RETURN_IF_ERROR(cooperative_config(kOp, "the persistent backward pass", "Pass impl='cuda_step'.", kernel,
                                             blocks, kThreads, shape.shared_bytes, &config));
  CTXFAST_CUDA_CHECK(kOp, clear_async(exchange, 0xFF, static_cast<size_t>(exchanged), stream));
  CTXFAST_CUDA_CHECK(kOp, clear_async(exchange + exchanged, 0, kFlagBytes + kZeroBytes, stream));
  CTXFAST_CUDA_CHECK(kOp, launch(kernel, config, stream, k));
  return {};
}

}  // namespace ctxfast
