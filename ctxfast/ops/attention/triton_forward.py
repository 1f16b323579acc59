# SPDX-License-Identifier: Apache-2.0
"""Forward kernels of ``attention`` in Triton.

Only the query gets its bias on load. Softmax does not see the key's (it moves all scores of a query alike), and the
value's is added to the finished row, so keys and values stream through asynchronous copies untouched.
Scores are kept in units of log2: ``scale`` is softmax_scale * log2(e), taken without its sign (``NEGATIVE``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_dropout import is_kept


@triton.jit
def locate(cu_seqlens, sequences, heads, blocks, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """What this program works on: sequence, head, the sequence's first row and length, the block's first row in it.

    Heads are fastest (neighbouring heads share memory lines). SEARCH 0: ``blocks`` programs a sequence, and
    those past its end have nothing to do. Otherwise a power of two above ``sequences``: sequence i begins at block
    cu_seqlens[i] // BLOCK + i, which leaves room for all of its blocks, and a program finds its own by counting.
    """
    program = tl.program_id(0)
    head = program % heads
    block = program // heads
    if SEARCH == 0:
        sequence = block // blocks
        first = block % blocks * BLOCK
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
    else:
        index = tl.arange(0, SEARCH)
        starts = tl.load(cu_seqlens + index, mask=index < sequences, other=0)
        begins = (starts // BLOCK).to(tl.int32) + index
        sequence = tl.sum(((begins <= block) & (index < sequences)).to(tl.int32)) - 1
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        first = (block - sequence - (start // BLOCK).to(tl.int32)) * BLOCK
    length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    return sequence, head, start, length, first


@triton.jit
def load_rows(base, row, stride_t, stride_d, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``row`` of one head, (rows, BLOCK_D), zeros past ``length`` and past D."""
    column = tl.arange(0, BLOCK_D)
    at = base + row.to(tl.int64)[:, None] * stride_t + (column * stride_d)[None, :]
    inside = (row < length)[:, None]
    if D != BLOCK_D:
        inside = inside & (column < D)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_bias(bias, part, head, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Bias of the query (part 0), key (1) or value (2) of one head, float32 (BLOCK_D)."""
    column = tl.arange(0, BLOCK_D)
    return tl.load(bias + (part * heads + head) * D + column, mask=column < D, other=0.0).to(tl.float32)


@triton.jit
def _attend(
    q, base_k, base_v, first, length, largest, total, kept, context,
    scale, seeds, pair, query, threshold, stride_t, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax; SINGLE: it is the only one, nothing has to be rescaled."""
    key = first + tl.arange(0, BLOCK_N)
    k = load_rows(base_k, key, stride_t, stride_d, length, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.where((key < length)[None, :], scores, float("-inf"))
    before = largest
    largest = tl.max(scores, 1) * scale
    if not SINGLE:
        largest = tl.maximum(before, largest)
    probs = tl.exp2(tl.fma(scores, scale, -largest[:, None]))
    added = tl.sum(probs, 1)
    if DROPOUT:
        keep = is_kept(seeds, pair, query[:, None], key[None, :], threshold)
        probs = tl.where(keep, probs, 0.0)
    v = load_rows(base_v, key, stride_t, stride_d, length, D, BLOCK_D)
    if SINGLE:
        total = added
        if HAS_BIAS and DROPOUT:
            kept = tl.sum(probs, 1)
        context = tl.dot(probs.to(v.dtype), v, input_precision=PRECISION)
    else:
        shrink = tl.exp2(before - largest)
        total = total * shrink + added
        if HAS_BIAS and DROPOUT:
            kept = kept * shrink + tl.sum(probs, 1)
        context = tl.dot(probs.to(v.dtype), v, context * shrink[:, None], input_precision=PRECISION)
    return largest, total, kept, context


@triton.jit(do_not_specialize=["tokens", "sequences", "heads", "blocks", "threshold"])
def forward_blocks(
    qkv, bias, cu_seqlens, out, lse, seeds, tokens, sequences, heads, blocks, scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, SAVE_LSE: tl.constexpr,
    SINGLE: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one sequence: qkv (T, 3, H, D) -> out (T, H, D), lse (H, T) in log2.

    Grid: see ``locate``; a program without queries leaves at once. SINGLE: no sequence has more than BLOCK_N tokens, so
    a head's keys and values are loaded once and softmax takes one pass.
    """
    sequence, head, start, length, first = locate(cu_seqlens, sequences, heads, blocks, BLOCK_M, SEARCH)
    if first >= length:
        return
    pair = sequence * heads + head
    base = qkv + start * stride_t + head.to(tl.int64) * stride_h
    base_k = base + stride_p
    base_v = base_k + stride_p
    query = first + tl.arange(0, BLOCK_M)
    q = load_rows(base, query, stride_t, stride_d, length, D, BLOCK_D)
    if HAS_BIAS:
        q = (q.to(tl.float32) + load_bias(bias, 0, head, heads, D, BLOCK_D)[None, :]).to(q.dtype)
    if NEGATIVE:
        q = -q
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    kept = tl.zeros([BLOCK_M], tl.float32)
    context = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SINGLE:
        largest, total, kept, context = _attend(
            q, base_k, base_v, 0, length, largest, total, kept, context, scale, seeds, pair, query, threshold,
            stride_t, stride_d, D, BLOCK_D, BLOCK_N, HAS_BIAS, DROPOUT, PRECISION, True,
        )  # fmt: skip
    else:
        for at in range(0, length, BLOCK_N):
            largest, total, kept, context = _attend(
                q, base_k, base_v, at, length, largest, total, kept, context, scale, seeds, pair, query, threshold,
                stride_t, stride_d, D, BLOCK_D, BLOCK_N, HAS_BIAS, DROPOUT, PRECISION, False,
            )  # fmt: skip
    share = 1.0 / total
    if DROPOUT:
        share = share * rescale
    context = context * share[:, None]
    if HAS_BIAS:
        bias_v = load_bias(bias, 2, head, heads, D, BLOCK_D)
        if DROPOUT:
            context += (kept * share)[:, None] * bias_v[None, :]
        else:
            context += bias_v[None, :]
    column = tl.arange(0, BLOCK_D)
    inside = query < length
    at = out + ((start + query) * heads + head)[:, None] * D + column[None, :]
    tl.store(at, context.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])
    if SAVE_LSE:
        tl.store(lse + head.to(tl.int64) * tokens + start + query, largest + tl.log2(total), mask=inside)


@triton.jit
def load_pairs(base, row, stride_t, stride_d, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of several heads, (pairs, rows, BLOCK_D), zeros past each pair's ``length`` and past D."""
    column = tl.arange(0, BLOCK_D)
    at = base[:, None, None] + (row.to(tl.int64) * stride_t)[None, :, None] + (column * stride_d)[None, None, :]
    inside = (row[None, :] < length[:, None])[:, :, None]
    if D != BLOCK_D:
        inside = inside & (column < D)[None, None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_bias_pairs(bias, part, head, heads, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Bias of several heads, float32 (pairs, BLOCK_D)."""
    column = tl.arange(0, BLOCK_D)
    at = bias + ((part * heads + head) * D)[:, None] + column[None, :]
    return tl.load(at, mask=(column < D)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens", "heads", "pairs", "threshold"])
def forward_pairs(
    qkv, bias, cu_seqlens, out, lse, seeds, tokens, heads, pairs, scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, PAIRS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, SAVE_LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Sequences of at most BLOCK_L tokens: PAIRS (sequence, head) pairs a program, each whole in one warp.

    The batched product gives every pair to one warp, so softmax never waits for another warp.
    """
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
    if HAS_BIAS:
        q = (q.to(tl.float32) + load_bias_pairs(bias, 0, head, heads, D, BLOCK_D)[:, None, :]).to(q.dtype)
    if NEGATIVE:
        q = -q
    inside = row[None, :] < length[:, None]
    scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION)
    # Finite, so that a pair without tokens meets no nan.
    scores = tl.where(inside[:, None, :], scores * scale, -1e30)
    largest = tl.max(scores, 2)
    probs = tl.exp2(scores - largest[:, :, None])
    total = tl.sum(probs, 2)
    share = 1.0 / total
    if DROPOUT:
        keep = is_kept(seeds, pair[:, None, None], row[None, :, None], row[None, None, :], threshold)
        probs = tl.where(keep, probs, 0.0)
        share = share * rescale
    context = tl.dot(probs.to(v.dtype), v, input_precision=PRECISION) * share[:, :, None]
    if HAS_BIAS:
        bias_v = load_bias_pairs(bias, 2, head, heads, D, BLOCK_D)
        if DROPOUT:
            context += (tl.sum(probs, 2) * share)[:, :, None] * bias_v[:, None, :]
        else:
            context += bias_v[:, None, :]
    column = tl.arange(0, BLOCK_D)
    token = start[:, None] + row[None, :]
    at = out + ((token * heads + head[:, None]) * D)[:, :, None] + column[None, None, :]
    tl.store(at, context.to(out.dtype.element_ty), mask=inside[:, :, None] & (column < D)[None, None, :])
    if SAVE_LSE:
        tl.store(lse + head.to(tl.int64)[:, None] * tokens + token, largest + tl.log2(total), mask=inside)
