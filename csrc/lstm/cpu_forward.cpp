// SPDX-License-Identifier: Apache-2.0
// lstm on the CPU, forward: memory, threads, choice of kernels. The recurrence itself is recurrence.h.
#include <algorithm>
#include <numeric>
#include <vector>

#include "lstm/cpu.h"

namespace ctxfast {

void lstm_barrier(void* barrier, int count) { static_cast<SpinBarrier*>(barrier)->wait(count); }

const LstmKernels& kernels_for(DType dtype, Isa isa) {
  if (dtype == DType::kInt8) return best_lstm_int8(isa);
  return dtype == DType::kBFloat16 ? best_lstm_bfloat16(isa) : best_lstm_float32(isa);
}

// Below this many multiply-adds a thread and step, meeting at a barrier costs more than the work it saves.
constexpr int64_t kWorkPerThread = 16384;

int64_t threads_for(int64_t work, int64_t most) {
  return std::clamp<int64_t>(work / kWorkPerThread, 1, std::min<int64_t>(most, 1024));
}

Status run_on(int64_t threads, void (*body)(void*, int, int), void* call) {
  if (run_parallel(threads, body, call)) return {};
  return runtime_error(kOp, std::to_string(threads) + " threads could not be started.");
}

void sort_rows(const int64_t* lengths, int64_t batch, int64_t steps, int64_t* row, int64_t* length) {
  std::iota(row, row + batch, int64_t{0});
  if (lengths) std::stable_sort(row, row + batch, [=](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  for (int64_t i = 0; i < batch; ++i) length[i] = lengths ? lengths[row[i]] : steps;
}

namespace {

Status check(const LstmParams& p) {
  const int64_t H = p.shape.hidden, P = p.shape.proj_size, B = p.batch, T = p.steps, R = p.directions;
  CTXFAST_RETURN_IF_ERROR(check_shape(p.shape));
  CTXFAST_RETURN_IF_ERROR(check_sizes(
      kOp, {{"batch", B}, {"steps", T}, {"directions", R, 1, kLstmMaxDirections}, {"threads", p.threads, 1}}));
  if (!(p.cell_clip >= 0)) return invalid(kOp, "cell_clip", std::to_string(p.cell_clip), "above 0, or 0 for none");
  if (!(p.proj_clip >= 0)) return invalid(kOp, "proj_clip", std::to_string(p.proj_clip), "above 0, or 0 for none");
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "z_dtype", p.z_dtype, {DType::kFloat32, DType::kBFloat16}));
  const LstmInputShape input = {H, p.input, p.shape.weight_dtype};
  CTXFAST_RETURN_IF_ERROR(check_input_shape(input));
  const bool has_weights = gate_words(p.shape) + proj_words(p.shape) > 0;
  for (int64_t r = 0; r < R; ++r) {
    CTXFAST_RETURN_IF_ERROR(
        check_addresses(kOp, {{"x", p.x[r], B * T * p.input > 0},
                              {"packed_input", p.packed_input[r], lstm_input_packed_bytes(input) > 0},
                              {"packed", p.packed[r], has_weights, 4}}));
  }
  CTXFAST_RETURN_IF_ERROR(check_addresses(
      kOp, {{"output", p.output, B * T * P > 0}, {"h_n", p.h_n, B * P > 0}, {"c_n", p.c_n, B * H > 0}}));
  return check_lengths(p.lengths, B, T);
}

// The workspace part of a job; the directions use it one after the other.
Status fill_workspace(const LstmParams& p, int64_t threads, bool split, Workspace* memory, LstmJob* job) {
  const int64_t H = p.shape.hidden, P = p.shape.proj_size;
  const DType dtype = p.shape.weight_dtype;
  const bool projection = p.shape.has_projection, narrow = dtype != DType::kFloat32;
  const int64_t B = round_up(p.batch, kLstmTileRows);
  job->ld_batch = B;
  // One cache line more than the rows need: rows 4096 floats apart would all fall into the same cache sets.
  job->ld_h = round_up(P, kLstmPanel) + 16;
  job->ld_m = round_up(H, kLstmPanel) + 16;
  job->ld_h_words = narrow ? column_words(dtype, P) + 16 : job->ld_h;
  job->ld_m_words = narrow ? column_words(dtype, H) + 16 : job->ld_m;
  const size_t h = memory->reserve((projection || narrow ? 1 : 2) * B * job->ld_h);
  const size_t m = memory->reserve(projection ? B * job->ld_m : 0);
  const size_t c = memory->reserve(ceil_div(H, kLstmPanelCells) * B * kLstmPanelCells);
  const size_t scratch = memory->reserve(threads * std::max<int64_t>(B, kLstmInputRows) * kLstmPanel);
  const int64_t blocks = ceil_div(column_words(dtype, H), block_words(dtype));
  const size_t partial = memory->reserve(split ? blocks * ceil_div(P, kLstmPanel) * B * kLstmPanel : 0);
  const size_t h_words = memory->reserve(narrow ? B * job->ld_h_words : 0);
  const size_t m_words = memory->reserve(narrow && projection ? B * job->ld_m_words : 0);
  const size_t h_scale = memory->reserve(B), m_scale = memory->reserve(B);
  job->chunk_steps = std::clamp<int64_t>(kLstmChunkRows / p.batch, 1, std::max<int64_t>(p.steps, 1));
  job->chunk_rows = job->chunk_steps * p.batch;
  job->ld_x_words = column_words(dtype, p.input) + 16;
  const size_t chunk = memory->reserve(ceil_div(H, kLstmPanelCells) * job->chunk_rows * kLstmPanel);
  const size_t x_words = memory->reserve((job->chunk_rows + kLstmInputRows) * job->ld_x_words);
  const size_t x_scale = memory->reserve(job->chunk_rows);
  const Status status = memory->allocate();
  if (!status.ok()) return status;
  job->h = memory->floats(h);
  job->m = memory->floats(m);
  job->c = memory->floats(c);
  job->scratch = memory->floats(scratch);
  job->partial = split ? memory->floats(partial) : nullptr;
  job->h_words = memory->words(narrow ? h_words : h);
  job->m_words = memory->words(narrow ? m_words : m);
  job->h_scale = memory->floats(h_scale);
  job->m_scale = memory->floats(m_scale);
  job->chunk = memory->floats(chunk);
  job->x_words = memory->words(x_words);
  job->x_scale = memory->floats(x_scale);
  return {};
}

struct ForwardCall {
  LstmJob jobs[kLstmMaxDirections];
  int64_t directions;
  void (*run)(const LstmJob&, int, int);
};

void run_forward(void* context, int index, int count) {
  const ForwardCall& call = *static_cast<ForwardCall*>(context);
  for (int64_t r = 0; r < call.directions; ++r) call.run(call.jobs[r], index, count);
}

}  // namespace

Status lstm_forward(const LstmParams& p) {
  CTXFAST_RETURN_IF_ERROR(check(p));
  const int64_t H = p.shape.hidden, P = p.shape.proj_size, B = p.batch, T = p.steps;
  if (B == 0) return {};

  std::vector<int64_t> row(B), length(B);
  sort_rows(p.lengths, B, T, row.data(), length.data());

  const int64_t work = B * (4 * H * P + (p.shape.has_projection ? H * P : 0));
  const int64_t threads = threads_for(work, p.threads);
  const bool split = p.shape.has_projection && threads > ceil_div(P, kLstmPanel);
  Workspace memory;
  LstmJob shared;
  CTXFAST_RETURN_IF_ERROR(fill_workspace(p, threads, split, &memory, &shared));

  SpinBarrier barrier;
  ForwardCall call;
  call.directions = p.directions;
  call.run = kernels_for(p.shape.weight_dtype, p.isa).forward;
  for (int64_t r = 0; r < p.directions; ++r) {
    LstmJob& job = call.jobs[r];
    job = shared;
    job.batch = B, job.steps = T, job.hidden = H, job.proj_size = P;
    job.has_projection = p.shape.has_projection;
    job.reverse = r == 1;
    job.cell_clip = p.cell_clip, job.proj_clip = p.proj_clip;
    job.input = p.input;
    job.x = p.x[r], job.x_batch = p.x_strides[r][0], job.x_time = p.x_strides[r][1];
    job.weight_input = p.packed_input[r], job.bias = p.bias[r];
    job.weight_gates = p.packed[r];
    job.weight_proj = static_cast<const uint32_t*>(p.packed[r]) + gate_words(p.shape);
    job.h_0 = p.h_0 ? p.h_0 + r * B * P : nullptr;
    job.c_0 = p.c_0 ? p.c_0 + r * B * H : nullptr;
    job.output = p.output + r * P;
    job.output_batch = p.output_strides[0], job.output_time = p.output_strides[1];
    job.h_n = p.h_n + r * B * P;
    job.c_n = p.c_n + r * B * H;
    job.cells = p.cells ? p.cells + r * B * T * H : nullptr;
    job.z_bf16 = p.z_dtype == DType::kBFloat16;
    job.z = p.z ? static_cast<char*>(p.z) + r * B * T * 4 * H * (job.z_bf16 ? 2 : 4) : nullptr;
    job.row = row.data(), job.length = length.data();
    job.barrier = &barrier;
  }
  return run_on(threads, run_forward, &call);
}

}  // namespace ctxfast
