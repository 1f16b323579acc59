// SPDX-License-Identifier: Apache-2.0
// lstm on the CPU: checks of shapes, and weights in the order the kernels read them in.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "lstm/cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ctxfast {
namespace {

// `terms`: of the longest sum.
Status check_weight_dtype(DType dtype, int64_t terms) {
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "weight_dtype", dtype, {DType::kFloat32, DType::kBFloat16, DType::kInt8}));
  // 255 * 127 * terms must stay below 2^31.
  if (dtype == DType::kInt8 && terms > 65536) {
    return invalid(kOp, "hidden or input size", std::to_string(terms),
                   "at most 65536 for int8, whose sums are 32 bits");
  }
  return {};
}

}  // namespace

Status check_shape(const LstmShape& shape) {
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"hidden", shape.hidden}, {"proj_size", shape.proj_size}}));
  if (!shape.has_projection && shape.proj_size != shape.hidden) {
    return invalid(kOp, "proj_size", std::to_string(shape.proj_size),
                   "hidden = " + std::to_string(shape.hidden) + ", as there is no projection");
  }
  return check_weight_dtype(shape.weight_dtype, std::max(shape.hidden, shape.proj_size));
}

Status check_input_shape(const LstmInputShape& shape) {
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"hidden", shape.hidden}, {"input", shape.input}}));
  return check_weight_dtype(shape.weight_dtype, shape.input);
}

Status check_lengths(const int64_t* lengths, int64_t batch, int64_t steps) {
  for (int64_t b = 0; lengths && b < batch; ++b) {
    if (lengths[b] < 0 || lengths[b] > steps) {
      return invalid(kOp, "lengths[" + std::to_string(b) + "]", std::to_string(lengths[b]),
                     "0.." + std::to_string(steps) + ", the number of steps");
    }
  }
  return {};
}

// Words of a column with `size` terms.
int64_t column_words(DType dtype, int64_t size) {
  if (dtype == DType::kFloat32) return size;
  return round_up(ceil_div(size, dtype == DType::kInt8 ? 4 : 2), kLstmTileWords);
}

int64_t panel_words(DType dtype, int64_t size) {
  return column_words(dtype, size) * kLstmPanel + (dtype == DType::kInt8 ? kLstmInt8Header : 0);
}

int64_t block_words(DType dtype) { return dtype == DType::kFloat32 ? kLstmBlock : kLstmNarrowBlock; }

int64_t gate_words(const LstmShape& shape) {
  return ceil_div(shape.hidden, kLstmPanelCells) * panel_words(shape.weight_dtype, shape.proj_size);
}

int64_t proj_words(const LstmShape& shape) {
  return shape.has_projection ? ceil_div(shape.proj_size, kLstmPanel) * panel_words(shape.weight_dtype, shape.hidden)
                              : 0;
}

namespace {

uint32_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40;  // NaN stays NaN
  return (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
}

// A column of int8 words, its scale and the sum of its weights. A NaN among the weights makes the scale NaN.
void pack_int8_column(const float* from, int64_t stride, int64_t size, uint32_t* header, uint32_t* words) {
  float most = 0;
  bool finite = true;
  for (int64_t k = 0; k < size; ++k) {
    most = std::max(most, std::fabs(from[k * stride]));
    finite = finite && std::isfinite(from[k * stride]);
  }
  const bool there = finite && most > 1e-30f;
  const float scale = there ? most / 127.0f : finite ? 0.0f : NAN, steps = there ? 127.0f / most : 0.0f;
  int32_t sum = 0;
  for (int64_t k = 0; there && k < size; ++k) {
    const int32_t quantized = static_cast<int32_t>(std::nearbyint(from[k * stride] * steps));
    sum += quantized;
    words[k / 4 * kLstmPanel] |= (static_cast<uint32_t>(quantized) & 0xffu) << (8 * (k % 4));
  }
  sum *= 128;
  std::memcpy(header, &scale, sizeof scale);
  std::memcpy(header + kLstmPanel, &sum, sizeof sum);
}

// One panel: 64 columns given by their weights' first elements (null: a column of zeros).
void pack_panel(const float* const* columns, int64_t stride, int64_t size, DType dtype, uint32_t* to) {
  std::fill(to, to + panel_words(dtype, size), 0u);
  if (dtype == DType::kInt8) {
    for (int column = 0; column < kLstmPanel; ++column) {
      if (columns[column]) pack_int8_column(columns[column], stride, size, to + column, to + kLstmInt8Header + column);
    }
    return;
  }
  // Some terms of every column at a time: what is read and what is written both stay in L1.
  constexpr int64_t kTerms = 16;
  for (int64_t first = 0; first < size; first += kTerms) {
    const int64_t end = std::min(first + kTerms, size);
    for (int column = 0; column < kLstmPanel; ++column) {
      const float* from = columns[column];
      for (int64_t k = first; from && k < end; ++k) {
        if (dtype == DType::kBFloat16) {
          to[k / 2 * kLstmPanel + column] |= bf16_bits(from[k * stride]) << (16 * (k % 2));
        } else {
          std::memcpy(to + k * kLstmPanel + column, from + k * stride, 4);
        }
      }
    }
  }
}

// All panels of a matrix: of 16 cells with their four gates (rows 4H, `per_gate` H), or of 64 rows (`per_gate` 0).
struct PackCall {
  const float* weight;
  int64_t strides[2];  // of outputs and terms
  int64_t count, per_gate, size;
  DType dtype;
  uint32_t* to;

