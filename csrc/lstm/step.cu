// SPDX-License-Identifier: Apache-2.0
// Launchers of lstm_step: the loop over steps, workspace, checks.
#include <algorithm>

#include "base/checks.h"
#include "base/launch.cuh"
#include "lstm/step.cuh"
#include "lstm/step.h"
#include "lstm/step_pack.h"

namespace ctxfast {
namespace {

using namespace lstm_step;

constexpr const char* kOp = "lstm";
constexpr int64_t kLargest = int64_t{1} << 30;
// Batch rows that share one reading of the weights.
constexpr int64_t kFewRows = 8, kManyRows = 32;

int64_t rows_together(const LstmStepShape& shape) { return shape.batch <= kFewRows ? kFewRows : kManyRows; }

// Where the pieces of the workspace begin, in bytes; the last entry is its size.
struct Places {
  int64_t slots[2], middle, end;  // what steps leave each other, in turn; m or dh between two kernels of a step
};

Places places_of(const LstmStepShape& shape, bool backward) {
  const int64_t rows = shape.directions * round_up(shape.batch, rows_together(shape)) * element_bytes(shape.dtype);
  const int64_t h = round_up(rows * round_up(shape.size, kPad), 256);
  const int64_t m = round_up(rows * round_up(shape.hidden, kPad), 256);
  const int64_t dz = round_up(rows * round_up(4 * shape.hidden, kPad), 256);
  const int64_t slot = backward ? dz : h, middle = shape.has_proj ? (backward ? h : m) : 0;
  return {{0, slot}, 2 * slot, 2 * slot + middle};
}

Status check_shape(const LstmStepShape& s) {
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"batch", s.batch, 0, kLargest},
                                            {"steps", s.steps, 0, kLargest},
                                            {"hidden", s.hidden, 1, kLargest},
                                            {"size", s.size, 1, kLargest},
                                            {"directions", s.directions, 1, 2}}));
  if (!s.has_proj && s.size != s.hidden) {
    return invalid(kOp, "size", std::to_string(s.size), "hidden = " + std::to_string(s.hidden) + " without projection");
  }
  return check_dtype(kOp, "dtype", s.dtype, {DType::kFloat16, DType::kBFloat16, DType::kFloat32});
}

Status check_gates(const char* name, const LstmStepShape& shape, const void* const gates[2]) {
  const auto alignment = static_cast<uintptr_t>(element_bytes(shape.dtype));
  for (int64_t r = 0; r < shape.directions; ++r) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{name, gates[r], true, alignment}}));
  }
  return {};
}

Status check_workspace(const LstmStepShape& shape, const void* workspace, int64_t bytes, bool backward) {
  const int64_t needed = lstm_step_workspace_bytes(shape, backward);
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"workspace_bytes", bytes, needed}}));
  return check_addresses(kOp, {{"workspace", workspace, needed > 0, 16}});
}

StepParams common(const LstmStepShape& s) {
  StepParams p = {};
  p.batch = static_cast<int>(s.batch);
  p.steps = static_cast<int>(s.steps);
  p.hidden = static_cast<int>(s.hidden);
  p.size = static_cast<int>(s.size);
  p.directions = static_cast<int>(s.directions);
  p.has_proj = s.has_proj;
  p.padded_batch = static_cast<int>(round_up(s.batch, rows_together(s)));
  p.padded_size = static_cast<int>(round_up(s.size, kPad));
  return p;
}

// The product's side of a kernel's parameters.
void set_product(StepParams* p, const void* packed, const int64_t (&at)[2], int64_t tiles, int64_t k, const void* from,
                 void* to, int64_t to_k) {
  for (int r = 0; r < 2; ++r) p->weights[r] = static_cast<const unsigned char*>(packed) + at[r];
  p->tiles = static_cast<int>(tiles);
  p->k = static_cast<int>(round_up(k, kPad));
  p->from = from;
  p->to = to;
  p->to_k = static_cast<int>(round_up(to_k, kPad));
}

template <typename T, Step kStep, int kColumns>
cudaError_t launch_as(const BothDirections& both, cudaStream_t stream) {
  constexpr int kRowTiles = kStep == Step::kGates ? 2 : 1;  // 8 cells a block; 16 rows
  const StepParams& p = both.of[0];
  const dim3 grid(static_cast<unsigned>(ceil_div(p.tiles, kRowTiles)),
                  static_cast<unsigned>(p.padded_batch / (8 * kColumns)), static_cast<unsigned>(p.directions));
  const size_t shared = sizeof(float) * kSums<kRowTiles, kColumns> * (sizeof(T) == 4 ? 1 : kWarps);
  return launch(lstm_step_kernel<T, kStep, kRowTiles, kColumns>, LaunchConfig{grid, kThreads, shared}, stream, both);
}

