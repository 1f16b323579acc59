# SPDX-License-Identifier: Apache-2.0
"""Bias and activation of a matrix product, fused in one Triton pass, forward and backward.

Only the product is saved for the backward. In one pass over memory that reads the activation's derivative off it, sums
the bias gradient and, where the activation's result is needed once more, recomputes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..._core import torch_ops
from . import triton_launch, triton_rows
from .triton_rows import load_tile, store_partial

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
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0, small) / (1.0 + small)


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
    elif ACTIVATION == "silu":
        return z * _sigmoid(z)
    elif ACTIVATION == "none":
        return z
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
    elif ACTIVATION == "silu":
        share = _sigmoid(z)
        return share * (1.0 + z * (1.0 - share))
    elif ACTIVATION == "none":
        return z * 0.0 + 1.0
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
def forward_kernel(
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
def backward_kernel(
    grad, product, bias, grad_product, recomputed, partial, rows, stride_g,
    N: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr, RECOMPUTE: tl.constexpr,
):  # fmt: skip
    """grad (rows, N) -> grad_product (rows, N), which may be the same memory, recomputed (rows, N), the activation's
    result, and partial (1, programs, N). Grid: (shares of the rows, column blocks)."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        z = _load(product, bias, row, inside, column, N, BLOCK_N, HAS_BIAS)
        dz = load_tile(grad, row, stride_g, inside, column, BLOCK_N) * _slope(z, ACTIVATION)
        at = row[:, None] * N + column[None, :]
        tl.store(grad_product + at, dz.to(grad_product.dtype.element_ty), mask=inside)
        if RECOMPUTE:
            tl.store(recomputed + at, _activated(z, ACTIVATION).to(recomputed.dtype.element_ty), mask=inside)
        if SUMS:
            sums += dz
    if SUMS:
        store_partial(partial, 0, program, tl.sum(sums, 0), column, N)


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    product, bias, out, rows,
    M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """product (rows, 2M) -> out (rows, M): activation of the first half times the second. Grid as in
    ``forward_kernel``."""
    across = tl.cdiv(M, BLOCK_N)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < M)[None, :]
    a, b = _load_halves(product, bias, row, inside, column, M, BLOCK_N, HAS_BIAS)
    y = _activated(a, ACTIVATION) * b
    tl.store(out + row[:, None] * M + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load_halves(product, bias, row, inside, column, M, BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr):
    a = load_tile(product, row, 2 * M, inside, column, BLOCK_N)
    b = load_tile(product + M, row, 2 * M, inside, column, BLOCK_N)
    if HAS_BIAS:
        a += tl.load(bias + column, mask=column < M, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias + M + column, mask=column < M, other=0.0).to(tl.float32)[None, :]
    return a, b


@triton.jit(do_not_specialize=["rows"])
def gate_backward_kernel(
    grad, product, bias, grad_product, recomputed, partial, rows,
    M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUMS: tl.constexpr, RECOMPUTE: tl.constexpr,
):  # fmt: skip
    """grad (rows, M) -> grad_product (rows, 2M), recomputed (rows, M), the gate's result, and partial (2, programs, M).
    Grid: (shares of the rows, column blocks)."""
    program = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sum_a = tl.zeros([ROWS, BLOCK_N], tl.float32)
    sum_b = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < M)[None, :]
        a, b = _load_halves(product, bias, row, inside, column, M, BLOCK_N, HAS_BIAS)
        given = load_tile(grad, row, M, inside, column, BLOCK_N)
        active = _activated(a, ACTIVATION)
        da, db = given * b * _slope(a, ACTIVATION), given * active
        at = grad_product + row[:, None] * (2 * M) + column[None, :]
        tl.store(at, da.to(grad_product.dtype.element_ty), mask=inside)
        tl.store(at + M, db.to(grad_product.dtype.element_ty), mask=inside)
        if RECOMPUTE:
            to = recomputed + row[:, None] * M + column[None, :]
            tl.store(to, (active * b).to(recomputed.dtype.element_ty), mask=inside)
        if SUMS:
            sum_a += da
            sum_b += db
    if SUMS:
        store_partial(partial, 0, program, tl.sum(sum_a, 0), column, M)
        store_partial(partial, 1, program, tl.sum(sum_b, 0), column, M)


