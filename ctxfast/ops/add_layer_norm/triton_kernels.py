# SPDX-License-Identifier: Apache-2.0
"""Kernels of ``add_layer_norm`` in Triton: whole rows in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from ..shared.triton_rows import is_kept, load_tile, normalised_gradient, statistics, store_partial


@triton.jit
def _added(
    x, residual, x_bias, seeds, row, inside, column, stride_x, stride_r, threshold, rescale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x + x_bias) in float32, zeros where not ``inside``, and which elements were kept."""
    z = load_tile(x, row, stride_x, inside, column, BLOCK_N)
    kept = inside
    if HAS_BIAS:
        z += tl.load(x_bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        kept = is_kept(seeds, row[:, None], column[None, :], threshold)
        z = tl.where(kept, z * rescale, 0.0)
    if HAS_RESIDUAL:
        z += load_tile(residual, row, stride_r, inside, column, BLOCK_N)
    return tl.where(inside, z, 0.0), kept


@triton.jit(do_not_specialize=["rows", "threshold"])
def forward(
    x, residual, x_bias, weight, bias, out, low, mean, rstd, seeds, rows, stride_x, stride_r, eps, threshold, rescale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SAVE: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """x, residual (rows, N) -> out (rows, N), with LOW the same in low's dtype, mean and rstd (rows). Grid: blocks of
    ROWS rows. Each tensor has its own dtype."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    z, _ = _added(
        x, residual, x_bias, seeds, row, inside, column, stride_x, stride_r, threshold, rescale,
        N, BLOCK_N, HAS_RESIDUAL, HAS_BIAS, DROPOUT,
    )  # fmt: skip
    average, inverse, normal = statistics(z, inside, eps, N)
    scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    y = normal * scale[None, :] + shift[None, :]
    at = row[:, None] * N + column[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)
    if LOW:
        tl.store(low + at, y.to(low.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(mean + row, average, mask=row < rows)
        tl.store(rstd + row, inverse, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "threshold"])
def backward(
    grad, low_grad, x, residual, x_bias, weight, mean, rstd, seeds, grad_sum, grad_x, partial,
    rows, stride_g, stride_l, stride_x, stride_r, threshold, rescale,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr, SUMS: tl.constexpr, SUM_X: tl.constexpr, LOW: tl.constexpr, STORE_X: tl.constexpr,
):  # fmt: skip
    """grad (rows, N), with LOW plus low_grad (rows, N), that of the copy -> grad_sum, grad_x (rows, N), partial (3 or
    2, programs, N).

    grad_sum is the gradient of what was normalised, so of the residual; grad_x differs from it by dropout and dtype
    alone and is stored only with STORE_X. partial: sums of the gradients of weight, bias and, with SUM_X, x_bias over
    this program's rows.
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
        z, kept = _added(
            x, residual, x_bias, seeds, row, inside, column, stride_x, stride_r, threshold, rescale,
            N, BLOCK_N, HAS_RESIDUAL, HAS_BIAS, DROPOUT,
        )  # fmt: skip
        if LOW:
            dy += load_tile(low_grad, row, stride_l, inside, column, BLOCK_N)
        average = tl.load(mean + row, mask=row < rows, other=0.0)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = tl.where(inside, (z - average[:, None]) * inverse[:, None], 0.0)
        # Gradient in first, sums at once, scale for every tile: in another order the longest rows spill.
        if SUMS:
            sum_weight += dy * normal
            sum_bias += dy
        scale = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
        dz = tl.where(inside, normalised_gradient(dy * scale[None, :], normal, inverse, N), 0.0)
        at = row[:, None] * N + column[None, :]
        tl.store(grad_sum + at, dz.to(grad_sum.dtype.element_ty), mask=inside)
        if DROPOUT:
            dz = tl.where(kept, dz * rescale, 0.0)
        if STORE_X:
            tl.store(grad_x + at, dz.to(grad_x.dtype.element_ty), mask=inside)
        if SUMS and SUM_X:
            sum_x += dz
    if SUMS:
        store_partial(partial, 0, program, tl.sum(sum_weight, 0), column, N)
        store_partial(partial, 1, program, tl.sum(sum_bias, 0), column, N)
        if SUM_X:
            store_partial(partial, 2, program, tl.sum(sum_x, 0), column, N)