template <typename T, Step kStep>
cudaError_t launch_step(const BothDirections& both, cudaStream_t stream) {
  return both.of[0].batch <= kFewRows ? launch_as<T, kStep, kFewRows / 8>(both, stream)
                                      : launch_as<T, kStep, kManyRows / 8>(both, stream);
}

unsigned start_blocks(const LstmStepShape& s) {
  return static_cast<unsigned>(ceil_div(s.directions * s.batch * std::max(s.hidden, s.size), kThreads));
}

// The time of a step of the walk.
int64_t time_of(const LstmStepShape& s, int64_t step, int direction, bool backward) {
  if (step < 0 || step >= s.steps) return -1;
  return (direction == 0) != backward ? step : s.steps - 1 - step;
}

template <typename T>
Status forward(const LstmStepForwardParams& params, cudaStream_t stream) {
  const LstmStepShape& s = params.shape;
  const Places places = places_of(s, false);
  const PackedPlaces weights = packed_places(s, false);
  auto* workspace = static_cast<unsigned char*>(params.workspace);
  CTXFAST_CUDA_CHECK(kOp, clear_async(workspace, 0, static_cast<size_t>(places.end), stream));
  StepParams p = common(s);
  for (int r = 0; r < 2; ++r) {
    p.gates[r] = params.gates[r];
    p.gates_strides[r][0] = params.gates_strides[r][0];
    p.gates_strides[r][1] = params.gates_strides[r][1];
  }
  p.lengths = params.lengths;
  p.cell_clip = params.cell_clip;
  p.proj_clip = params.proj_clip;
  p.output = params.output;
  p.h_n = params.h_n;
  p.c = params.c_n;
  p.cells = params.cells;

  StartParams start = {{p, p}, params.h_0, params.c_0, nullptr, nullptr, workspace + places.slots[0]};
  CTXFAST_CUDA_CHECK(kOp,
                     launch(lstm_step_start_kernel<T>, LaunchConfig{dim3(start_blocks(s)), kThreads}, stream, start));
  for (int64_t step = 0; step < s.steps; ++step) {
    void* now = workspace + places.slots[step % 2];
    void* next = workspace + places.slots[(step + 1) % 2];
    void* m = workspace + places.middle;
    BothDirections both = {{p, p}};
    for (int r = 0; r < 2; ++r) {
      StepParams& direction = both.of[r];
      direction.t = static_cast<int>(time_of(s, step, r, false));
      direction.is_last = step + 1 == s.steps;
      direction.h = now;
      set_product(&direction, params.packed, weights.hh, ceil_div(s.hidden, 4), s.size, now, s.has_proj ? m : next,
                  s.hidden);
    }
    CTXFAST_CUDA_CHECK(kOp, (launch_step<T, Step::kGates>(both, stream)));
    if (!s.has_proj) continue;
    for (StepParams& direction : both.of) {
      set_product(&direction, params.packed, weights.proj, ceil_div(s.size, kRowsOfTile), s.hidden, m, next, s.size);
    }
    CTXFAST_CUDA_CHECK(kOp, (launch_step<T, Step::kProjection>(both, stream)));
  }
  return {};
}

