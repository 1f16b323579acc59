# SPDX-License-Identifier: Apache-2.0
"""``add_norm`` in Triton: one pass over the rows, forward and backward.

Kept for the backward: the total, which is an output anyway, mean and 1 / deviation of every row in float32, and the
seed of dropout, whose mask is drawn again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import philox, triton_launch, triton_rows
from . import triton_kernels

_GIVEN = ("x", "residual", "weight", "bias", "x_bias")


def _forward_tile(size: int) -> dict[str, int]:
    """The usual one; of the longest rows twice the warps, as eight leave RMS's in float32 8 bytes on the stack."""
    tile = triton_rows.forward_tile(size)
    return tile if size <= 4096 else tile | dict(num_warps=2 * tile["num_warps"])


def _outputs(x: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The total, its norm; mean and 1 / deviation of every row, or empty."""
    rows = x.numel() // x.shape[-1] if save else 0
    mean, rstd = (torch_ops.allocate((rows,), x, torch.float32) for _ in range(2))
    return torch_ops.allocate(x.shape, x), torch_ops.allocate(x.shape, x), mean, rstd


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, x_bias: Tensor | None, norm: str,
    eps: float, dropout_p: float, seeds: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _outputs(x, save)
    if x.numel() == 0:
        return outputs
    size, x = x.shape[-1], triton_rows.rows(x)
    residual = None if residual is None else triton_rows.rows(residual)
    bias, x_bias = (None if each is None else each.contiguous() for each in (bias, x_bias))
    tile = _forward_tile(size)
    with triton_rows.on_device(x):
        triton_launch.launch(
            triton_kernels.forward, (-(-x.shape[0] // tile["ROWS"]),), x, residual, x_bias, weight.contiguous(), bias,
            *outputs, seeds, x.shape[0], x.stride(0), 0 if residual is None else residual.stride(0), eps,
            *philox.numbers(dropout_p), N=size, RMS=norm == "rms", HAS_RESIDUAL=residual is not None,
            HAS_X_BIAS=x_bias is not None, HAS_BIAS=bias is not None, DROPOUT=seeds is not None, SAVE=save, **tile,
        )  # fmt: skip
    return outputs


def _gradients(
    total: Tensor, weight: Tensor, has_bias: bool, has_x_bias: bool, seeds: Tensor | None, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the sum, so of the residual; of x (empty where it is the same); of weight, bias and x_bias."""
    size = total.shape[-1] if with_sums else 0
    sizes = (size, size if has_bias else 0, size if has_x_bias else 0)
    return (
        torch_ops.allocate(total.shape, total),
        torch_ops.allocate((0,) if seeds is None else total.shape, total),
        *(torch_ops.allocate((each,), weight) for each in sizes),
    )


def _backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool,
    has_x_bias: bool, norm: str, dropout_p: float, seeds: Tensor | None, with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = grad_sum, grad_x, *sums = _gradients(total, weight, has_bias, has_x_bias, seeds, with_sums)
    if total.numel() == 0:
        for each in sums:
            each.zero_()
        return outputs
    size, rows = total.shape[-1], triton_rows.rows(total)
    grad_total, grad = triton_rows.rows(grad_total), triton_rows.rows(grad)
    tile = triton_rows.backward_tile(size)
    # The longest rows have no registers left for a third sum.
    sum_x = has_x_bias and with_sums and size <= triton_rows.SUMMED_SIZE
    kinds = [sums[0], *[sums[1]] * has_bias, *[sums[2]] * sum_x]
    count = triton_rows.programs(rows, -(-rows.shape[0] // tile["ROWS"]), triton_rows.resident(tile))
    partial = triton_rows.allocate_partial(len(kinds), count, size, rows) if with_sums else None
    with triton_rows.on_device(rows):
        triton_launch.launch(
            triton_kernels.backward, (count,), grad_total, grad, rows, weight.contiguous(), mean, rstd, seeds, grad_sum,
            grad_x, partial, rows.shape[0], grad_total.stride(0), grad.stride(0), *philox.numbers(dropout_p),
            N=size, RMS=norm == "rms", HAS_BIAS=has_bias, DROPOUT=seeds is not None, SUMS=with_sums, SUM_X=sum_x,
            **tile,
        )  # fmt: skip
        if with_sums:
            triton_rows.column_sums(partial, kinds)
        if has_x_bias and with_sums and not sum_x:
            sums[2].copy_((grad_sum if seeds is None else grad_x).view(-1, size).sum(0, dtype=torch.float32))
    return outputs


_fwd = torch_ops.define("add_norm_triton_fwd", _forward, _outputs, triton_rows.DISPATCH)
_bwd = torch_ops.define("add_norm_triton_bwd", _backward, _gradients, triton_rows.DISPATCH)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, x_bias: Tensor | None,
        norm: str, eps: float, dropout_p: float, seeds: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total, out, mean, rstd = _fwd(x, residual, weight, bias, x_bias, norm, eps, dropout_p, seeds, True)
        ctx.save_for_backward(x, residual, weight, bias, x_bias, total, mean, rstd, seeds)
        ctx.options = (norm, eps, dropout_p)
        return total, out

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, total, mean, rstd, seeds = ctx.saved_tensors
        wanted, (norm, eps, dropout_p) = ctx.needs_input_grad, ctx.options
        if torch_ops.needs_definition(grad_total, grad):
            mask = None if seeds is None else philox.row_bits(total.numel() // total.shape[-1], total.shape[-1], seeds)
            mask = None if mask is None else philox.multiplier(mask, dropout_p, total.dtype).view(total.shape)
            grads = torch_ops.definition_gradients(
                lambda *given: registry.OPS["add_norm"].reference(*given, norm, eps, dropout_p, mask),
                given, wanted[:5], (grad_total, grad),
            )  # fmt: skip
            return *grads, None, None, None, None
        _, _, weight, bias, x_bias = given
        with_sums = wanted[2] or wanted[3] or wanted[4]
        grad_sum, grad_x, *sums = _bwd(
            grad_total, grad, total, weight, mean, rstd, bias is not None, x_bias is not None, norm, dropout_p, seeds,
            with_sums,
        )  # fmt: skip
        grads = (grad_sum if seeds is None else grad_x, grad_sum, *sums)
        return (*(value if wants else None for value, wants in zip(grads, wanted)), None, None, None, None)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return triton_rows.why_no_row("x", args["x"])


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    x_bias: Tensor | None,
    norm: str,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """See ``ctxfast.functional.add_norm``."""
    seeds = philox.draw_seeds(x, dropout_p)
    if registry.needs_grad(x, residual, weight, bias, x_bias):
        return _AddNorm.apply(x, residual, weight, bias, x_bias, norm, eps, dropout_p, seeds)
    total, out, _, _ = _fwd(x, residual, weight, bias, x_bias, norm, eps, dropout_p, seeds, False)
    return total, out


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    norm, dropout_p, seeds = args["norm"], args["dropout_p"], philox.draw_seeds(args["x"], args["dropout_p"])
    given = (*(args[name] for name in _GIVEN), norm, args["eps"], dropout_p, seeds)
    total, out, mean, rstd = _fwd(*given, True)
    has = args["bias"] is not None, args["x_bias"] is not None
    grads = (torch.randn_like(total), torch.randn_like(out))
    return [
        (_fwd, (*given, False)),
        (_fwd, (*given, True)),
        (_bwd, (*grads, total, args["weight"], mean, rstd, *has, norm, dropout_p, seeds, True)),
    ]


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: ModernBERT-Base's row size and the largest."""
    for size in (768, 8192):
        for norm, dropout in (("layer", True), ("layer", False), ("rms", False)):
            shared = dict(N=size, RMS=norm == "rms", HAS_BIAS=norm == "layer", DROPOUT=dropout)
            where = f"N={size} {norm}{' dropout' if dropout else ''}"
            more = dict(HAS_RESIDUAL=True, HAS_X_BIAS=norm == "layer", SAVE=True)
            yield f"forward {where}", triton_kernels.forward, shared | more, _forward_tile(size)
            more = dict(SUMS=True, SUM_X=norm == "layer" and size <= triton_rows.SUMMED_SIZE)
            yield f"backward {where}", triton_kernels.backward, shared | more, triton_rows.backward_tile(size)
