// SPDX-License-Identifier: Apache-2.0
// attention on the CPU: y = dropout(softmax(scale Q K^T + B)) V within each of several packed sequences, without
// padding, and its gradients.
//
// A token's row holds its queries, keys and values, [heads + 2 kv_heads][head_dim]; query head h goes with head
// h / (heads / kv_heads) of the others. Softmax and sums are float32, the
// softmax over whole rows of scores. Inputs in bfloat16 are multiplied as bfloat16 where the processor does so, else
// as float32; gradients are computed in float32. A sequence's bits depend on nothing but its rows (and the instruction
// set, and with dropout its place in the batch): not on what it is batched with, nor on threads. Memory beyond the
// arguments grows with the longest sequence, not with its square; the gradient of B takes 2 tokens heads floats more.
//
// Dropout: weight (query i, key j) of sequence s and head h has 16 random bits and is kept where they are at least
// round(65536 dropout_p). The bits come from Philox4x32-7 keyed with seeds[0]; they are half (j / 16) % 2 of word i % 4
// at the counter (16 (j / 32) + j % 16, i / 4, s heads + h, seeds[1]). The same on every instruction set.
#pragma once

#include <cstdint>

#include "base/common.h"
#include "base/isa.h"

namespace ctxfast {

constexpr int64_t kAttentionMaxHeadDim = 1024;

// What depends on the places i of a query and j of a key in their sequence.
struct AttentionPlaces {
  // (heads, 2 reach - 1) or null: B, added to scaled scores; column reach - 1 + (j - i), or the nearest that there is
  const float* relative_bias = nullptr;
  int64_t reach = 0;
  int64_t window =
      -1;  // |i - j| at most; below 0: any. Blocks of keys that no query of a block meets are not computed.
  // (positions, 2, rotated / 2) or null: cosines and sines by which queries and keys, with their bias, are rotated,
  // dimension d together with d + rotated / 2; positions is no less than the longest sequence
  const float* rotary = nullptr;
  int64_t positions = 0, rotated = 0;
};

struct AttentionGradients {
  const void* y = nullptr;  // of y, an input: (tokens, heads, head_dim), tokens stride_y apart
  int64_t stride_y = 0;
  void* qkv = nullptr;  // of qkv, written, tokens stride_qkv apart; the bias's is its sum over tokens
  int64_t stride_qkv = 0;
  float* relative_bias = nullptr;  // (heads, 2 reach - 1), written; null where it is not wanted
};

struct AttentionParams {
  int64_t tokens = 0, heads = 0, head_dim = 0, sequences = 0;
  int64_t kv_heads = 0;              // of keys and values, a divisor of heads; 0: as many
  DType io_dtype = DType::kFloat32;  // qkv, bias and y: float32 or bfloat16
  const void* qkv = nullptr;         // (tokens, heads + 2 kv_heads, head_dim), tokens stride_qkv apart
  int64_t stride_qkv = 0;            // elements
  const void* bias = nullptr;        // (heads + 2 kv_heads, head_dim), added to every token's row; may be null
  const void* cu_seqlens = nullptr;  // (sequences + 1): rises from 0 to tokens
  bool is_int64 = false;             // cu_seqlens; else int32
  float scale = 1;
  AttentionPlaces places;
  float dropout_p = 0;             // 0 <= dropout_p < 1
  const int64_t* seeds = nullptr;  // 2; may be null where dropout_p is 0
  void* y = nullptr;               // forward: (tokens, heads, head_dim), tokens stride_y apart; overlaps no input
  int64_t stride_y = 0;            // elements
  AttentionGradients gradients;    // backward
  int64_t threads = 1;
  Isa isa = best_isa();
};

Status attention_forward(const AttentionParams& params);
Status attention_backward(const AttentionParams& params);

}  // namespace ctxfast
