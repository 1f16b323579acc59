# SPDX-License-Identifier: Apache-2.0
"""Kernels of ``embed_layer_norm`` in Triton: table rows gathered, summed and normalised in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..shared.triton_rows import is_kept, load_tile, normalised_gradient, statistics, store_partial


@triton.jit
def _gathered(ids, table, row, rows, inside, column, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows ``ids[row]`` of a contiguous table (any, N)."""
    index = tl.load(ids + row, mask=row < rows, other=0).to(tl.int64)
    return load_tile(table, index, N, inside, column, BLOCK_N)


@triton.jit
def _sum_of_tables(
    ids, positions, types, tasks, word, position, kind, task, row, rows, inside, column,
    N: tl.constexpr, BLOCK_N: tl.constexpr, HAS_TASK: tl.constexpr,
):  # fmt: skip
    z = _gathered(ids, word, row, rows, inside, column, N, BLOCK_N)
    z += _gathered(types, kind, row, rows, inside, column, N, BLOCK_N)
    z += _gathered(positions, position, row, rows, inside, column, N, BLOCK_N)
    if HAS_TASK:
        z += _gathered(tasks, task, row, rows, inside, column, N, BLOCK_N)
    return z


@triton.jit(do_not_specialize=["rows", "threshold"])
def forward(
    ids, positions, types, tasks, word, position, kind, task, weight, bias, out, mean, rstd, seeds,
    rows, eps, threshold, rescale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HAS_TASK: tl.constexpr, DROPOUT: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """ids (rows), tables (any, N) -> out (rows, N), mean and rstd (rows). Grid: blocks of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    z = _sum_of_tables(
        ids, positions, types, tasks, word, position, kind, task, row, rows, inside, column, N, BLOCK_N, HAS_TASK
    )
    average, inverse, normal = statistics(z, inside, eps, N)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    y = normal * scale[None, :] + shift[None, :]
    if DROPOUT:
        y = tl.where(is_kept(seeds, row[:, None], column[None, :], threshold), y * rescale, 0.0)
    tl.store(out + row[:, None] * N + column[None, :], y.to(out.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(mean + row, average, mask=row < rows)
        tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "threshold"])
def backward(
    grad, ids, positions, types, tasks, word, position, kind, task, weight, mean, rstd, seeds, grad_sum, partial,
    rows, stride_g, threshold, rescale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HAS_TASK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """grad (rows, N) -> grad_sum (rows, N), the gradient of every table row read; partial (2, programs, N)."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    if N <= 4096:
        scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([ROWS, BLOCK_N], tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        dy = load_tile(grad, row, stride_g, inside, column, BLOCK_N)
        if DROPOUT:
            dy = tl.where(is_kept(seeds, row[:, None], column[None, :], threshold), dy * rescale, 0.0)
        z = _sum_of_tables(
            ids, positions, types, tasks, word, position, kind, task, row, rows, inside, column, N, BLOCK_N, HAS_TASK
        )
        average = tl.load(mean + row, mask=row < rows, other=0.0)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = tl.where(inside, (z - average[:, None]) * inverse[:, None], 0.0)
        # Gradient in first, sums at once, scale for every tile: in another order the longest rows spill registers.
        sum_weight += dy * normal
        sum_bias += dy
        if N > 4096:
            scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
        dz = normalised_gradient(dy * scale[None, :], normal, inverse, N)
        tl.store(grad_sum + row[:, None] * N + column[None, :], dz.to(grad_sum.dtype.element_ty), mask=inside)
    store_partial(partial, 0, program, tl.sum(sum_weight, 0), column, N)
    store_partial(partial, 1, program, tl.sum(sum_bias, 0), column, N)
