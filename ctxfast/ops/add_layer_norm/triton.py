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
from ..shared import philox, triton_launch, triton_rows
from . import triton_kernels


def _outputs(
    x: Tensor, out_dtype: torch.dtype | None, low_dtype: torch.dtype | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result; a copy of it in ``low_dtype``, or empty; mean and 1 / deviation of every row, or empty."""
    rows = x.numel() // x.shape[-1] if save else 0
    mean, rstd = (torch_ops.allocate((rows,), x, torch.float32) for _ in range(2))
    low = torch_ops.allocate((0,) if low_dtype is None else x.shape, x, low_dtype)
    return torch_ops.allocate(x.shape, x, out_dtype), low, mean, rstd


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float,
    dropout_p: float, seeds: Tensor | None, out_dtype: torch.dtype | None, low_dtype: torch.dtype | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernel's launch: see ``_outputs``. Each tensor may have a dtype of its own."""
    outputs = out, low, mean, rstd = _outputs(x, out_dtype, low_dtype, save)
    if x.numel() == 0:
        return outputs
    size, x = x.shape[-1], triton_rows.rows(x)
    residual = None if residual is None else triton_rows.rows(residual)
    x_bias = None if x_bias is None else x_bias.contiguous()
    tile = triton_rows.forward_tile(size)
    with triton_rows.on_device(x):
        triton_launch.launch(
            triton_kernels.forward, (-(-x.shape[0] // tile["ROWS"]),), x, residual, x_bias, weight.contiguous(),
            bias.contiguous(), out, None if low_dtype is None else low, mean, rstd, seeds, x.shape[0],
            x.stride(0), 0 if residual is None else residual.stride(0), eps, *philox.numbers(dropout_p),
            N=size, HAS_RESIDUAL=residual is not None, HAS_BIAS=x_bias is not None, DROPOUT=seeds is not None,
            SAVE=save, LOW=low_dtype is not None, **tile,
        )  # fmt: skip
    return outputs


def _gradients(
    x: Tensor, residual: Tensor | None, weight: Tensor, x_bias: Tensor | None, seeds: Tensor | None, with_sums: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of the sum that was normalised, so of the residual; of x (empty where it is the same); of weight, bias and
    x_bias."""
    size = x.shape[-1] if with_sums else 0
    dtype = x.dtype if residual is None else residual.dtype
    is_apart = seeds is not None or dtype != x.dtype
    return (
        torch_ops.allocate(x.shape, x, dtype),
        torch_ops.allocate(x.shape if is_apart else (0,), x),
        torch_ops.allocate((size,), weight),
        torch_ops.allocate((size,), weight),
        torch_ops.allocate((0 if x_bias is None else size,), weight if x_bias is None else x_bias),
    )


def _backward_tile(size: int, has_low: bool) -> dict[str, int]:
    # Two gradients that come in and two dtypes take more registers: Triton 3.6 spills at 96.
    return triton_rows.backward_tile(size, 104 if has_low else triton_rows.BACKWARD_REGISTERS)


def backward(
    grad: Tensor, low_grad: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, x_bias: Tensor | None,
    mean: Tensor, rstd: Tensor, dropout_p: float, seeds: Tensor | None, with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernels' launches: see ``_gradients``. ``low_grad``: gradient of the copy, which is added to ``grad``."""
    outputs = _gradients(x, residual, weight, x_bias, seeds, with_sums)
    grad_sum, grad_x, *sums = outputs
    sums = [each for each in sums if each.numel()]
    if x.numel() == 0:
        for each in sums:
            each.zero_()
        return outputs
    size, grad, x = x.shape[-1], triton_rows.rows(grad), triton_rows.rows(x)
    low_grad = None if low_grad is None else triton_rows.rows(low_grad)
    residual = None if residual is None else triton_rows.rows(residual)
    x_bias = None if x_bias is None else x_bias.contiguous()
    tile = _backward_tile(size, low_grad is not None)
    # The longest rows have no registers left for a third sum.
    sum_x = x_bias is not None and with_sums and size <= triton_rows.SUMMED_SIZE
    kinds = sums if sum_x else sums[:2]
    count = triton_rows.programs(x, -(-x.shape[0] // tile["ROWS"]), triton_rows.resident(tile))
    partial = triton_rows.allocate_partial(len(kinds), count, size, x) if with_sums else None
    is_apart = grad_x.numel() > 0
    with triton_rows.on_device(x):
        triton_launch.launch(
            triton_kernels.backward, (count,), grad, low_grad, x, residual, x_bias, weight.contiguous(), mean, rstd,
            seeds, grad_sum, grad_x, partial, x.shape[0], grad.stride(0),
            0 if low_grad is None else low_grad.stride(0), x.stride(0),
            0 if residual is None else residual.stride(0), *philox.numbers(dropout_p),
            N=size, HAS_RESIDUAL=residual is not None, HAS_BIAS=x_bias is not None, DROPOUT=seeds is not None,
            SUMS=with_sums, SUM_X=sum_x, LOW=low_grad is not None, STORE_X=is_apart, **tile,
        )  # fmt: skip
        if with_sums:
            triton_rows.column_sums(partial, kinds)
        if len(kinds) < len(sums):
            sums[2].copy_((grad_x if is_apart else grad_sum).view(-1, size).sum(0, dtype=torch.float32))
    return outputs


_fwd = torch_ops.define("add_layer_norm_triton_fwd", forward, _outputs, triton_rows.DISPATCH)
_bwd = torch_ops.define("add_layer_norm_triton_bwd", backward, _gradients, triton_rows.DISPATCH)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None, eps: float,
        dropout_p: float, out_dtype: torch.dtype | None, seeds: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, _, mean, rstd = _fwd(x, residual, weight, bias, x_bias, eps, dropout_p, seeds, out_dtype, None, True)
        ctx.save_for_backward(x, residual, weight, bias, x_bias, mean, rstd, seeds)
        ctx.options = (eps, dropout_p, out_dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, bias, x_bias, mean, rstd, seeds = ctx.saved_tensors
        wanted, (eps, dropout_p, out_dtype) = ctx.needs_input_grad, ctx.options
        if torch_ops.needs_definition(grad):
            mask = None if seeds is None else philox.row_bits(x.numel() // x.shape[-1], x.shape[-1], seeds)
            mask = None if mask is None else philox.multiplier(mask, dropout_p, x.dtype).view(x.shape)
            grads = torch_ops.definition_gradients(
                lambda *given: registry.OPS["add_layer_norm"].reference(*given, eps, dropout_p, out_dtype, mask),
                (x, residual, weight, bias, x_bias), wanted[:5], (grad,),
            )  # fmt: skip
            return *grads, None, None, None, None
        with_sums = wanted[2] or wanted[3] or wanted[4]
        grad_sum, grad_x, grad_weight, grad_bias, grad_x_bias = _bwd(
            grad, None, x, residual, weight, x_bias, mean, rstd, dropout_p, seeds, with_sums
        )
        is_apart = seeds is not None or grad_sum.dtype != x.dtype
        grads = (grad_x if is_apart else grad_sum, grad_sum, grad_weight, grad_bias, grad_x_bias)
        return (*(value if wants else None for value, wants in zip(grads, wanted)), None, None, None, None)


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    objection = triton_rows.why_no_row("x", args["x"])
    if objection is None and args["out_dtype"] is not None:
        others = [(name, args[name]) for name in ("residual", "weight", "bias", "x_bias") if args[name] is not None]
        objection = next(filter(None, (triton_rows.why_not(*each) for each in others)), None)
        if args["out_dtype"] not in triton_rows.DTYPES:
            objection = f"it gives float32, float16 and bfloat16 and out_dtype is {args['out_dtype']}."
    return objection


def add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """See ``ctxfast.functional.add_layer_norm``."""
    seeds = philox.draw_seeds(x, dropout_p)
    if registry.needs_grad(x, residual, weight, bias, x_bias):
        return _AddLayerNorm.apply(x, residual, weight, bias, x_bias, eps, dropout_p, out_dtype, seeds)
    return _fwd(x, residual, weight, bias, x_bias, eps, dropout_p, seeds, out_dtype, None, False)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    x, residual, weight, x_bias = args["x"], args["residual"], args["weight"], args["x_bias"]
    dropout_p, seeds = args["dropout_p"], philox.draw_seeds(x, args["dropout_p"])
    forward = (x, residual, weight, args["bias"], x_bias, args["eps"], dropout_p, seeds, args["out_dtype"])
    out, low, mean, rstd = _fwd(*forward, torch.float16, True)
    rest = (x, residual, weight, x_bias, mean, rstd, dropout_p, seeds, True)
    return [
        (_fwd, (*forward, None, True)),
        (_fwd, (*forward, torch.float16, True)),
        (_bwd, (torch.randn_like(out), None, *rest)),
        (_bwd, (torch.randn_like(out), torch.randn_like(low), *rest)),
    ]


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: BERT-Base's row size and the largest; as under autocast, BERT-Base's."""
    for size in (768, 8192):
        for dropout in (True, False):
            shared = dict(N=size, DROPOUT=dropout, HAS_RESIDUAL=True, HAS_BIAS=True)
            where = f"N={size} {'dropout' if dropout else 'plain'}"
            forward, backward = triton_rows.forward_tile(size), _backward_tile(size, False)
            more = dict(SAVE=True, LOW=False)
            yield f"forward {where}", triton_kernels.forward, shared | more, forward
            more = dict(SUMS=True, SUM_X=size <= triton_rows.SUMMED_SIZE, LOW=False, STORE_X=dropout)
            yield f"backward {where}", triton_kernels.backward, shared | more, backward
            if dtype == "float32" or size > 768:
                continue
            mixed = shared | dict.fromkeys(("residual", "x_bias", "weight", "bias", "out", "grad", "grad_sum"), "*fp32")
            more = dict(SAVE=True, LOW=True)
            yield f"mixed forward {where}", triton_kernels.forward, mixed | more, forward
            more = dict(SUMS=True, SUM_X=True, LOW=True, STORE_X=True)
            yield f"mixed backward {where}", triton_kernels.backward, mixed | more, _backward_tile(size, True)
