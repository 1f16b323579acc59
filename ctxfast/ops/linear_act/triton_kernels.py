# SPDX-License-Identifier: Apache-2.0
"""Kernels of ``linear_act`` in Triton: what comes after the product, both ways. Not yet run on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + _tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x)))
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    return _tanh(x)


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if ACTIVATION == "gelu_tanh":
        t = _tanh(0.7978845608028654 * x * (1.0 + 0.044715 * x * x))
        return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    if ACTIVATION == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    t = _tanh(x)
    return 1.0 - t * t


@triton.jit(do_not_specialize=["T"])
def forward(
    product, bias, out, T, M,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out may be product itself."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < T)[:, None] & (column < M)[None, :]
    at = row[:, None] * M + column[None, :]
    x = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + column, mask=column < M, other=0.0).to(tl.float32)[None, :]
    tl.store(out + at, _activate(x, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def backward(
    grad, product, bias, grad_product, partial, T, M,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial: (programs along rows, M) float32, their sums for the bias."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_bias = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    while first < T:
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < T)[:, None] & (column < M)[None, :]
        at = row[:, None] * M + column[None, :]
        x = tl.load(product + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias + column, mask=column < M, other=0.0).to(tl.float32)[None, :]
        d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * _slope(x, ACTIVATION)
        tl.store(grad_product + at, d.to(grad_product.dtype.element_ty), mask=inside)
        of_bias += tl.sum(d, 0)
        first += step
    tl.store(partial + tl.program_id(0).to(tl.int64) * M + column, of_bias, mask=column < M)
