# SPDX-License-Identifier: Apache-2.0
"""``linear_act`` on a GPU: the product by cuBLAS, bias and activation in one pass after it. Not yet run on a GPU.

Without gradients relu and the tanh form of GELU go into cuBLASLt's own epilogue.
With gradients the product alone is kept: the backward makes the activation's slope again, in the pass that also sums
the bias's gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from ..._core import capability, torch_ops, triton_rows
from . import triton_kernels

_TILE = dict(BLOCK_ROWS=16, BLOCK=256, num_warps=4)


def _launch(kernel: Any, rows: int, programs: int, columns: int, like: Tensor, *arguments: Any, **options: Any) -> None:
    with triton_rows.on_device(like):
        kernel[(programs, triton.cdiv(columns, _TILE["BLOCK"]))](*arguments, rows, columns, **options, **_TILE)


def _forward(product: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    out = _forward_fake(product, bias, activation)
    if product.numel() == 0:
        return out
    product = product.contiguous()
    rows, columns = product.shape
    bias = None if bias is None else bias.contiguous()
    _launch(
        triton_kernels.forward, rows, triton.cdiv(rows, _TILE["BLOCK_ROWS"]), columns, product, product, bias, out,
        HAS_BIAS=bias is not None, ACTIVATION=activation,
    )  # fmt: skip
    return out


def _forward_fake(product: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return torch_ops.allocate(product.shape, product)


def _backward(grad: Tensor, product: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    grad_product, grad_bias = _backward_fake(grad, product, bias, activation)
    if product.numel() == 0:
        return grad_product, grad_bias.zero_()
    rows, columns = product.shape
    programs = min(triton.cdiv(rows, _TILE["BLOCK_ROWS"]), triton_rows.PARTIAL_SUMS)
    partial = torch_ops.allocate((programs, columns), product, torch.float32)
    bias = None if bias is None else bias.contiguous()
    _launch(
        triton_kernels.backward, rows, programs, columns, product,
        grad.contiguous(), product.contiguous(), bias, grad_product, partial,
        HAS_BIAS=bias is not None, ACTIVATION=activation,
    )  # fmt: skip
    torch.sum(partial, 0, out=grad_bias)
    return grad_product, grad_bias


def _backward_fake(grad: Tensor, product: Tensor, bias: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of the product, and of the bias in float32."""
    return torch_ops.allocate(product.shape, product), torch_ops.allocate((product.shape[1],), product, torch.float32)


_DEVICE = "CPU" if capability.is_triton_interpreted() else "CUDA"
_fwd = torch_ops.define(
    "linear_act_triton_fwd", "(Tensor product, Tensor? bias, str activation) -> Tensor",
    _forward, _forward_fake, _DEVICE,
)  # fmt: skip
_bwd = torch_ops.define(
    "linear_act_triton_bwd", "(Tensor grad, Tensor product, Tensor? bias, str activation) -> (Tensor, Tensor)",
    _backward, _backward_fake, _DEVICE,
)  # fmt: skip


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        product = F.linear(x, weight)
        ctx.save_for_backward(x, weight, bias, product)
        ctx.activation = activation
        return _fwd(product, bias, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, product = ctx.saved_tensors
        grad_product, grad_bias = _bwd(grad, product, bias, ctx.activation)
        of_x = grad_product @ weight if ctx.needs_input_grad[0] else None
        of_weight = grad_product.t() @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None if bias is None else grad_bias.to(bias.dtype), None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the kernels cannot run this call."""
    return triton_rows.objection("x", args["x"])


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See ``ctxfast.functional.linear_act``."""
    if activation == "none":
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if triton_rows.needs_grad(dict(x=x, weight=weight, bias=bias), "x", "weight", "bias"):
        out = _LinearAct.apply(rows, weight, bias, activation)
    elif bias is not None and x.is_cuda and x.dtype != torch.float32 and activation in ("relu", "gelu_tanh"):
        out = torch._addmm_activation(bias, rows, weight.t(), use_gelu=activation == "gelu_tanh")
    else:
        out = _fwd(F.linear(rows, weight), bias, activation)
    return out.view(*x.shape[:-1], weight.shape[0])


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    x, weight, bias = args["x"], args["weight"], args["bias"]
    activation = "gelu" if args["activation"] == "none" else args["activation"]
    product = F.linear(x.reshape(-1, x.shape[-1]), weight)
    return [(_fwd, (product, bias, activation)), (_bwd, (torch.randn_like(product), product, bias, activation))]
