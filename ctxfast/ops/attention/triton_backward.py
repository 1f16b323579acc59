# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of ``attention`` in Triton, without atomics.

With P the softmax, M the dropout mask over its share kept (ones without), dO the gradient and O the result:
dV = (P M)^T dO, dP = M (dO V^T), delta = rowsum(dO O) = rowsum(P dP), dS = P (dP - delta), dQ = dS K, dK = dS^T Q.
Rows of dS sum to zero, so the key's bias enters no gradient and K is read without it. Every tensor that a kernel
streams is read without bias: what the bias adds there is one number per row, made from the tensors that stay.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_dropout import is_kept
from .triton_forward import load_bias, load_bias_pairs, load_pairs, load_rows, locate


@triton.jit
def _store_rows(
    base, row, values, stride_t, start, length, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows into the contiguous gradient of qkv; ``base`` points at the head's part of row 0."""
    column = tl.arange(0, BLOCK_D)
    at = base + ((start + row) * stride_t)[:, None] + column[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=(row < length)[:, None] & (column < D)[None, :])


@triton.jit
def _query_step(
    q, d_out, base_k, base_v, first, length, lse, delta, d_bias_v, d_q, scale, seeds, pair, query, threshold, rescale,
    stride_t, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a block of queries."""
    key = first + tl.arange(0, BLOCK_N)
    k = load_rows(base_k, key, stride_t, stride_d, length, D, BLOCK_D)
    v = load_rows(base_v, key, stride_t, stride_d, length, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    probs = tl.exp2(tl.fma(scores, scale, -lse[:, None]))
    probs = tl.where((key < length)[None, :], probs, 0.0)
    d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    if HAS_BIAS:
        d_probs += d_bias_v[:, None]
    if DROPOUT:
        keep = is_kept(seeds, pair, query[:, None], key[None, :], threshold)
        d_probs = tl.where(keep, d_probs * rescale, 0.0)
    d_scores = probs * (d_probs - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "sequences", "heads", "blocks", "threshold"])
def backward_query(
    qkv, bias, cu_seqlens, out, lse, delta, grad_out, grad_qkv, seeds,
    tokens, sequences, heads, blocks, scale, softmax_scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries, and delta (H, T), which ``backward_key`` reads. Grid: see ``locate``."""
    sequence, head, start, length, first = locate(cu_seqlens, sequences, heads, blocks, BLOCK_M, SEARCH)
    if first >= length:
        return
    pair = sequence * heads + head
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    base_k = base + stride_p
    base_v = base_k + stride_p
    query = first + tl.arange(0, BLOCK_M)
    inside = query < length
    q = load_rows(base, query, stride_t, stride_d, length, D, BLOCK_D)
    base_grad = grad_out + start * grad_stride_t + head.to(tl.int64) * grad_stride_h
    d_out = load_rows(base_grad, query, grad_stride_t, grad_stride_d, length, D, BLOCK_D)
    base_out = out + (start * heads + head) * D
    result = load_rows(base_out, query, heads * D, 1, length, D, BLOCK_D)
    row_delta = tl.sum(d_out.to(tl.float32) * result.to(tl.float32), 1)
    statistic = head.to(tl.int64) * tokens + start + query
    tl.store(delta + statistic, row_delta, mask=inside)
    row_lse = tl.load(lse + statistic, mask=inside, other=float("inf"))
    d_bias_v = row_delta
    if HAS_BIAS:
        q = (q.to(tl.float32) + load_bias(bias, 0, head, heads, D, BLOCK_D)[None, :]).to(q.dtype)
        d_bias_v = tl.sum(d_out.to(tl.float32) * load_bias(bias, 2, head, heads, D, BLOCK_D)[None, :], 1)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in range(0, length, BLOCK_N):
        d_q = _query_step(
            q, d_out, base_k, base_v, at, length, row_lse, row_delta, d_bias_v, d_q, scale, seeds, pair, query,
            threshold, rescale, stride_t, stride_d, D, BLOCK_D, BLOCK_N, HAS_BIAS, DROPOUT, PRECISION,
        )  # fmt: skip
    _store_rows(grad_qkv + head * D, query, d_q * softmax_scale, 3 * heads * D, start, length, D, BLOCK_D)


@triton.jit
def _key_step(
    k, v, base_q, base_grad, first, length, lse, delta, bias_scores, d_k, d_v, d_sums, scale, seeds, pair, key,
    threshold, rescale, stride_t, stride_d, grad_stride_t, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a block of keys; tiles are transposed: (keys, queries)."""
    query = first + tl.arange(0, BLOCK_M)
    q = load_rows(base_q, query, stride_t, stride_d, length, D, BLOCK_D)
    d_out = load_rows(base_grad, query, grad_stride_t, grad_stride_d, length, D, BLOCK_D)
    row_lse = tl.load(lse + query, mask=query < length, other=float("inf"))
    row_delta = tl.load(delta + query, mask=query < length, other=0.0)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if HAS_BIAS:
        scores += bias_scores[:, None]
    probs = tl.exp2(tl.fma(scores, scale, -row_lse[None, :]))
    d_probs = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    if DROPOUT:
        keep = is_kept(seeds, pair, query[None, :], key[:, None], threshold)
        d_probs = tl.where(keep, d_probs * rescale, 0.0)
        d_v = tl.dot(tl.where(keep, probs, 0.0).to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
    else:
        d_v = tl.dot(probs.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
    d_scores = probs * (d_probs - row_delta[None, :])
    d_k = tl.dot(d_scores.to(q.dtype), q, d_k, input_precision=PRECISION)
    if HAS_BIAS:
        d_sums += tl.sum(d_scores, 1)
    return d_k, d_v, d_sums


@triton.jit(do_not_specialize=["tokens", "sequences", "heads", "blocks", "threshold"])
def backward_key(
    qkv, bias, cu_seqlens, lse, delta, grad_out, grad_qkv, seeds,
    tokens, sequences, heads, blocks, scale, softmax_scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys. Grid: see ``locate``."""
    sequence, head, start, length, first = locate(cu_seqlens, sequences, heads, blocks, BLOCK_N, SEARCH)
    if first >= length:
        return
    pair = sequence * heads + head
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    base_grad = grad_out + start * grad_stride_t + head.to(tl.int64) * grad_stride_h
    key = first + tl.arange(0, BLOCK_N)
    k = load_rows(base + stride_p, key, stride_t, stride_d, length, D, BLOCK_D)
    v = load_rows(base + stride_p + stride_p, key, stride_t, stride_d, length, D, BLOCK_D)
    bias_scores = tl.zeros([BLOCK_N], tl.float32)
    d_sums = tl.zeros([BLOCK_N], tl.float32)
    if HAS_BIAS:
        v = (v.to(tl.float32) + load_bias(bias, 2, head, heads, D, BLOCK_D)[None, :]).to(v.dtype)
        bias_scores = tl.sum(k.to(tl.float32) * load_bias(bias, 0, head, heads, D, BLOCK_D)[None, :], 1)
    statistic = head.to(tl.int64) * tokens + start
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for at in range(0, length, BLOCK_M):
        d_k, d_v, d_sums = _key_step(
            k, v, base, base_grad, at, length, lse + statistic, delta + statistic, bias_scores, d_k, d_v, d_sums,
            scale, seeds, pair, key, threshold, rescale, stride_t, stride_d, grad_stride_t, grad_stride_d,
            D, BLOCK_D, BLOCK_M, HAS_BIAS, DROPOUT, PRECISION,
        )  # fmt: skip
    if HAS_BIAS:
        d_k += d_sums[:, None] * load_bias(bias, 0, head, heads, D, BLOCK_D)[None, :]
    if DROPOUT:
        d_v = d_v * rescale
    _store_rows(grad_qkv + (heads + head) * D, key, d_k * softmax_scale, 3 * heads * D, start, length, D, BLOCK_D)
    _store_rows(grad_qkv + (2 * heads + head) * D, key, d_v, 3 * heads * D, start, length, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "heads", "threshold"])
def backward_whole(
    qkv, bias, cu_seqlens, lse, grad_out, grad_qkv, seeds,
    tokens, heads, scale, softmax_scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All three gradients of one head of one sequence of at most BLOCK_L tokens: five products, nothing twice."""
    program = tl.program_id(0)
    head = program % heads
    sequence = program // heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    if length == 0:
        return
    pair = program
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    base_grad = grad_out + start * grad_stride_t + head.to(tl.int64) * grad_stride_h
    row = tl.arange(0, BLOCK_L)
    q = load_rows(base, row, stride_t, stride_d, length, D, BLOCK_D)
    k = load_rows(base + stride_p, row, stride_t, stride_d, length, D, BLOCK_D)
    statistic = head.to(tl.int64) * tokens + start + row
    row_lse = tl.load(lse + statistic, mask=row < length, other=float("inf"))
    if HAS_BIAS:
        q = (q.to(tl.float32) + load_bias(bias, 0, head, heads, D, BLOCK_D)[None, :]).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    probs = tl.where((row < length)[None, :], tl.exp2(tl.fma(scores, scale, -row_lse[:, None])), 0.0)
    # lse is rounded: rows that do not sum to one would leave delta off by as much, where dP - delta is next to nothing.
    probs = probs / tl.maximum(tl.sum(probs, 1), 1e-30)[:, None]
    v = load_rows(base + stride_p + stride_p, row, stride_t, stride_d, length, D, BLOCK_D)
    d_out = load_rows(base_grad, row, grad_stride_t, grad_stride_d, length, D, BLOCK_D)
    if HAS_BIAS:
        v = (v.to(tl.float32) + load_bias(bias, 2, head, heads, D, BLOCK_D)[None, :]).to(v.dtype)
    d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    kept = probs
    if DROPOUT:
        keep = is_kept(seeds, pair, row[:, None], row[None, :], threshold)
        d_probs = tl.where(keep, d_probs * rescale, 0.0)
        kept = tl.where(keep, probs * rescale, 0.0)
    d_v = tl.dot(tl.trans(kept.to(d_out.dtype)), d_out, input_precision=PRECISION)
    _store_rows(grad_qkv + (2 * heads + head) * D, row, d_v, 3 * heads * D, start, length, D, BLOCK_D)
    delta = tl.sum(probs * d_probs, 1)
    d_scores = (probs * (d_probs - delta[:, None]) * softmax_scale).to(q.dtype)
    d_q = tl.dot(d_scores, k, input_precision=PRECISION)
    _store_rows(grad_qkv + head * D, row, d_q, 3 * heads * D, start, length, D, BLOCK_D)
    d_k = tl.dot(tl.trans(d_scores), q, input_precision=PRECISION)
    _store_rows(grad_qkv + (heads + head) * D, row, d_k, 3 * heads * D, start, length, D, BLOCK_D)


@triton.jit
def _store_pairs(
    base, head, row, values, stride_t, start, length, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    at = base + ((start[:, None] + row[None, :]) * stride_t + head[:, None] * D)[:, :, None] + column[None, None, :]
    inside = (row[None, :] < length[:, None])[:, :, None] & (column < D)[None, None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "heads", "pairs", "threshold"])
def backward_pairs(
    qkv, bias, cu_seqlens, lse, grad_out, grad_qkv, seeds,
    tokens, heads, pairs, scale, softmax_scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, PAIRS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``backward_whole`` for PAIRS (sequence, head) pairs at once, each in one warp as in ``forward_pairs``."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    sequence, head = pair // heads, pair % heads
    start = tl.load(cu_seqlens + sequence, mask=pair < pairs, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1, mask=pair < pairs, other=0).to(tl.int64)
    length = (end - start).to(tl.int32)
    if tl.max(length, 0) == 0:
        return
    row = tl.arange(0, BLOCK_L)
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    q = load_pairs(base, row, stride_t, stride_d, length, D, BLOCK_D)
    k = load_pairs(base + stride_p, row, stride_t, stride_d, length, D, BLOCK_D)
    v = load_pairs(base + stride_p + stride_p, row, stride_t, stride_d, length, D, BLOCK_D)
    base_grad = grad_out + start * grad_stride_t + head.to(tl.int64) * grad_stride_h
    d_out = load_pairs(base_grad, row, grad_stride_t, grad_stride_d, length, D, BLOCK_D)
    inside = row[None, :] < length[:, None]
    statistic = (head.to(tl.int64) * tokens + start)[:, None] + row[None, :]
    row_lse = tl.load(lse + statistic, mask=inside, other=float("inf"))
    if HAS_BIAS:
        q = (q.to(tl.float32) + load_bias_pairs(bias, 0, head, heads, D, BLOCK_D)[:, None, :]).to(q.dtype)
        v = (v.to(tl.float32) + load_bias_pairs(bias, 2, head, heads, D, BLOCK_D)[:, None, :]).to(v.dtype)
    scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION)
    probs = tl.where(inside[:, None, :], tl.exp2(tl.fma(scores, scale, -row_lse[:, :, None])), 0.0)
    probs = probs / tl.maximum(tl.sum(probs, 2), 1e-30)[:, :, None]  # as in backward_whole
    d_probs = tl.dot(d_out, tl.permute(v, (0, 2, 1)), input_precision=PRECISION)
    kept = probs
    if DROPOUT:
        keep = is_kept(seeds, pair[:, None, None], row[None, :, None], row[None, None, :], threshold)
        d_probs = tl.where(keep, d_probs * rescale, 0.0)
        kept = tl.where(keep, probs * rescale, 0.0)
    d_v = tl.dot(tl.permute(kept.to(d_out.dtype), (0, 2, 1)), d_out, input_precision=PRECISION)
    _store_pairs(grad_qkv + 2 * heads * D, head, row, d_v, 3 * heads * D, start, length, D, BLOCK_D)
    delta = tl.sum(probs * d_probs, 2)
    d_scores = (probs * (d_probs - delta[:, :, None]) * softmax_scale).to(q.dtype)
    d_q = tl.dot(d_scores, k, input_precision=PRECISION)
    _store_pairs(grad_qkv, head, row, d_q, 3 * heads * D, start, length, D, BLOCK_D)
    d_k = tl.dot(tl.permute(d_scores, (0, 2, 1)), q, input_precision=PRECISION)
    _store_pairs(grad_qkv + heads * D, head, row, d_k, 3 * heads * D, start, length, D, BLOCK_D)