  int64_t panels() const { return per_gate ? ceil_div(per_gate, kLstmPanelCells) : ceil_div(count, kLstmPanel); }
  uint32_t* end() const { return to + panels() * panel_words(dtype, size); }
};

void pack_share(void* context, int index, int threads) {
  const PackCall& call = *static_cast<PackCall*>(context);
  const float* columns[kLstmPanel];
  for (int64_t panel = call.panels() * index / threads; panel < call.panels() * (index + 1) / threads; ++panel) {
    for (int column = 0; column < kLstmPanel; ++column) {
      int64_t at = panel * kLstmPanel + column;
      bool there = at < call.count;
      if (call.per_gate) {
        const int64_t cell = panel * kLstmPanelCells + column % kLstmPanelCells;
        there = cell < call.per_gate;
        at = column / kLstmPanelCells * call.per_gate + cell;
      }
      columns[column] = there ? call.weight + at * call.strides[0] : nullptr;
    }
    pack_panel(columns, call.strides[1], call.size, call.dtype, call.to + panel * panel_words(call.dtype, call.size));
  }
}

Status pack_all(PackCall call, int64_t threads) {
  return run_on(threads_for(call.count * call.size, threads), pack_share, &call);
}

// Weights are streamed whole at every step: with 2 MiB pages far fewer address translations miss. Only advice.
void advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t from = round_up(reinterpret_cast<uintptr_t>(memory), kHuge);
  const uintptr_t to = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHuge * kHuge;
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace

int64_t lstm_packed_bytes(const LstmShape& shape) {
  if (shape.hidden < 0 || shape.proj_size < 0) return 0;
  return 4 * (gate_words(shape) + proj_words(shape));
}

namespace {

Status check_pack(const LstmPackParams& params, int64_t bytes) {
  const LstmShape& shape = params.shape;
  const int64_t H = shape.hidden, P = shape.proj_size;
  CTXFAST_RETURN_IF_ERROR(check_shape(shape));
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"threads", params.threads, 1}}));
  return check_addresses(kOp, {{"weight_hh", params.weight_hh, H * P > 0},
                               {"weight_proj", params.weight_proj, shape.has_projection && H * P > 0},
                               {"packed", params.packed, bytes > 0}});
}

}  // namespace

Status lstm_pack(const LstmPackParams& p) {
  const int64_t H = p.shape.hidden, P = p.shape.proj_size;
  CTXFAST_RETURN_IF_ERROR(check_pack(p, lstm_packed_bytes(p.shape)));
  advise_huge_pages(p.packed, lstm_packed_bytes(p.shape));
  const PackCall hh = {p.weight_hh,
                       {p.weight_hh_strides[0], p.weight_hh_strides[1]},
                       4 * H,
                       H,
                       P,
                       p.shape.weight_dtype,
                       static_cast<uint32_t*>(p.packed)};
  CTXFAST_RETURN_IF_ERROR(pack_all(hh, p.threads));
  if (!p.shape.has_projection) return {};
  return pack_all(
      {p.weight_proj, {p.weight_proj_strides[0], p.weight_proj_strides[1]}, P, 0, H, p.shape.weight_dtype, hh.end()},
      p.threads);
}

int64_t lstm_backward_packed_bytes(const LstmShape& shape) {
  const int64_t H = shape.hidden, P = shape.proj_size;
  if (H < 0 || P < 0) return 0;
  const int64_t back = ceil_div(P, kLstmPanel) * panel_words(shape.weight_dtype, 4 * H);
  const int64_t proj = shape.has_projection ? ceil_div(H, kLstmPanel) * panel_words(shape.weight_dtype, P) : 0;
  return 4 * (back + proj);
}

Status lstm_pack_backward(const LstmPackParams& p) {
  const int64_t H = p.shape.hidden, P = p.shape.proj_size;
  CTXFAST_RETURN_IF_ERROR(check_dtype(kOp, "weight_dtype", p.shape.weight_dtype, {DType::kFloat32, DType::kBFloat16}));
  CTXFAST_RETURN_IF_ERROR(check_pack(p, lstm_backward_packed_bytes(p.shape)));
  advise_huge_pages(p.packed, lstm_backward_packed_bytes(p.shape));
  const PackCall hh = {p.weight_hh,
                       {p.weight_hh_strides[1], p.weight_hh_strides[0]},
                       P,
                       0,
                       4 * H,
                       p.shape.weight_dtype,
                       static_cast<uint32_t*>(p.packed)};
  CTXFAST_RETURN_IF_ERROR(pack_all(hh, p.threads));
  if (!p.shape.has_projection) return {};
  return pack_all(
      {p.weight_proj, {p.weight_proj_strides[1], p.weight_proj_strides[0]}, H, 0, P, p.shape.weight_dtype, hh.end()},
      p.threads);
}

int64_t lstm_input_packed_bytes(const LstmInputShape& shape) {
  if (shape.hidden < 0 || shape.input < 0) return 0;
  return 4 * ceil_div(shape.hidden, kLstmPanelCells) * panel_words(shape.weight_dtype, shape.input);
}

Status lstm_pack_input(const LstmPackInputParams& p) {
  const int64_t H = p.shape.hidden, I = p.shape.input;
  CTXFAST_RETURN_IF_ERROR(check_input_shape(p.shape));
  CTXFAST_RETURN_IF_ERROR(check_sizes(kOp, {{"threads", p.threads, 1}}));
  CTXFAST_RETURN_IF_ERROR(check_addresses(
      kOp, {{"weight_ih", p.weight_ih, H * I > 0}, {"packed", p.packed, lstm_input_packed_bytes(p.shape) > 0}}));
  advise_huge_pages(p.packed, lstm_input_packed_bytes(p.shape));
  return pack_all({p.weight_ih,
                   {p.weight_ih_strides[0], p.weight_ih_strides[1]},
                   4 * H,
                   H,
                   I,
                   p.shape.weight_dtype,
                   static_cast<uint32_t*>(p.packed)},
                  p.threads);
}

}  // namespace ctxfast
