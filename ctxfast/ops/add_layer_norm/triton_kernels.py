# SPDX-License-Identifier: Apache-2.0
"""Kernels of ``add_layer_norm`` in Triton: one pass over memory forwards, one backwards. Not yet run on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from ..._core.triton_rows import is_kept, moments


@triton.jit
def _load_sum(
    x, residual, x_bias, seeds, row, column, inside, N, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_X_BIAS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x + x_bias) of some rows, float32, and what dropout kept."""
    at = row[:, None] * N + column[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        y += tl.load(x_bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    kept = inside
    if DROPOUT:
        kept = is_kept(seeds, row, BLOCK, threshold)
        y = tl.where(kept, y * scale, 0.0)
    if HAS_RESIDUAL:
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    return y, kept


@triton.jit(do_not_specialize=["T"])
def forward(
    x, residual, x_bias, weight, bias, seeds, out, mean_out, rstd_out, T, N, eps, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_X_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SAVE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < T)[:, None] & (column < N)[None, :]
    y, _ = _load_sum(
        x, residual, x_bias, seeds, row, column, inside, N, threshold, scale, HAS_RESIDUAL, HAS_X_BIAS, DROPOUT, BLOCK
    )
    y = tl.where(inside, y, 0.0)
    mean, rstd = moments(y, inside, N, eps)
    w = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    result = (y - mean[:, None]) * rstd[:, None] * w[None, :] + b[None, :]
    tl.store(out + row[:, None] * N + column[None, :], result.to(out.dtype.element_ty), mask=inside)
    if SAVE:
        tl.store(mean_out + row, mean, mask=row < T)
        tl.store(rstd_out + row, rstd, mask=row < T)


@triton.jit(do_not_specialize=["T"])
def backward(
    grad, x, residual, x_bias, weight, seeds, mean_in, rstd_in, grad_x, grad_residual, partial,
    T, N, threshold, scale,
    HAS_RESIDUAL: tl.constexpr, HAS_X_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SEPARATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial: (programs, 3, N) float32, this program's sums for weight, bias and x_bias.

    SEPARATE: the residual's gradient differs from x's and is wanted.
    """
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), tl.float32)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    of_x_bias = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    while first < T:
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < T)[:, None] & (column < N)[None, :]
        y, kept = _load_sum(
            x, residual, x_bias, seeds, row, column, inside, N, threshold, scale,
            HAS_RESIDUAL, HAS_X_BIAS, DROPOUT, BLOCK,
        )  # fmt: skip
        mean = tl.load(mean_in + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_in + row, mask=row < T, other=0.0)
        normed = tl.where(inside, (y - mean[:, None]) * rstd[:, None], 0.0)
        at = row[:, None] * N + column[None, :]
        dy = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        of_weight += tl.sum(dy * normed, 0)
        of_bias += tl.sum(dy, 0)
        dy = dy * w[None, :]
        along = tl.sum(dy * normed, 1) / N
        level = tl.sum(dy, 1) / N
        d = (dy - level[:, None] - normed * along[:, None]) * rstd[:, None]
        d = tl.where(inside, d, 0.0)
        if SEPARATE:
            tl.store(grad_residual + at, d.to(grad_residual.dtype.element_ty), mask=inside)
        if DROPOUT:
            d = tl.where(kept, d * scale, 0.0)
        tl.store(grad_x + at, d.to(grad_x.dtype.element_ty), mask=inside)
        of_x_bias += tl.sum(d, 0)
        first += step
    to = partial + tl.program_id(0).to(tl.int64) * 3 * N + column
    tl.store(to, of_weight, mask=column < N)
    tl.store(to + N, of_bias, mask=column < N)
    tl.store(to + 2 * N, of_x_bias, mask=column < N)
