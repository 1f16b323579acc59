# SPDX-License-Identifier: Apache-2.0
"""Forward kernels of ``attention`` in Triton.

Scores are kept in units of log2: ``scale`` is softmax_scale * log2(e), taken without its sign (``NEGATIVE``). Queries,
keys and values are multiplied as they lie in memory: a factor that is changed in registers first makes ptxas serialise
Hopper's products (C7515).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_dropout import is_kept


@triton.jit
def locate(cu_seqlens, table, heads, blocks, BLOCK: tl.constexpr, HAS_TABLE: tl.constexpr):
    """(sequence, head, first token, its length, first token of the block inside it) of this program.

    Programs stand block after block, heads innermost (neighbours then read one cache line of every token, and the
    longest blocks begin first where a table says which those are). Without one there are ``blocks`` programs a
    sequence, and those past its end have nothing to do; ``table``: see ``triton_blocks``.
    """
    program = tl.program_id(0)
    head = program % heads
    block = program // heads
    if HAS_TABLE:
        at = table + block * 4
        sequence, first, start, length = tl.load(at), tl.load(at + 1), tl.load(at + 2).to(tl.int64), tl.load(at + 3)
    else:
        sequence = block // blocks
        first = block % blocks * BLOCK
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens + sequence + 1) - start).to(tl.int32)
    return sequence, head, start, length, first


@triton.jit
def met(first, length, window, OWN: tl.constexpr, OTHER: tl.constexpr, WINDOW: tl.constexpr):
    """(begin, whole, end): blocks of OTHER tokens that a block of OWN from ``first`` on meets lie in begin..end - 1; of
    them those up to ``whole`` lie inside the sequence."""
    whole = length // OTHER * OTHER
    if WINDOW:
        begin = tl.maximum(first - window, 0) // OTHER * OTHER
        end = tl.minimum(first + OWN + window, length)
        whole = tl.maximum(begin, tl.minimum(whole, (end + (OTHER - 1)) // OTHER * OTHER))
    else:
        begin, end = 0, length
    return begin, whole, end


@triton.jit
def load_rows(
    base, row, stride_t, stride_d, length, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr = False
):  # fmt: skip
    """Rows ``row`` of one head, (rows, BLOCK_D), zeros past ``length`` and past D. WHOLE: none is past ``length``."""
    column = tl.arange(0, BLOCK_D)
    at = base + row.to(tl.int64)[:, None] * stride_t + (column * stride_d)[None, :]
    if D != BLOCK_D:
        inside = (column < D)[None, :]
        if not WHOLE:
            inside = inside & (row < length)[:, None]
        return tl.load(at, mask=inside, other=0.0)
    elif WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=(row < length)[:, None], other=0.0)


@triton.jit
def placed(scores, distance, center, scale, most, window, RELATIVE: tl.constexpr, WINDOW: tl.constexpr):
    """Scores in units of log2 for keys ``distance`` places behind their queries: with the relative bias (``center``
    points at a head's entry for distance 0, of ``most`` to either side), and next to none outside the window: finite,
    so that a query none of whose keys are in a block meets no nan."""
    scores = scores * scale
    if RELATIVE:
        nearest = tl.minimum(tl.maximum(distance, -most), most)
        scores += tl.load(center + nearest) * 1.4426950408889634
    if WINDOW:
        scores = tl.where((distance <= window) & (distance >= -window), scores, -1e30)
    return scores


@triton.jit
def _attend(
    q, base_k, base_v, first, length, largest, total, context,
    scale, seeds, pair, first_query, threshold, center, most, window, stride_t, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr,
    RELATIVE: tl.constexpr, WINDOW: tl.constexpr, SINGLE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax.

    SINGLE: it is the only one, nothing has to be rescaled. WHOLE: it lies inside the sequence, nothing is masked.
    """
    column = tl.arange(0, BLOCK_N)
    key = first + column
    k = load_rows(base_k, key, stride_t, stride_d, length, D, BLOCK_D, WHOLE)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if NEGATIVE:
        scores = -scores
    if RELATIVE or WINDOW:
        distance = key[None, :] - (first_query + tl.arange(0, BLOCK_M))[:, None]
        scores = placed(scores, distance, center, scale, most, window, RELATIVE, WINDOW)
    if not WHOLE:
        scores = tl.where((key < length)[None, :], scores, float("-inf"))
    before = largest
    largest = tl.max(scores, 1)
    if not (RELATIVE or WINDOW):
        largest = largest * scale
    if not SINGLE:
        largest = tl.maximum(before, largest)
    if RELATIVE or WINDOW:
        probs = tl.exp2(scores - largest[:, None])
    else:
        probs = tl.exp2(tl.fma(scores, scale, -largest[:, None]))
    added = tl.sum(probs, 1)
    if DROPOUT:
        keep = is_kept(seeds, pair, first_query, tl.arange(0, BLOCK_M)[:, None], first, column[None, :], threshold)
        probs = tl.where(keep, probs, 0.0)
    v = load_rows(base_v, key, stride_t, stride_d, length, D, BLOCK_D, WHOLE)
    if SINGLE:
        total = added
        context = tl.dot(probs.to(v.dtype), v, input_precision=PRECISION)
    else:
        shrink = tl.exp2(before - largest)
        total = total * shrink + added
        context = tl.dot(probs.to(v.dtype), v, context * shrink[:, None], input_precision=PRECISION)
    return largest, total, context


@triton.jit(do_not_specialize=["tokens", "heads", "blocks", "most", "window", "threshold"])
def forward_blocks(
    qkv, cu_seqlens, table, out, lse, seeds, relative_bias, tokens, heads, blocks, most, window, scale, threshold,
    rescale, stride_t, stride_p, stride_h, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, SAVE_LSE: tl.constexpr,
    SINGLE: tl.constexpr, HAS_TABLE: tl.constexpr, PRECISION: tl.constexpr,
    RELATIVE: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one sequence: qkv (T, 3, H, D) -> out (T, H, D), lse (H, T) in log2.

    GROUP heads of queries share one of keys and values, which begin ``stride_p`` behind the first query. ``most``: see
    ``placed``.

    Grid: see ``locate``; a program without queries leaves at once. SINGLE: no sequence has more than BLOCK_N tokens, so
    a head's keys and values are loaded once and softmax takes one pass.
    """
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
    q = load_rows(base, query, stride_t, stride_d, length, D, BLOCK_D)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    context = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SINGLE:
        largest, total, context = _attend(
            q, base_k, base_v, 0, length, largest, total, context, scale, seeds, pair, first, threshold, center, most,
            window, stride_t, stride_d, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, NEGATIVE, PRECISION, RELATIVE, WINDOW,
            True, False,
        )  # fmt: skip
    else:
        begin, whole, end = met(first, length, window, BLOCK_M, BLOCK_N, WINDOW)
        for at in range(begin, whole, BLOCK_N):
            largest, total, context = _attend(
                q, base_k, base_v, at, length, largest, total, context, scale, seeds, pair, first, threshold, center,
                most, window, stride_t, stride_d, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, NEGATIVE, PRECISION, RELATIVE,
                WINDOW, False, True,
            )  # fmt: skip
        for at in range(whole, end, BLOCK_N):  # once at most; as a branch it costs registers
            largest, total, context = _attend(
                q, base_k, base_v, at, length, largest, total, context, scale, seeds, pair, first, threshold, center,
                most, window, stride_t, stride_d, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, NEGATIVE, PRECISION, RELATIVE,
                WINDOW, False, False,
            )  # fmt: skip
    share = 1.0 / total
    if DROPOUT:
        share = share * rescale
    context = context * share[:, None]
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


@triton.jit(do_not_specialize=["tokens", "heads", "pairs", "most", "window", "threshold"])
def forward_pairs(
    qkv, cu_seqlens, out, lse, seeds, relative_bias, tokens, heads, pairs, most, window, scale, threshold, rescale,
    stride_t, stride_p, stride_h, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, PAIRS: tl.constexpr,
    DROPOUT: tl.constexpr, NEGATIVE: tl.constexpr, SAVE_LSE: tl.constexpr, PRECISION: tl.constexpr,
    RELATIVE: tl.constexpr, WINDOW: tl.constexpr, GROUP: tl.constexpr,
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
    if GROUP == 1:
        base_k = base + stride_p
        base_v = base_k + stride_p
    else:
        base_k = qkv + start * stride_t + stride_p + (head // GROUP).to(tl.int64) * stride_h
        base_v = base_k + stride_p // GROUP
    k = load_pairs(base_k, row, stride_t, stride_d, length, D, BLOCK_D)
    v = load_pairs(base_v, row, stride_t, stride_d, length, D, BLOCK_D)
    inside = row[None, :] < length[:, None]
    scores = tl.dot(q, tl.permute(k, (0, 2, 1)), input_precision=PRECISION)
    if NEGATIVE:
        scores = -scores
    # Finite, so that a pair without tokens meets no nan.
    if RELATIVE or WINDOW:
        center = relative_bias
        if RELATIVE:
            center = (relative_bias + head * (2 * most + 1) + most)[:, None, None]
        scores = placed(scores, (row[None, :] - row[:, None])[None], center, scale, most, window, RELATIVE, WINDOW)
    else:
        scores = scores * scale
    scores = tl.where(inside[:, None, :], scores, -1e30)
    largest = tl.max(scores, 2)
    probs = tl.exp2(scores - largest[:, :, None])
    total = tl.sum(probs, 2)
    share = 1.0 / total
    if DROPOUT:
        keep = is_kept(seeds, pair[:, None, None], 0, row[None, :, None], 0, row[None, None, :], threshold)
        probs = tl.where(keep, probs, 0.0)
        share = share * rescale
    context = tl.dot(probs.to(v.dtype), v, input_precision=PRECISION) * share[:, :, None]
    column = tl.arange(0, BLOCK_D)
    token = start[:, None] + row[None, :]
    at = out + ((token * heads + head[:, None]) * D)[:, :, None] + column[None, None, :]
    tl.store(at, context.to(out.dtype.element_ty), mask=inside[:, :, None] & (column < D)[None, None, :])
    if SAVE_LSE:
        tl.store(lse + head.to(tl.int64)[:, None] * tokens + token, largest + tl.log2(total), mask=inside)
