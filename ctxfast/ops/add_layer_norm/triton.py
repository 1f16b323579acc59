# SPDX-License-Identifier: Apache-2.0
"""``add_layer_norm`` in Triton: one pass over the rows, forward and backward.

Kept for the backward: the inputs themselves, mean and 1 / deviation of every row in float32, and the seed of dropout,
whose mask is drawn again. Statistics are taken in float32 in two passes over registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import philox, triton_rows
from . import triton_kernels


def _outputs(x: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and 1 / deviation of every row, or empty."""
    rows = x.numel() // x.shape[-1] if save else 0
    mean, rstd = (torch_ops.allocate((rows,), x, torch.float32) for _ in range(2))
    return torch_ops.allocate(x.shape, x), mean, rstd


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float,
    dropout_p: float, seeds: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, mean, rstd = _outputs(x, save)
    if x.numel() == 0:
        return out, mean, rstd
    size, x = x.shape[-1], triton_rows.rows(x)
    residual = None if residual is None else triton_rows.rows(residual)
    x_bias = None if x_bias is None else x_bias.contiguous()
    tile = triton_rows.forward_tile(size)
    with triton_rows.on_device(x):
        triton_kernels.forward[(-(-x.shape[0] // tile["ROWS"]),)](
            x, residual, x_bias, weight.contiguous(), bias.contiguous(), out, mean, rstd, seeds, x.shape[0],
            x.stride(0), 0 if residual is None else residual.stride(0), eps, *philox.numbers(dropout_p),
            N=size, HAS_RESIDUAL=residual is not None, HAS_BIAS=x_bias is not None, DROPOUT=seeds is not None,
            SAVE=save, **tile,
        )  # fmt: skip
    return out, mean, rstd


def _gradients(
    x: Tensor, weight: Tensor, x_bias: Tensor | None, seeds: Tensor | None, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the sum that was normalised, of x (empty without dropout: the same), weight, bias and x_bias."""
    size = x.shape[-1] if with_sums else 0
    return (
        torch_ops.allocate(x.shape, x),
        torch_ops.allocate(x.shape if seeds is not None else (0,), x),
        torch_ops.allocate((size,), weight),
        torch_ops.allocate((size,), weight),
        torch_ops.allocate((0 if x_bias is None else size,), weight),
    )


def _backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, x_bias: Tensor | None, mean: Tensor,
    rstd: Tensor, dropout_p: float, seeds: Tensor | None, with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _gradients(x, weight, x_bias, seeds, with_sums)
    grad_sum, grad_x, *sums = outputs
    sums = [each for each in sums if each.numel()]
    if x.numel() == 0:
        for each in sums:
            each.zero_()
        return outputs
    size, grad, x = x.shape[-1], triton_rows.rows(grad), triton_rows.rows(x)
    residual = None if residual is None else triton_rows.rows(residual)
    x_bias = None if x_bias is None else x_bias.contiguous()
    tile = triton_rows.backward_tile(size)
    # The longest rows have no registers left for a third sum.
    sum_x = x_bias is not None and with_sums and size <= triton_rows.SUMMED_SIZE
    kinds = sums if sum_x else sums[:2]
    count = triton_rows.programs(x, -(-x.shape[0] // tile["ROWS"]), max(1, 16 // tile["num_warps"]))
    partial = triton_rows.allocate_partial(len(kinds), count, size, x) if with_sums else None
    with triton_rows.on_device(x):
        triton_kernels.backward[(count,)](
            grad, x, residual, x_bias, weight.contiguous(), mean, rstd, seeds, grad_sum, grad_x, partial, x.shape[0],
            grad.stride(0), x.stride(0), 0 if residual is None else residual.stride(0),
            *philox.numbers(dropout_p),
            N=size, HAS_RESIDUAL=residual is not None, HAS_BIAS=x_bias is not None, DROPOUT=seeds is not None,
            SUMS=with_sums, SUM_X=sum_x, **tile,
        )  # fmt: skip
        if with_sums:
            triton_rows.column_sums(partial, kinds)
        if len(kinds) < len(sums):
            sums[2].copy_((grad_x if grad_x.numel() else grad_sum).view(-1, size).sum(0, dtype=torch.float32))
    return outputs


_fwd = torch_ops.define("add_layer_norm_triton_fwd", _forward, _outputs, triton_rows.DISPATCH)
_bwd = torch_ops.define("add_layer_norm_triton_bwd", _backward, _gradients, triton_rows.DISPATCH)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float,
        dropout_p: float, seeds: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, mean, rstd = _fwd(x, residual, weight, bias, x_bias, eps, dropout_p, seeds, True)
        ctx.save_for_backward(x, residual, weight, bias, x_bias, mean, rstd, seeds)
        ctx.numbers = (eps, dropout_p)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, x_bias, mean, rstd, seeds = ctx.saved_tensors
        wanted, (eps, dropout_p) = ctx.needs_input_grad, ctx.numbers
        if torch_ops.needs_definition(grad):
            mask = None if seeds is None else philox.row_bits(x.numel() // x.shape[-1], x.shape[-1], seeds)
            mask = None if mask is None else philox.multiplier(mask, dropout_p, x.dtype).view(x.shape)
            grads = torch_ops.definition_gradients(
                lambda *given: registry.OPS["add_layer_norm"].reference(*given, eps, dropout_p, mask),
                (x, residual, weight, bias, x_bias), wanted[:5], (grad,),
            )  # fmt: skip
            return *grads, None, None, None
        with_sums = wanted[2] or wanted[3] or wanted[4]
        grad_sum, grad_x, grad_weight, grad_bias, grad_x_bias = _bwd(
            grad, x, residual, weight, x_bias, mean, rstd, dropout_p, seeds, with_sums
        )
        grads = (grad_sum if seeds is None else grad_x, grad_sum, grad_weight, grad_bias, grad_x_bias)
        return (*(value if wants else None for value, wants in zip(grads, wanted)), None, None, None)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return triton_rows.why_no_row("x", args["x"])


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """See ``ctxfast.functional.add_layer_norm``."""
    seeds = philox.draw_seeds(x, dropout_p)
    if registry.needs_grad(x, residual, weight, bias, x_bias):
        return _AddLayerNorm.apply(x, residual, weight, bias, x_bias, eps, dropout_p, seeds)
    return _fwd(x, residual, weight, bias, x_bias, eps, dropout_p, seeds, False)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    x, residual, weight, x_bias = args["x"], args["residual"], args["weight"], args["x_bias"]
    dropout_p, seeds = args["dropout_p"], philox.draw_seeds(x, args["dropout_p"])
    forward = (x, residual, weight, args["bias"], x_bias, args["eps"], dropout_p, seeds, True)
    out, mean, rstd = _fwd(*forward)
    return [
        (_fwd, forward),
        (_bwd, (torch.randn_like(out), x, residual, weight, x_bias, mean, rstd, dropout_p, seeds, True)),
    ]


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: BERT-Base's row size and the largest."""
    for size in (768, 8192):
        for dropout in (True, False):
            shared = dict(N=size, DROPOUT=dropout, HAS_RESIDUAL=True, HAS_BIAS=True)
            where = f"N={size} {'dropout' if dropout else 'plain'}"
            yield f"forward {where}", triton_kernels.forward, shared | dict(SAVE=True), triton_rows.forward_tile(size)
            backward = shared | dict(SUMS=True, SUM_X=size <= 4096)
            yield f"backward {where}", triton_kernels.backward, backward, triton_rows.backward_tile(size)
