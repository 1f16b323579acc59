// SPDX-License-Identifier: Apache-2.0
// lstm on the CPU, backward: checks, memory, threads. The walk itself is recurrence_backward.h.
#include <algorithm>
#include <vector>

#include "lstm/cpu.h"

namespace ctxfast {
namespace {

Status check(const LstmBackwardParams& p) {
  const int64_t H = p.shape.hidden, P = p.shape.proj_size, B = p.batch, T = p.steps;
  CTXFAST_RETURN_IF_ERROR(check_shape(p.shape));
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "weight_dtype", p.shape.weight_dtype, {DType::kFloat32, DType::kBFloat16}));
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"batch", B}, {"steps", T}, {"threads", p.threads, 1}}));
  const bool has_cells = B * T * H > 0, has_output = B * T * P > 0;
  CTXFAST_RETURN_IF_ERROR(check_addresses(kOp, {{"packed", p.packed, lstm_backward_packed_bytes(p.shape) > 0},
                                                {"z", p.z, has_cells},
                                                {"grad_z", p.grad_z, has_cells},
                                                {"cells", p.cells, has_cells},
                                                {"output", p.output, has_output},
                                                {"grad_output", p.grad_output, has_output},
                                                {"grad_h_n", p.grad_h_n, B * P > 0},
                                                {"grad_c_n", p.grad_c_n, B * H > 0},
                                                {"grad_hidden", p.grad_hidden, has_output},
                                                {"grad_bias", p.grad_bias, H > 0},
                                                {"m", p.m, p.shape.has_projection && has_cells},
                                                {"grad_h_0", p.grad_h_0, B * P > 0},
                                                {"grad_c_0", p.grad_c_0, B * H > 0}}));
  return check_lengths(p.lengths, B, T);
}

struct Call {
  LstmBackwardJob job;
  void (*run)(const LstmBackwardJob&, int, int);
};

void run(void* context, int index, int count) {
  const Call& call = *static_cast<Call*>(context);
  call.run(call.job, index, count);
}

}  // namespace

Status lstm_backward(const LstmBackwardParams& p) {
  CTXFAST_RETURN_IF_ERROR(check(p));
  const int64_t H = p.shape.hidden, P = p.shape.proj_size, B = p.batch, T = p.steps;
  const bool projection = p.shape.has_projection;
  if (B == 0) {
    std::fill(p.grad_bias, p.grad_bias + 4 * H, 0.0f);
    return {};
  }
  std::vector<int64_t> row(B), length(B);
  sort_rows(p.lengths, B, T, row.data(), length.data());
  const int64_t threads = threads_for(B * (4 * H * P + (projection ? H * P : 0)), p.threads);

  Call call;
  LstmBackwardJob& job = call.job;
  job.batch = B, job.steps = T, job.hidden = H, job.proj_size = P;
  job.has_projection = projection, job.reverse = p.reverse;
  job.cell_clip = p.cell_clip, job.proj_clip = p.proj_clip;
  job.z = p.z, job.grad_z = p.grad_z, job.cells = p.cells, job.c_0 = p.c_0;
  job.output = p.output, job.output_batch = p.output_strides[0], job.output_time = p.output_strides[1];
  job.grad_output = p.grad_output;
  job.grad_batch = p.grad_output_strides[0], job.grad_time = p.grad_output_strides[1];
  job.grad_h_n = p.grad_h_n, job.grad_c_n = p.grad_c_n;
  const DType dtype = p.shape.weight_dtype;
  const uint32_t* packed = static_cast<const uint32_t*>(p.packed);
  job.weight_hh = packed;
  job.weight_proj = packed + ceil_div(P, kLstmPanel) * panel_words(dtype, 4 * H);
  job.grad_hidden = p.grad_hidden, job.m = projection ? p.m : nullptr, job.grad_bias = p.grad_bias;
  job.grad_h_0 = p.grad_h_0, job.grad_c_0 = p.grad_c_0;
  job.row = row.data(), job.length = length.data();

  Workspace memory;
  job.ld_h = round_up(P, kLstmPanel) + 16;
  const bool narrow = dtype != DType::kFloat32;
  job.ld_h_words = narrow ? column_words(dtype, P) + 16 : job.ld_h;
  job.ld_z_words = (narrow ? column_words(dtype, 4 * H) : round_up(4 * H, kLstmPanel)) + 16;
  const int64_t groups = ceil_div(4 * H, kLstmBackwardTerms);
  const size_t carried = memory.reserve(B * job.ld_h), d_h = memory.reserve(B * job.ld_h);
  const size_t h_words = memory.reserve(narrow ? B * job.ld_h_words : 0);
  const size_t z_words = memory.reserve(B * job.ld_z_words);
  const size_t d_c = memory.reserve(ceil_div(H, kLstmPanel) * B * kLstmPanel);
  const size_t d_bias = memory.reserve(ceil_div(H, kLstmPanel) * 4 * kLstmPanel);
  const size_t partial = memory.reserve(ceil_div(P, kLstmPanel) * groups * B * kLstmPanel);
  const size_t scratch = memory.reserve(threads * B * kLstmPanel);
  CTXFAST_RETURN_IF_ERROR(memory.allocate());
  job.carried = memory.floats(carried), job.d_h = memory.floats(d_h), job.d_c = memory.floats(d_c);
  job.d_bias = memory.floats(d_bias), job.partial = memory.floats(partial), job.scratch = memory.floats(scratch);
  job.h_words = memory.words(narrow ? h_words : d_h), job.z_words = memory.words(z_words);
  SpinBarrier barrier;
  job.barrier = &barrier;
  call.run = kernels_for(dtype, p.isa).backward;
  return run_on(threads, run, &call);
}

}  // namespace ctxfast
