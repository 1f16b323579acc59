# SPDX-License-Identifier: Apache-2.0
"""Kernels of ``embed_layer_norm`` in Triton: rows are gathered from the tables both ways. Not yet run on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._core.triton_rows import is_kept, moments


@triton.jit
def _gather(table, ids, row, column, T, N, inside):
    index = tl.load(ids + row, mask=row < T, other=0).to(tl.int64)
    return tl.load(table + index[:, None] * N + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum(
    words, positions, types, tasks, word_ids, position_ids, type_ids, task_ids, row, column, T, N, inside,
    HAS_TASKS: tl.constexpr,
):  # fmt: skip
    x = _gather(words, word_ids, row, column, T, N, inside) + _gather(types, type_ids, row, column, T, N, inside)
    x += _gather(positions, position_ids, row, column, T, N, inside)
    if HAS_TASKS:
        x += _gather(tasks, task_ids, row, column, T, N, inside)
    return x


@triton.jit(do_not_specialize=["T"])
def forward(
    words, positions, types, tasks, word_ids, position_ids, type_ids, task_ids, weight, bias, seeds,
    out, mean_out, rstd_out, T, N, eps, threshold, scale,
    HAS_TASKS: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < T)[:, None] & (column < N)[None, :]
    x = _sum(words, positions, types, tasks, word_ids, position_ids, type_ids, task_ids, row, column, T, N, inside,
             HAS_TASKS)  # fmt: skip
    mean, rstd = moments(x, inside, N, eps)
    w = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    result = (x - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    if DROPOUT:
        result = tl.where(is_kept(seeds, row, BLOCK, threshold), result * scale, 0.0)
    tl.store(out + row[:, None] * N + column[None, :], result.to(out.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(mean_out + row, mean, mask=row < T)
        tl.store(rstd_out + row, rstd, mask=row < T)


@triton.jit(do_not_specialize=["T"])
def backward(
    grad, words, positions, types, tasks, word_ids, position_ids, type_ids, task_ids, weight, seeds,
    mean_in, rstd_in, grad_sum, partial, T, N, threshold, scale,
    HAS_TASKS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_sum (T, N): of the sum of embeddings. partial (programs, 2, N) float32: sums for weight and bias."""
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    while first < T:
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < T)[:, None] & (column < N)[None, :]
        x = _sum(words, positions, types, tasks, word_ids, position_ids, type_ids, task_ids, row, column, T, N,
                 inside, HAS_TASKS)  # fmt: skip
        mean = tl.load(mean_in + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_in + row, mask=row < T, other=0.0)
        normed = tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0)
        at = row[:, None] * N + column[None, :]
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if DROPOUT:
            dy = tl.where(is_kept(seeds, row, BLOCK, threshold), dy * scale, 0.0)
        of_weight += tl.sum(dy * normed, 0)
        of_bias += tl.sum(dy, 0)
        dy = dy * w[None, :]
        along = tl.sum(dy * normed, 1) / N
        level = tl.sum(dy, 1) / N
        d = (dy - level[:, None] - normed * along[:, None]) * rstd[:, None]
        tl.store(grad_sum + at, d.to(grad_sum.dtype.element_ty), mask=inside)
        first += step
    to = partial + tl.program_id(0).to(tl.int64) * 2 * N + column
    tl.store(to, of_weight, mask=column < N)
    tl.store(to + N, of_bias, mask=column < N)
