# SPDX-License-Identifier: Apache-2.0
"""Kernels of ``linear_act`` in Triton: bias and activation of a product, both ways."""

from __future__ import annotations

import triton
import triton.language as tl

from ..shared.triton_rows import load_tile, store_partial

_HALF_ROOT = tl.constexpr(0.7071067811865476)
_GAUSS = tl.constexpr(0.3989422804014327)
_TANH_FORM = tl.constexpr(0.7978845608028654)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _tanh(x):
    """Near zero, where 1 - 2 / (exp(2x) + 1) loses digits, the series is exact to float32."""
    square = x * x
    series = x * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * -0.053968254)))
    return tl.where(tl.abs(x) < 0.15, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _gate(z):
    """gelu_tanh is z times a sigmoid: that, and its derivative in its own argument, both without cancellation."""
    argument = (z + z * z * z * _CUBIC) * (2.0 * _TANH_FORM)
    small = tl.exp(-tl.abs(argument))
    share = 1.0 / (1.0 + small)
    return tl.where(argument >= 0.0, share, small * share), small * share * share


@triton.jit
def _activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * _HALF_ROOT))
    elif ACTIVATION == "gelu_tanh":
        share, _ = _gate(z)
        return z * share
    elif ACTIVATION == "relu":
        # Written so that nan stays nan.
        return tl.where(z <= 0.0, 0.0, z)
    else:
        return _tanh(z)


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(z * _HALF_ROOT)) + z * tl.exp(-0.5 * z * z) * _GAUSS
    elif ACTIVATION == "gelu_tanh":
        share, growth = _gate(z)
        return share + z * growth * (1.0 + z * z * (3.0 * _CUBIC)) * (2.0 * _TANH_FORM)
    elif ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    else:
        value = _tanh(z)
        return 1.0 - value * value


@triton.jit
def _load(product, bias, row, inside, column, N, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr):
    z = load_tile(product, row, N, inside, column, BLOCK_N)
    if HAS_BIAS:
        z += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit(do_not_specialize=["rows"])
def forward(
    product, bias, out, rows,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """product (rows, N) -> out (rows, N). Grid: blocks of ROWS rows times blocks of columns, columns fastest."""
    across = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    y = _activated(_load(product, bias, row, inside, column, N, BLOCK_N, HAS_BIAS), ACTIVATION)
    tl.store(out + row[:, None] * N + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def backward(
    grad, product, bias, grad_product, partial, rows, stride_g,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """grad (rows, N) -> grad_product (rows, N), partial (1, programs, N). Grid: (shares of the rows, column blocks)."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        z = _load(product, bias, row, inside, column, N, BLOCK_N, HAS_BIAS)
        dz = load_tile(grad, row, stride_g, inside, column, BLOCK_N) * _slope(z, ACTIVATION)
        tl.store(grad_product + row[:, None] * N + column[None, :], dz.to(grad_product.dtype.element_ty), mask=inside)
        if SUMS:
            sums += dz
    if SUMS:
        store_partial(partial, 0, program, tl.sum(sums, 0), column, N)
