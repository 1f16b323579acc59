# SPDX-License-Identifier: Apache-2.0
"""``feed_forward`` on a GPU: products by cuBLAS, bias and activation in one Triton pass, forward and backward.

Of the tensors M wide only the first product is saved. In the backward one pass computes its gradient in place of the
activation's, recomputes the activation and sums the bias gradient; two more tensors of that size are alive at a time.

``forward`` and ``backward`` know nothing of autograd: a ``Function`` over more than this op can call them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import triton_activation, triton_product, triton_rows
from . import definition


def _made(product: Tensor, with_bias: bool, with_result: bool) -> tuple[Tensor, Tensor]:
    """The activation's result and the gradient of the bias; what is not wanted is empty."""
    result = triton_activation.output(product) if with_result else torch_ops.allocate((0,), product)
    return result, triton_activation.bias_gradient(product, with_bias)


def _activation_backward(
    grad: Tensor, product: Tensor, bias: Tensor | None, activation: str, with_bias: bool, with_result: bool
) -> tuple[Tensor, Tensor]:
    """Turns ``grad`` (rows, M) from the gradient of the activation's result into the product's."""
    result, grad_bias = _made(product, with_bias, with_result)
    rows = grad.contiguous()  # itself, as ``backward`` makes it
    triton_activation.backward(rows, product, bias, activation, rows, result if with_result else None, grad_bias)
    if rows is not grad:
        grad.copy_(rows)
    return result, grad_bias


_fwd = torch_ops.define(
    "feed_forward_triton_fwd", triton_activation.forward, triton_activation.output, triton_rows.DISPATCH
)
_bwd = torch_ops.define("feed_forward_triton_bwd", _activation_backward, _made, triton_rows.DISPATCH, changed="grad")


_gate_fwd = torch_ops.define(
    "feed_forward_triton_gate_fwd", triton_activation.gate, triton_activation.gate_output, triton_rows.DISPATCH
)
_gate_bwd = torch_ops.define(
    "feed_forward_triton_gate_bwd",
    triton_activation.gate_backward,
    triton_activation.gate_gradients,
    triton_rows.DISPATCH,
)


def forward(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str,
    gated: bool = False, saves: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The result, and the first product (..., M), gated (..., 2M), for ``backward``; None for it unless ``saves``."""
    if gated:
        product = F.linear(x, weight1)
        return F.linear(_gate_fwd(product, bias1, activation), weight2, bias2), product if saves else None
    wide, product = triton_product.linear(x, weight1, bias1, activation, saves, _fwd)
    return F.linear(wide, weight2, bias2), product


def backward(
    grad: Tensor, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, product: Tensor, activation: str,
    gated: bool, wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight1, bias1, weight2 and bias2, None for those not ``wanted``."""
    wants_x, wants_weight1, wants_bias1, wants_weight2, wants_bias2 = wanted
    grad, product = grad.reshape(-1, weight2.shape[0]), product.reshape(-1, weight1.shape[0])
    grad_x = grad_weight1 = grad_bias1 = grad_weight2 = grad_product = wide = None
    if wants_x or wants_weight1 or wants_bias1:
        grad_product = grad.mm(weight2)  # the gradient of the activation's result, until the next line
        if gated:
            grad_product, wide, grad_bias1 = _gate_bwd(
                grad_product, product, bias1, activation, wants_bias1, wants_weight2
            )
        else:
            wide, grad_bias1 = _bwd(grad_product, product, bias1, activation, wants_bias1, wants_weight2)
    elif wants_weight2:
        wide = (_gate_fwd if gated else _fwd)(product, bias1, activation)
    if wants_weight2:
        grad_weight2 = grad.t().mm(wide)
    del wide
    if wants_x:
        grad_x = grad_product.mm(weight1).view(x.shape)
    if wants_weight1:
        grad_weight1 = grad_product.t().mm(x.reshape(-1, weight1.shape[1]))
    return grad_x, grad_weight1, grad_bias1 if wants_bias1 else None, grad_weight2, grad.sum(0) if wants_bias2 else None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None,
        activation: str, gated: bool,
    ) -> Tensor:  # fmt: skip
        out, product = forward(x, weight1, bias1, weight2, bias2, activation, gated)
        ctx.save_for_backward(x, weight1, bias1, weight2, bias2, product)
        ctx.activation, ctx.gated = activation, gated
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *given, product = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:5]
        if torch_ops.needs_definition(grad):
            grads = definition.gradients(given, ctx.activation, ctx.gated, wanted, grad)
        else:
            grads = backward(grad, *given[:4], product, ctx.activation, ctx.gated, wanted)
        return *grads, None, None


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    if args["gated"]:
        args = {**args, "activation": "gated"}  # there is something to fuse whatever the activation
    return triton_activation.why_not(
        args, "there is no activation to fuse or recompute: torch's two linear layers are all of it."
    )


def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    weight_dtype: torch.dtype | None,
    gated: bool,
) -> Tensor:
    """See ``ctxfast.functional.feed_forward``."""
    if registry.needs_grad(x, weight1, bias1, weight2, bias2):
        return _FeedForward.apply(x, weight1, bias1, weight2, bias2, activation, gated)
    return forward(x, weight1, bias1, weight2, bias2, activation, gated, saves=False)[0]


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    bias, activation = args["bias1"], args["activation"]
    product = F.linear(args["x"], args["weight1"]).flatten(0, -2)
    has_bias = bias is not None
    if args["gated"]:
        grad = torch.randn_like(triton_activation.gate_output(product))
        return [
            (_gate_fwd, (product, bias, activation)),
            (_gate_bwd, (grad, product, bias, activation, has_bias, True)),
            (_gate_bwd, (grad, product, bias, activation, False, False)),
        ]
    grad = torch.randn_like(product)
    return [
        (_fwd, (product, bias, activation)),
        (_bwd, (grad, product, bias, activation, has_bias, True)),
        (_bwd, (grad.clone(), product, bias, activation, False, False)),
    ]


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: every activation at BERT-Base's size. The forward is ``linear_act``'s."""
    tile = triton_activation.tile(3072)
    for activation in ("gelu", "gelu_tanh", "relu", "tanh"):
        constants = dict(N=3072, ACTIVATION=activation, HAS_BIAS=True, SUMS=True, RECOMPUTE=True)
        yield f"backward {activation}", triton_activation.backward_kernel, constants, tile
