# SPDX-License-Identifier: Apache-2.0
"""``linear_act`` on a GPU: the product by cuBLAS, bias and activation in one Triton pass.

Only the product is saved for the backward. A product that follows saves its input, the activation's result, as well;
``feed_forward`` is both products in one op, which recomputes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import triton_activation, triton_product, triton_rows


def _gradients(product: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Of the product, and of the bias (empty if not wanted)."""
    return torch_ops.allocate(product.shape, product), triton_activation.bias_gradient(product, with_bias)


def _backward(
    grad: Tensor, product: Tensor, bias: Tensor | None, activation: str, with_bias: bool
) -> tuple[Tensor, Tensor]:
    grads = _gradients(product, with_bias)
    triton_activation.backward(grad, product, bias, activation, grads[0], None, grads[1])
    return grads


_fwd = torch_ops.define(
    "linear_act_triton_fwd", triton_activation.forward, triton_activation.output, triton_rows.DISPATCH
)
_bwd = torch_ops.define("linear_act_triton_bwd", _backward, _gradients, triton_rows.DISPATCH)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        out, product = triton_product.linear(x, weight, bias, activation, True, _fwd)
        ctx.save_for_backward(x, weight, bias, product)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, product = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = wanted = ctx.needs_input_grad[:3]
        if torch_ops.needs_definition(grad):
            grads = torch_ops.definition_gradients(
                lambda x, weight, bias: registry.OPS["linear_act"].reference(x, weight, bias, ctx.activation, None),
                (x, weight, bias), wanted, (grad,),
            )  # fmt: skip
            return *grads, None
        grad_product, grad_bias = _bwd(grad, product, bias, ctx.activation, bias is not None and wants_bias)
        grad_x = grad_product.matmul(weight) if wants_x else None
        grad_weight = None
        if wants_weight:
            flat = grad_product.reshape(-1, weight.shape[0])
            grad_weight = flat.t().matmul(x.reshape(-1, weight.shape[1]))
        return grad_x, grad_weight, (grad_bias if wants_bias else None), None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    return triton_activation.why_not(args, "there is no activation to fuse: torch's linear layer is all of it.")


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, weight_dtype: torch.dtype | None
) -> Tensor:
    """See ``ctxfast.functional.linear_act``."""
    if registry.needs_grad(x, weight, bias):
        return _LinearAct.apply(x, weight, bias, activation)
    return triton_product.linear(x, weight, bias, activation, False, _fwd)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    bias, activation = args["bias"], args["activation"]
    product = F.linear(args["x"], args["weight"])
    calls = [
        (_fwd, (product, bias, activation)),
        (_bwd, (torch.randn_like(product), product, bias, activation, bias is not None)),
    ]
    if product.dtype != torch.float32:
        calls.append((triton_product.product, (args["x"].flatten(0, -2), args["weight"], bias)))
    return calls


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: every activation at BERT-Base's feed-forward size."""
    tile = triton_activation.tile(3072)
    for activation in ("gelu", "gelu_tanh", "relu", "tanh"):
        shared = dict(N=3072, ACTIVATION=activation, HAS_BIAS=True)
        yield f"forward {activation}", triton_activation.forward_kernel, shared, tile
        alone = dict(SUMS=True, RECOMPUTE=False, recomputed=None)
        yield f"backward {activation}", triton_activation.backward_kernel, shared | alone, tile
    if dtype in ("bfloat16", "float16"):
        yield "product gelu", *triton_product.launch(dtype, arch)
