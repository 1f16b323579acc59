// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "base/checks.h"
#include "base/parallel.h"
#include "base/workspace.h"
#include "linear_act/kernels.h"
#include "linear_act/linear_act.h"

namespace ctxfast {
namespace {

constexpr const char* kOp = "linear_act";
// Multiply-adds that justify a thread: some 3 us.
constexpr int64_t kWorkOfThread = 1 << 18;
constexpr int64_t kLine = 64;  // bytes of a tile's row: a cache line
// Bytes of the rows of x that stay in cache while the panels stream over them.
constexpr int64_t kChunkBytes = 4 << 20;

int64_t terms_of_word(DType weight_dtype) {
  return weight_dtype == DType::kInt8 ? 4 : weight_dtype == DType::kBFloat16 ? 2 : 1;
}
int64_t tiles_of(int64_t in, DType weight_dtype) {
  return ceil_div(in, kLinearActTileWords * terms_of_word(weight_dtype));
}

// Rows that are held as tiles at a time.
int64_t chunk_of(int64_t in, DType weight_dtype) {
  const int64_t fit = kChunkBytes / (tiles_of(in, weight_dtype) * kLine) / kLinearActRows * kLinearActRows;
  return std::min(std::max<int64_t>(fit, kLinearActRows), kLinearActMostRows);
}

struct Call {
  LinearActKernel kernel;
  LinearActJob job;
};

void run(void* context, int index, int count) {
  const Call& call = *static_cast<Call*>(context);
  call.kernel(call.job, index, count);
}

Status check(const LinearActParams& p) {
  const bool is_int8 = p.weight_dtype == DType::kInt8;
  CTXFAST_RETURN_IF_ERROR(
      check_sizes(kOp, {{"rows", p.rows}, {"in", p.in, 1}, {"out", p.out}, {"threads", p.threads, 1}}));
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "io_dtype", p.io_dtype, {DType::kFloat32, DType::kBFloat16}));
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "weight_dtype", p.weight_dtype, {DType::kInt8, p.io_dtype}));
  if (is_int8 && p.in > 65536) {
    return invalid(kOp, "in", std::to_string(p.in), "at most 65536, the terms an int8 sum holds");
  }
  if (p.is_gated && p.out % 2) return invalid(kOp, "out", std::to_string(p.out), "an even number, two halves");
  if (p.rows > 1) CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"stride_x", p.stride_x, p.in}}));
  if (p.rows == 0 || p.out == 0) return {};
  return check_addresses(kOp, {{"x", p.x},
                               {"packed", p.packed, true, 64},
                               {"y", p.y},
                               {"scales", p.scales, is_int8},
                               {"sums", p.sums, is_int8}});
}

}  // namespace

LinearActKernel linear_act_kernel_for(DType weight_dtype, Isa isa) {
  if (weight_dtype == DType::kInt8) return best_linear_act_int8(isa);
  return weight_dtype == DType::kBFloat16 ? best_linear_act_bfloat16(isa) : best_linear_act_float32(isa);
}

void linear_act_barrier(void* barrier, int count) { static_cast<SpinBarrier*>(barrier)->wait(count); }

int64_t linear_act_packed_bytes(int64_t in, int64_t out, DType weight_dtype) {
  if (in < 0 || out < 0) return 0;
  return 4 * round_up(out, kLinearActPanel) * tiles_of(in, weight_dtype) * kLinearActTileWords;
}

int64_t linear_act_scratch_bytes(int64_t rows, int64_t in, DType weight_dtype) {
  const int64_t chunk = round_up(std::min(chunk_of(in, weight_dtype), rows), 2 * kLinearActTileRows);
  return chunk * tiles_of(in, weight_dtype) * kLine + round_up(4 * chunk, kLine);
}

LinearActJob linear_act_job(const LinearActParams& p, char* scratch, void* barrier) {
  LinearActJob job = {};
  job.rows = p.rows, job.in = p.in, job.out = p.out;
  job.tiles = tiles_of(p.in, p.weight_dtype), job.chunk = chunk_of(p.in, p.weight_dtype);
  job.is_bf16 = p.io_dtype == DType::kBFloat16;
  job.activation = static_cast<int>(p.activation), job.is_gated = p.is_gated;
  job.x = p.x, job.stride_x = p.stride_x;
  job.packed = static_cast<const uint32_t*>(p.packed);
  job.scales = p.scales, job.sums = p.sums, job.bias = p.bias, job.y = p.y;
  const int64_t chunk = round_up(std::min(job.chunk, p.rows), 2 * kLinearActTileRows);
  job.x_tiles = reinterpret_cast<uint32_t*>(scratch);
  job.x_scales = reinterpret_cast<float*>(scratch + chunk * job.tiles * kLine);
  job.barrier = barrier;
  return job;
}

Status linear_act_forward(const LinearActParams& p) {
  const Status checked = check(p);
  if (!checked.ok() || p.rows == 0 || p.out == 0) return checked;
  SpinBarrier barrier;
  const int64_t bytes = linear_act_scratch_bytes(p.rows, p.in, p.weight_dtype);
  char* const scratch = static_cast<char*>(workspace(static_cast<size_t>(bytes)));
  if (!scratch) return runtime_error(kOp, "no memory for a workspace of " + std::to_string(bytes) + " bytes.");
  Call call = {linear_act_kernel_for(p.weight_dtype, p.isa), linear_act_job(p, scratch, &barrier)};
  const int64_t work = p.rows * p.in * p.out / terms_of_word(p.weight_dtype);
  const int64_t threads = std::min(p.threads, std::max<int64_t>(1, work / kWorkOfThread));
  if (!run_parallel(threads, run, &call)) return runtime_error(kOp, "no thread could be started.");
  return {};
}

}  // namespace ctxfast
