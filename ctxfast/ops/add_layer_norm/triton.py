# SPDX-License-Identifier: Apache-2.0
"""``add_layer_norm`` in Triton: bias, dropout, residual and LayerNorm in one pass, both ways. Not yet run on a GPU.

The forward keeps its inputs, and mean and 1 / standard deviation of each row in float32; the backward makes the rest
again. Sums over rows have a fixed order: partial sums of a fixed number of programs, then one sum over those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from ..._core import capability, torch_ops, triton_rows
from . import triton_kernels


def _options(x: Tensor, residual: Tensor | None, x_bias: Tensor | None, seeds: Tensor | None) -> dict[str, Any]:
    return dict(
        HAS_RESIDUAL=residual is not None, HAS_X_BIAS=x_bias is not None, DROPOUT=seeds is not None,
        **triton_rows.tile(x.shape[1]),
    )  # fmt: skip


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None,
    eps: float, dropout_p: float, seeds: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, mean, rstd = _forward_fake(x, residual, weight, bias, x_bias, eps, dropout_p, seeds, save)
    x, residual, weight, bias, x_bias = (_dense(tensor) for tensor in (x, residual, weight, bias, x_bias))
    if out.numel() == 0:
        return out, mean, rstd
    options = _options(x, residual, x_bias, seeds)
    with triton_rows.on_device(x):
        triton_kernels.forward[(triton.cdiv(x.shape[0], options["BLOCK_ROWS"]),)](
            x, residual, x_bias, weight, bias, seeds, out, mean, rstd, x.shape[0], x.shape[1], eps,
            *triton_rows.dropout_numbers(dropout_p), SAVE=save, **options,
        )  # fmt: skip
    return out, mean, rstd


def _forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None,
    eps: float, dropout_p: float, seeds: Tensor | None, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = (x.shape[0] if save else 0,)
    return (
        torch_ops.allocate(x.shape, x),
        torch_ops.allocate(statistics, x, torch.float32),
        torch_ops.allocate(statistics, x, torch.float32),
    )


def _backward(
    grad: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, x_bias: Tensor | None,
    mean: Tensor, rstd: Tensor, dropout_p: float, seeds: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    results = _backward_fake(grad, x, residual, weight, x_bias, mean, rstd, dropout_p, seeds)
    grad_x, grad_residual, sums = results
    rows, columns = x.shape
    if x.numel() == 0:
        sums.zero_()
        return results
    grad, x, residual, weight, x_bias = (_dense(tensor) for tensor in (grad, x, residual, weight, x_bias))
    options = _options(x, residual, x_bias, seeds)
    programs = min(triton.cdiv(rows, options["BLOCK_ROWS"]), triton_rows.PARTIAL_SUMS)
    partial = torch_ops.allocate((programs, 3, columns), x, torch.float32)
    with triton_rows.on_device(x):
        triton_kernels.backward[(programs,)](
            grad, x, residual, x_bias, weight, seeds, mean, rstd, grad_x, grad_residual, partial, rows, columns,
            *triton_rows.dropout_numbers(dropout_p), SEPARATE=grad_residual.numel() > 0, **options,
        )  # fmt: skip
    torch.sum(partial, 0, out=sums)
    return results


def _backward_fake(
    grad: Tensor, x: Tensor, residual: Tensor | None, weight: Tensor, x_bias: Tensor | None,
    mean: Tensor, rstd: Tensor, dropout_p: float, seeds: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """grad_x, grad_residual (empty where it equals grad_x or there is none), sums (3, N): weight, bias, x_bias."""
    is_separate = residual is not None and seeds is not None
    return [
        torch_ops.allocate(x.shape, x),
        torch_ops.allocate(x.shape if is_separate else (0,), x),
        torch_ops.allocate((3, x.shape[1]), x, torch.float32),
    ]


_DEVICE = "CPU" if capability.is_triton_interpreted() else "CUDA"
_fwd = torch_ops.define(
    "add_layer_norm_triton_fwd",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? x_bias, float eps, float dropout_p, "
    "Tensor? seeds, bool save) -> (Tensor, Tensor, Tensor)",
    _forward, _forward_fake, _DEVICE,
)  # fmt: skip
_bwd = torch_ops.define(
    "add_layer_norm_triton_bwd",
    "(Tensor grad, Tensor x, Tensor? residual, Tensor weight, Tensor? x_bias, Tensor mean, Tensor rstd, "
    "float dropout_p, Tensor? seeds) -> Tensor[]",
    _backward, _backward_fake, _DEVICE,
)  # fmt: skip


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, x_bias: Tensor | None,
        eps: float, dropout_p: float, seeds: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, mean, rstd = _fwd(x, residual, weight, bias, x_bias, eps, dropout_p, seeds, True)
        ctx.save_for_backward(x, residual, weight, x_bias, mean, rstd, seeds)
        ctx.dropout_p = dropout_p
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, residual, weight, x_bias, mean, rstd, seeds = ctx.saved_tensors
        grad_x, grad_residual, sums = _bwd(grad, x, residual, weight, x_bias, mean, rstd, ctx.dropout_p, seeds)
        if residual is None:
            grad_residual = None
        elif seeds is None:
            grad_residual = grad_x
        of_weight, of_bias, of_x_bias = sums.to(weight.dtype)
        return grad_x, grad_residual, of_weight, of_bias, None if x_bias is None else of_x_bias, None, None, None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return triton_rows.objection("x", args["x"], args["x"].shape[-1])


def _rows(args: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    x, residual = args["x"], args["residual"]
    return x.flatten(0, -2), None if residual is None else residual.flatten(0, -2)


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
    args = dict(x=x, residual=residual, weight=weight, bias=bias, x_bias=x_bias)
    rows, residual_rows = _rows(args)
    seeds = triton_rows.draw_seeds(x, dropout_p)
    rest = (weight, bias, x_bias, eps, dropout_p, seeds)
    if triton_rows.needs_grad(args, *args):
        out = _AddLayerNorm.apply(rows, residual_rows, *rest)
    else:
        out = _fwd(rows, residual_rows, *rest, False)[0]
    return out.view(x.shape)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    x, residual = _rows(args)
    weight, bias, x_bias, dropout_p = args["weight"], args["bias"], args["x_bias"], args["dropout_p"]
    seeds = triton_rows.draw_seeds(x, dropout_p)
    forward = (x, residual, weight, bias, x_bias, args["eps"], dropout_p, seeds, True)
    out, mean, rstd = _fwd(*forward)
    return [(_fwd, forward), (_bwd, (torch.randn_like(out), x, residual, weight, x_bias, mean, rstd, dropout_p, seeds))]
