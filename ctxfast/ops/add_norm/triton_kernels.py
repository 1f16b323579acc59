# SPDX-License-Identifier: Apache-2.0
"""Kernels of ``add_norm`` in Triton: whole rows in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..shared.triton_rows import is_kept, load_tile, store_partial


@triton.jit
def _statistics(z, inside, eps, N: tl.constexpr, RMS: tl.constexpr):
    """(mean, 1 / deviation) of rows that are zero where not ``inside``; the mean is 0 with RMS."""
    mean = tl.sum(z, 1) * 0.0 if RMS else tl.div_rn(tl.sum(z, 1), N * 1.0)
    centred = tl.where(inside, z - mean[:, None], 0.0)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps))


@triton.jit(do_not_specialize=["rows", "threshold"])
def forward(
    x, residual, x_bias, weight, bias, total, out, mean, rstd, seeds, rows, stride_x, stride_r, eps, threshold, rescale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """x, residual (rows, N) -> total, out (rows, N), mean and rstd (rows). Grid: blocks of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    z = load_tile(x, row, stride_x, inside, column, BLOCK_N)
    if HAS_X_BIAS:
        z += tl.load(x_bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        z = tl.where(is_kept(seeds, row[:, None], column[None, :], threshold), z * rescale, 0.0)
    if HAS_RESIDUAL:
        z += load_tile(residual, row, stride_r, inside, column, BLOCK_N)
    at = row[:, None] * N + column[None, :]
    rounded = z.to(total.dtype.element_ty)
    tl.store(total + at, rounded, mask=inside)
    # Of the total as it goes on: the backward reads it again.
    z = tl.where(inside, rounded.to(tl.float32), 0.0)
    average, inverse = _statistics(z, inside, eps, N, RMS)
    y = (z - average[:, None]) * inverse[:, None]
    y *= tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(mean + row, average, mask=row < rows)
        tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "threshold"])
def backward(
    grad_total, grad, total, weight, mean, rstd, seeds, grad_sum, grad_x, partial, rows, stride_t, stride_g,
    threshold, rescale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SUMS: tl.constexpr, SUM_X: tl.constexpr,
):  # fmt: skip
    """grad_total, grad (rows, N), those of the total and of its norm -> grad_sum, grad_x (rows, N), partial (kinds,
    programs, N).

    grad_sum is the gradient of the sum, so of the residual; grad_x differs from it by dropout alone and is stored only
    with DROPOUT. partial: sums over this program's rows of the gradients of weight, with HAS_BIAS of bias and with
    SUM_X of x_bias.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK_N)
    sum_weight = tl.zeros([ROWS, BLOCK_N], tl.float32)
    sum_bias = tl.zeros([ROWS, BLOCK_N], tl.float32)
    sum_x = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        dy = load_tile(grad, row, stride_g, inside, column, BLOCK_N)
        z = load_tile(total, row, N, inside, column, BLOCK_N)
        average = tl.load(mean + row, mask=row < rows, other=0.0)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = tl.where(inside, (z - average[:, None]) * inverse[:, None], 0.0)
        if SUMS:
            sum_weight += dy * normal
            if HAS_BIAS:
                sum_bias += dy
        dy *= tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        dz = dy - normal * (tl.sum(dy * normal, 1) / N)[:, None]
        if not RMS:
            dz -= (tl.sum(dy, 1) / N)[:, None]
        dz = dz * inverse[:, None] + load_tile(grad_total, row, stride_t, inside, column, BLOCK_N)
        dz = tl.where(inside, dz, 0.0)
        at = row[:, None] * N + column[None, :]
        tl.store(grad_sum + at, dz.to(grad_sum.dtype.element_ty), mask=inside)
        if DROPOUT:
            kept = is_kept(seeds, row[:, None], column[None, :], threshold)
            dz = tl.where(kept, dz * rescale, 0.0)
            tl.store(grad_x + at, dz.to(grad_x.dtype.element_ty), mask=inside)
        if SUMS and SUM_X:
            sum_x += dz
    if SUMS:
        store_partial(partial, 0, program, tl.sum(sum_weight, 0), column, N)
        if HAS_BIAS:
            store_partial(partial, 1, program, tl.sum(sum_bias, 0), column, N)
        if SUM_X:
            store_partial(partial, 2 if HAS_BIAS else 1, program, tl.sum(sum_x, 0), column, N)