template <typename T>
Status backward(const LstmStepBackwardParams& params, cudaStream_t stream) {
  const LstmStepShape& s = params.shape;
  const Places places = places_of(s, true);
  const PackedPlaces weights = packed_places(s, true);
  auto* workspace = static_cast<unsigned char*>(params.workspace);
  CTXFAST_CUDA_CHECK(kOp, clear_async(workspace, 0, static_cast<size_t>(places.end), stream));
  StepParams p = common(s);
  for (int r = 0; r < 2; ++r) {
    p.gates[r] = params.z[r];
    p.gates_strides[r][0] = params.z_strides[r][0];
    p.gates_strides[r][1] = params.z_strides[r][1];
    p.grad_gates[r] = params.grad_gates[r];
  }
  p.lengths = params.lengths;
  p.cell_clip = params.cell_clip;
  p.proj_clip = params.proj_clip;
  p.output = const_cast<void*>(params.output);
  p.cells = const_cast<float*>(params.cells);
  p.c_0 = params.c_0;
  p.grad_output = params.grad_output;
  p.grad_hidden = params.grad_hidden;
  p.grad_h = params.grad_h_0;
  p.grad_c = params.grad_c_0;

  void* dh = workspace + places.middle;
  StartParams start = {{p, p}, nullptr, nullptr, params.grad_h_n, params.grad_c_n, nullptr};
  for (int r = 0; r < 2; ++r) {
    start.of[r].t_next = static_cast<int>(time_of(s, 0, r, true));
    start.of[r].to = s.has_proj ? dh : workspace + places.slots[0];
    start.of[r].to_k = static_cast<int>(round_up(s.has_proj ? s.size : 4 * s.hidden, kPad));
  }
  CTXFAST_CUDA_CHECK(
      kOp, launch(lstm_step_start_back_kernel<T>, LaunchConfig{dim3(start_blocks(s)), kThreads}, stream, start));
  for (int64_t step = 0; step < s.steps; ++step) {
    // With a projection dz has one slot: the product that reads it is done before the next step writes it.
    void* dz = workspace + places.slots[s.has_proj ? 0 : step % 2];
    void* next_dz = workspace + places.slots[(step + 1) % 2];
    BothDirections both = {{p, p}};
    for (int r = 0; r < 2; ++r) {
      both.of[r].t = static_cast<int>(time_of(s, step, r, true));
      both.of[r].t_next = static_cast<int>(time_of(s, step + 1, r, true));
    }
    if (s.has_proj) {
      for (StepParams& direction : both.of) {
        set_product(&direction, params.packed, weights.proj, ceil_div(s.hidden, kRowsOfTile), s.size, dh, dz,
                    4 * s.hidden);
      }
      CTXFAST_CUDA_CHECK(kOp, (launch_step<T, Step::kCells>(both, stream)));
    }
    for (StepParams& direction : both.of) {
      set_product(&direction, params.packed, weights.hh, ceil_div(s.size, kRowsOfTile), 4 * s.hidden, dz,
                  s.has_proj ? dh : next_dz, s.has_proj ? s.size : 4 * s.hidden);
    }
    if (s.has_proj) {
      CTXFAST_CUDA_CHECK(kOp, (launch_step<T, Step::kCarry>(both, stream)));
    } else {
      CTXFAST_CUDA_CHECK(kOp, (launch_step<T, Step::kCarryCells>(both, stream)));
    }
  }
  return {};
}

}  // namespace

int64_t lstm_step_workspace_bytes(const LstmStepShape& shape, bool backward) { return places_of(shape, backward).end; }

Status lstm_step_forward(const LstmStepForwardParams& p, CUstream_st* stream) {
  const Status shape = check_shape(p.shape);
  if (!shape.ok() || p.shape.batch == 0) return shape;
  if (p.shape.steps > 0) CTXFAST_RETURN_IF_ERROR(check_gates("gates", p.shape, p.gates));
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"packed", p.packed, true, 16},
                                                {"output", p.output, p.shape.steps > 0},
                                                {"h_n", p.h_n},
                                                {"c_n", p.c_n, true, 4}}));
  CTXFAST_RETURN_IF_ERROR(check_workspace(p.shape, p.workspace, p.workspace_bytes, false));
  switch (p.shape.dtype) {
    case DType::kFloat16:
      return forward<__half>(p, stream);
    case DType::kBFloat16:
      return forward<__nv_bfloat16>(p, stream);
    default:
      return forward<float>(p, stream);
  }
}

Status lstm_step_backward(const LstmStepBackwardParams& p, CUstream_st* stream) {
  const Status shape = check_shape(p.shape);
  if (!shape.ok() || p.shape.batch == 0) return shape;
  const bool has_steps = p.shape.steps > 0;
  if (has_steps) CTXFAST_RETURN_IF_ERROR(check_gates("z", p.shape, p.z));
  for (int64_t r = 0; r < p.shape.directions; ++r) {
    CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"grad_gates", p.grad_gates[r], has_steps}}));
  }
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"packed", p.packed, true, 16},
                                                {"cells", p.cells, has_steps, 4},
                                                {"output", p.output, has_steps && p.proj_clip > 0},
                                                {"grad_h_0", p.grad_h_0, true, 4},
                                                {"grad_c_0", p.grad_c_0, true, 4}}));
  CTXFAST_RETURN_IF_ERROR(check_workspace(p.shape, p.workspace, p.workspace_bytes, true));
  switch (p.shape.dtype) {
    case DType::kFloat16:
      return backward<__half>(p, stream);
    case DType::kBFloat16:
      return backward<__nv_bfloat16>(p, stream);
    default:
      return backward<float>(p, stream);
  }
}

}  // namespace ctxfast