def tile(size: int) -> dict[str, int]:
    """Eight elements a thread and load."""
    block = min(1024, triton_rows.block(size))
    if triton_rows.IS_INTERPRETED:
        return dict(BLOCK_N=block, ROWS=32, num_warps=1)
    return dict(BLOCK_N=block, ROWS=max(1, 2048 // block), num_warps=8)


def why_not(args: Mapping[str, Any], no_activation: str) -> str | None:
    """None, or why an op over these kernels cannot run a call; ``no_activation``: what it says where there is none."""
    objection = triton_rows.why_not("x", args["x"])
    if objection is not None:
        return objection
    if args["weight_dtype"] is not None:
        return "int8 products run on the CPU."
    return no_activation if args["activation"] == "none" else None


def output(product: Tensor) -> Tensor:
    return torch_ops.allocate(product.shape, product)


def forward(product: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(product + bias)``, product (..., N)."""
    out = output(product)
    if product.numel() == 0:
        return out
    flat, chosen = product.reshape(-1, product.shape[-1]).contiguous(), tile(product.shape[-1])
    across = -(-flat.shape[1] // chosen["BLOCK_N"])
    with triton_rows.on_device(flat):
        triton_launch.launch(
            forward_kernel, (across * -(-flat.shape[0] // chosen["ROWS"]),), flat,
            None if bias is None else bias.contiguous(), out, flat.shape[0],
            N=flat.shape[1], ACTIVATION=activation, HAS_BIAS=bias is not None, **chosen,
        )  # fmt: skip
    return out


def bias_gradient(product: Tensor, with_bias: bool) -> Tensor:
    """Empty if not wanted."""
    return torch_ops.allocate((product.shape[-1] if with_bias else 0,), product)


def backward(
    grad: Tensor, product: Tensor, bias: Tensor | None, activation: str, grad_product: Tensor,
    recomputed: Tensor | None, grad_bias: Tensor,
) -> None:  # fmt: skip
    """Writes ``grad_product`` (which may be ``grad`` itself if that is contiguous), the activation's result into
    ``recomputed`` unless that is None, and ``grad_bias`` unless that is empty."""
    with_bias = grad_bias.numel() > 0
    if product.numel() == 0:
        grad_bias.zero_()
        return
    size, chosen = product.shape[-1], tile(product.shape[-1])
    grad, flat = triton_rows.rows(grad), product.reshape(-1, size).contiguous()
    across = -(-size // chosen["BLOCK_N"])
    count = triton_rows.programs(flat, -(-flat.shape[0] // chosen["ROWS"]), max(1, 8 // across))
    partial = triton_rows.allocate_partial(1, count, size, flat) if with_bias else None
    with triton_rows.on_device(flat):
        triton_launch.launch(
            backward_kernel, (count, across), grad, flat, None if bias is None else bias.contiguous(), grad_product,
            recomputed, partial, flat.shape[0], grad.stride(0), N=size, ACTIVATION=activation,
            HAS_BIAS=bias is not None, SUMS=with_bias, RECOMPUTE=recomputed is not None, **chosen,
        )  # fmt: skip
        if with_bias:
            triton_rows.column_sums(partial, [grad_bias])


def gate_output(product: Tensor) -> Tensor:
    return torch_ops.allocate((*product.shape[:-1], product.shape[-1] // 2), product)


def gate(product: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """``activation(a) * b`` of the halves of product + bias, (..., 2M) -> (..., M)."""
    out = gate_output(product)
    if out.numel() == 0:
        return out
    size, flat = out.shape[-1], product.reshape(-1, product.shape[-1]).contiguous()
    chosen = tile(size)
    across = -(-size // chosen["BLOCK_N"])
    with triton_rows.on_device(flat):
        triton_launch.launch(
            gate_kernel, (across * -(-flat.shape[0] // chosen["ROWS"]),), flat,
            None if bias is None else bias.contiguous(), out, flat.shape[0],
            M=size, ACTIVATION=activation, HAS_BIAS=bias is not None, **chosen,
        )  # fmt: skip
    return out


def gate_gradients(product: Tensor, with_bias: bool, with_result: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of the product; the gate's result and the gradient of the bias, empty where they are not wanted."""
    result = gate_output(product) if with_result else torch_ops.allocate((0,), product)
    return torch_ops.allocate(product.shape, product), result, bias_gradient(product, with_bias)


def gate_backward(
    grad: Tensor, product: Tensor, bias: Tensor | None, activation: str, with_bias: bool, with_result: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``gate_gradients``; grad (rows, M), product (rows, 2M)."""
    grad_product, result, grad_bias = outputs = gate_gradients(product, with_bias, with_result)
    if product.numel() == 0:
        grad_bias.zero_()
        return outputs
    size = product.shape[-1] // 2
    chosen, grad, product = tile(size), grad.contiguous(), product.contiguous()
    across = -(-size // chosen["BLOCK_N"])
    count = triton_rows.programs(product, -(-product.shape[0] // chosen["ROWS"]), max(1, 8 // across))
    partial = triton_rows.allocate_partial(2, count, size, product) if with_bias else None
    with triton_rows.on_device(product):
        triton_launch.launch(
            gate_backward_kernel, (count, across), grad, product, None if bias is None else bias.contiguous(),
            grad_product, result if with_result else None, partial, product.shape[0], M=size, ACTIVATION=activation,
            HAS_BIAS=bias is not None, SUMS=with_bias, RECOMPUTE=with_result, **chosen,
        )  # fmt: skip
        if with_bias:
            triton_rows.column_sums(partial, list(grad_bias.chunk(2)))
    return outputs
