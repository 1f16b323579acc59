# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of ``attention`` in Triton, without atomics.

They write the gradients of every head's query, key and value, (T, 3, H, D), where heads share keys and values too.

With P the softmax, M the dropout mask over its share kept (ones without), dO the gradient and O the result:
dV = (P M)^T dO, dP = M (dO V^T), delta = rowsum(dO O) = rowsum(P dP), dS = P (dP - delta), dQ = dS K, dK = dS^T Q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_dropout import is_kept
from .triton_forward import load_pairs, load_rows, locate, met, placed


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
    q, d_out, base_k, base_v, first, length, lse, delta, d_q, scale, seeds, pair, first_query, threshold, rescale,
    center, most, window, stride_t, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, RELATIVE: tl.constexpr, WINDOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to the gradient of a block of queries; WHOLE: it lies inside the sequence."""
    column = tl.arange(0, BLOCK_N)
    key = first + column
    k = load_rows(base_k, key, stride_t, stride_d, length, D, BLOCK_D, WHOLE)
    v = load_rows(base_v, key, stride_t, stride_d, length, D, BLOCK_D, WHOLE)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if RELATIVE or WINDOW:
        distance = key[None, :] - (first_query + tl.arange(0, BLOCK_M))[:, None]
        scores = placed(scores, distance, center, scale, most, window, RELATIVE, WINDOW)
        probs = tl.exp2(scores - lse[:, None])
    else:
        probs = tl.exp2(tl.fma(scores, scale, -lse[:, None]))
    if not WHOLE:
        probs = tl.where((key < length)[None, :], probs, 0.0)
    d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        keep = is_kept(seeds, pair, first_query, tl.arange(0, BLOCK_M)[:, None], first, column[None, :], threshold)
        d_probs = tl.where(keep, d_probs * rescale, 0.0)
    d_scores = probs * (d_probs - delta[:, None])
    return tl.dot(d_scores.to(k.dtype), k, d_q, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "heads", "blocks", "most", "window", "threshold"])
def backward_query(
    qkv, cu_seqlens, table, out, lse, delta, grad_out, grad_qkv, seeds, relative_bias,
    tokens, heads, blocks, most, window, scale, softmax_scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
    RELATIVE: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries, and delta (H, T), which ``backward_key`` reads. Grid: see ``locate``."""
    sequence, head, start, length, first = locate(cu_seqlens, table, heads, blocks, BLOCK_M, HAS_TABLE)
    if first >= length:
        return
    pair = sequence * heads + head
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    if GROUP == 1:
        base_k = base + stride_p
        base_v = base_k + stride_p
    else:
        base_k = qkv + start * stride_t + stride_p + (head // GROUP).to(tl.int64) * stride_h
        base_v = base_k + stride_p // GROUP
    center = relative_bias
    if RELATIVE:
        center = relative_bias + head * (2 * most + 1) + most
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
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, whole, end = met(first, length, window, BLOCK_M, BLOCK_N, WINDOW)
    for at in range(begin, whole, BLOCK_N):
        d_q = _query_step(
            q, d_out, base_k, base_v, at, length, row_lse, row_delta, d_q, scale, seeds, pair, first, threshold,
            rescale, center, most, window, stride_t, stride_d, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION,
            RELATIVE, WINDOW, True,
        )  # fmt: skip
    for at in range(whole, end, BLOCK_N):  # once at most
        d_q = _query_step(
            q, d_out, base_k, base_v, at, length, row_lse, row_delta, d_q, scale, seeds, pair, first, threshold,
            rescale, center, most, window, stride_t, stride_d, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION,
            RELATIVE, WINDOW, False,
        )  # fmt: skip
    _store_rows(grad_qkv + head * D, query, d_q * softmax_scale, 3 * heads * D, start, length, D, BLOCK_D)


@triton.jit
def _key_step(
    k, v, base_q, base_grad, first, length, lse, delta, d_k, d_v, scale, seeds, pair, first_key,
    threshold, rescale, center, most, window, stride_t, stride_d, grad_stride_t, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, RELATIVE: tl.constexpr, WINDOW: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What one block of queries adds to the gradients of a block of keys; WHOLE: it lies inside the sequence.

    Tiles are (queries, keys), as in the other kernels, and turned by way of shared memory for the last two products:
    a transposed tile would draw twice as often (see ``is_kept``).
    """
    row = tl.arange(0, BLOCK_M)
    query = first + row
    q = load_rows(base_q, query, stride_t, stride_d, length, D, BLOCK_D, WHOLE)
    d_out = load_rows(base_grad, query, grad_stride_t, grad_stride_d, length, D, BLOCK_D, WHOLE)
    if WHOLE:
        row_lse, row_delta = tl.load(lse + query), tl.load(delta + query)
    else:
        row_lse = tl.load(lse + query, mask=query < length, other=float("inf"))
        row_delta = tl.load(delta + query, mask=query < length, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if RELATIVE or WINDOW:
        distance = (first_key + tl.arange(0, BLOCK_N))[None, :] - query[:, None]
        scores = placed(scores, distance, center, scale, most, window, RELATIVE, WINDOW)
        probs = tl.exp2(scores - row_lse[:, None])
    else:
        probs = tl.exp2(tl.fma(scores, scale, -row_lse[:, None]))
    d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    kept = probs
    if DROPOUT:
        keep = is_kept(seeds, pair, first, row[:, None], first_key, tl.arange(0, BLOCK_N)[None, :], threshold)
        d_probs = tl.where(keep, d_probs * rescale, 0.0)
        kept = tl.where(keep, probs, 0.0)
    d_v = tl.dot(tl.trans(kept.to(d_out.dtype)), d_out, d_v, input_precision=PRECISION)
    d_scores = probs * (d_probs - row_delta[:, None])
    d_k = tl.dot(tl.trans(d_scores.to(q.dtype)), q, d_k, input_precision=PRECISION)
    return d_k, d_v


@triton.jit(do_not_specialize=["tokens", "heads", "blocks", "most", "window", "threshold"])
def backward_key(
    qkv, cu_seqlens, table, lse, delta, grad_out, grad_qkv, seeds, relative_bias,
    tokens, heads, blocks, most, window, scale, softmax_scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
    RELATIVE: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys. Grid: see ``locate``."""
    sequence, head, start, length, first = locate(cu_seqlens, table, heads, blocks, BLOCK_N, HAS_TABLE)
    if first >= length:
        return
    pair = sequence * heads + head
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    if GROUP == 1:
        base_k = base + stride_p
        base_v = base_k + stride_p
    else:
        base_k = qkv + start * stride_t + stride_p + (head // GROUP).to(tl.int64) * stride_h
        base_v = base_k + stride_p // GROUP
    center = relative_bias
    if RELATIVE:
        center = relative_bias + head * (2 * most + 1) + most
    base_grad = grad_out + start * grad_stride_t + head.to(tl.int64) * grad_stride_h
    key = first + tl.arange(0, BLOCK_N)
    k = load_rows(base_k, key, stride_t, stride_d, length, D, BLOCK_D)
    v = load_rows(base_v, key, stride_t, stride_d, length, D, BLOCK_D)
    statistic = head.to(tl.int64) * tokens + start
    d_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    begin, whole, end = met(first, length, window, BLOCK_N, BLOCK_M, WINDOW)
    for at in range(begin, whole, BLOCK_M):
        d_k, d_v = _key_step(
            k, v, base, base_grad, at, length, lse + statistic, delta + statistic, d_k, d_v, scale, seeds, pair, first,
            threshold, rescale, center, most, window, stride_t, stride_d, grad_stride_t, grad_stride_d,
            D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, RELATIVE, WINDOW, True,
        )  # fmt: skip
    for at in range(whole, end, BLOCK_M):  # once at most
        d_k, d_v = _key_step(
            k, v, base, base_grad, at, length, lse + statistic, delta + statistic, d_k, d_v, scale, seeds, pair, first,
            threshold, rescale, center, most, window, stride_t, stride_d, grad_stride_t, grad_stride_d,
            D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, PRECISION, RELATIVE, WINDOW, False,
        )  # fmt: skip
    if DROPOUT:
        d_v = d_v * rescale
    _store_rows(grad_qkv + (heads + head) * D, key, d_k * softmax_scale, 3 * heads * D, start, length, D, BLOCK_D)
    _store_rows(grad_qkv + (2 * heads + head) * D, key, d_v, 3 * heads * D, start, length, D, BLOCK_D)


@triton.jit(do_not_specialize=["tokens", "heads", "most", "window", "threshold"])
def backward_whole(
    qkv, cu_seqlens, lse, grad_out, grad_qkv, seeds, relative_bias,
    tokens, heads, most, window, scale, softmax_scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    RELATIVE: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All three gradients of one head of one sequence of at most BLOCK_L tokens: five products, nothing twice."""
    pair = tl.program_id(0)
    head = pair % heads
    sequence = pair // heads
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    if length == 0:
        return
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    if GROUP == 1:
        base_k = base + stride_p
        base_v = base_k + stride_p
    else:
        base_k = qkv + start * stride_t + stride_p + (head // GROUP).to(tl.int64) * stride_h
        base_v = base_k + stride_p // GROUP
    center = relative_bias
    if RELATIVE:
        center = relative_bias + head * (2 * most + 1) + most
    base_grad = grad_out + start * grad_stride_t + head.to(tl.int64) * grad_stride_h
    row = tl.arange(0, BLOCK_L)
    q = load_rows(base, row, stride_t, stride_d, length, D, BLOCK_D)
    k = load_rows(base_k, row, stride_t, stride_d, length, D, BLOCK_D)
    statistic = head.to(tl.int64) * tokens + start + row
    row_lse = tl.load(lse + statistic, mask=row < length, other=float("inf"))
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if RELATIVE or WINDOW:
        distance = row[None, :] - row[:, None]
        scores = placed(scores, distance, center, scale, most, window, RELATIVE, WINDOW)
        probs = tl.exp2(scores - row_lse[:, None])
    else:
        probs = tl.exp2(tl.fma(scores, scale, -row_lse[:, None]))
    probs = tl.where((row < length)[None, :], probs, 0.0)
    # lse is rounded: rows that do not sum to one would leave delta off by as much, where dP - delta is next to nothing.
    probs = probs / tl.maximum(tl.sum(probs, 1), 1e-30)[:, None]
    v = load_rows(base_v, row, stride_t, stride_d, length, D, BLOCK_D)
    d_out = load_rows(base_grad, row, grad_stride_t, grad_stride_d, length, D, BLOCK_D)
    d_probs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    kept = probs
    if DROPOUT:
        keep = is_kept(seeds, pair, 0, row[:, None], 0, row[None, :], threshold)
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


@triton.jit(do_not_specialize=["tokens", "heads", "pairs", "most", "window", "threshold"])
def backward_pairs(
    qkv, cu_seqlens, lse, grad_out, grad_qkv, seeds, relative_bias,
    tokens, heads, pairs, most, window, scale, softmax_scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d, grad_stride_t, grad_stride_h, grad_stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, PAIRS: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    RELATIVE: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
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
    if GROUP == 1:
        base_k = base + stride_p
        base_v = base_k + stride_p
    else:
        base_k = qkv + start * stride_t + stride_p + (head // GROUP).to(tl.int64) * stride_h
        base_v = base_k + stride_p // GROUP
    q = load_pairs(base, row, stride_t, stride_d, length, D, BLOCK_D)
    k = load_pairs(base_k, row, stride_t, stride_d, length, D, BLOCK_D)
    v = load_pairs(base_v, row, stride_t, stride_d, length, D, BLOCK_D)
    base_grad = grad_out + start * grad_stride_t + head.to(tl.int64) * grad_stride_h
    d_out = load_pairs(base_grad, row, grad_stride_t, grad_stride_d, length, D, BLOCK_D)
    inside = row[None, :] < length[:, None]
    statistic = (head.to(tl.int64) * tokens + start)[:, None] + row[None, :]
    row_lse = tl.load(lse + statistic, mask=inside, other=float("inf"))
    scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION)
    center = relative_bias
    if RELATIVE:
        center = (relative_bias + head * (2 * most + 1) + most)[:, None, None]
    if RELATIVE or WINDOW:
        distance = (row[None, :] - row[:, None])[None]
        scores = placed(scores, distance, center, scale, most, window, RELATIVE, WINDOW)
        probs = tl.exp2(scores - row_lse[:, :, None])
    else:
        probs = tl.exp2(tl.fma(scores, scale, -row_lse[:, :, None]))
    probs = tl.where(inside[:, None, :], probs, 0.0)
    probs = probs / tl.maximum(tl.sum(probs, 2), 1e-30)[:, :, None]  # as in backward_whole
    d_probs = tl.dot(d_out, tl.permute(v, (0, 2, 1)), input_precision=PRECISION)
    kept = probs
    if DROPOUT:
        keep = is_kept(seeds, pair[:, None, None], 0, row[None, :, None], 0, row[None, None, :], threshold)
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
