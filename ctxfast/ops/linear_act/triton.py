# SPDX-License-Identifier: Apache-2.0
"""``linear_act`` on a GPU: the product by cuBLAS, bias and activation in one Triton pass.

Of the layer's own values only the product is kept for the backward, which takes the activation's slope from it and adds
up the bias gradient in the same pass. A linear layer that reads the result (the feed-forward block's second) keeps that
same product instead of what it read, a quarter of what a BERT layer would keep, and makes it again in its backward: one
more pass over memory beside two matrix products. Where no gradient is wanted, relu and gelu_tanh are cuBLASLt's own
epilogue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._core import registry, torch_ops
from ..shared import triton_launch, triton_rows
from . import triton_kernels


def tile(size: int) -> dict[str, int]:
    """Eight elements a thread and load."""
    block = min(1024, triton_rows.block(size))
    if triton_rows.IS_INTERPRETED:
        return dict(BLOCK_N=block, ROWS=32, num_warps=1)
    return dict(BLOCK_N=block, ROWS=max(1, 2048 // block), num_warps=8)


def _output(product: Tensor) -> Tensor:
    return torch_ops.allocate(product.shape, product)


def _forward(product: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    out = _output(product)
    if product.numel() == 0:
        return out
    flat, chosen = product.reshape(-1, product.shape[-1]).contiguous(), tile(product.shape[-1])
    across = -(-flat.shape[1] // chosen["BLOCK_N"])
    with triton_rows.on_device(flat):
        triton_launch.launch(
            triton_kernels.forward, (across * -(-flat.shape[0] // chosen["ROWS"]),), flat,
            None if bias is None else bias.contiguous(), out, flat.shape[0],
            N=flat.shape[1], ACTIVATION=activation, HAS_BIAS=bias is not None, **chosen,
        )  # fmt: skip
    return out


def _gradients(product: Tensor, bias: Tensor | None, with_bias: bool) -> tuple[Tensor, Tensor]:
    """Of the product, and of the bias (empty if not wanted)."""
    has_bias = bias is not None and with_bias
    of_bias = torch_ops.allocate(bias.shape, bias) if has_bias else torch_ops.allocate((0,), product)
    return torch_ops.allocate(product.shape, product), of_bias


def _backward(
    grad: Tensor, product: Tensor, bias: Tensor | None, activation: str, with_bias: bool
) -> tuple[Tensor, Tensor]:
    grad_product, grad_bias = _gradients(product, bias, with_bias)
    if product.numel() == 0:
        return grad_product, grad_bias.zero_()
    size, chosen = product.shape[-1], tile(product.shape[-1])
    grad, flat = triton_rows.rows(grad), product.reshape(-1, size).contiguous()
    across = -(-size // chosen["BLOCK_N"])
    count = triton_rows.programs(flat, -(-flat.shape[0] // chosen["ROWS"]), max(1, 8 // across))
    partial = triton_rows.allocate_partial(1, count, size, flat) if with_bias else None
    with triton_rows.on_device(flat):
        triton_launch.launch(
            triton_kernels.backward, (count, across), grad, flat, None if bias is None else bias.contiguous(),
            grad_product, partial, flat.shape[0], grad.stride(0),
            N=size, ACTIVATION=activation, HAS_BIAS=bias is not None, SUMS=with_bias, **chosen,
        )  # fmt: skip
        if with_bias:
            triton_rows.column_sums(partial, [grad_bias])
    return grad_product, grad_bias


_fwd = torch_ops.define("linear_act_triton_fwd", _forward, _output, triton_rows.DISPATCH)
_bwd = torch_ops.define("linear_act_triton_bwd", _backward, _gradients, triton_rows.DISPATCH)


class _LinearAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, kept: list[Tensor] | None
    ) -> Tensor:
        product = F.linear(x, weight)
        ctx.save_for_backward(x, weight, bias, product)
        ctx.activation = activation
        if kept is not None:
            kept.append(product)
        return _fwd(product, bias, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, product = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = wanted = ctx.needs_input_grad[:3]
        if torch_ops.needs_definition(grad):
            grads = torch_ops.definition_gradients(
                lambda x, weight, bias: registry.OPS["linear_act"].reference(x, weight, bias, ctx.activation, None),
                (x, weight, bias), wanted, (grad,),
            )  # fmt: skip
            return *grads, None, None
        grad_product, grad_bias = _bwd(grad, product, bias, ctx.activation, bias is not None and wants_bias)
        grad_x = grad_product.matmul(weight) if wants_x else None
        grad_weight = None
        if wants_weight:
            flat = grad_product.reshape(-1, weight.shape[0])
            grad_weight = flat.t().matmul(x.reshape(-1, weight.shape[1]))
        return grad_x, grad_weight, (grad_bias if wants_bias else None), None, None


class _LinearOfActivation(torch.autograd.Function):
    """A linear layer of an activation's result, which is made again in the backward.

    ``sources``: x, weight and bias that the activation's layer had. They have their gradient from there; a backward
    that is differentiated itself makes the result from them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, product: Tensor, activation: str,
        *sources: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight, product, *sources)
        ctx.activation = activation
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, product, *sources = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        flat, grad_weight = grad.reshape(-1, weight.shape[0]), None
        if wants_weight:
            if torch_ops.needs_definition(grad):
                x = registry.OPS["linear_act"].reference(*sources, ctx.activation, None)
            else:
                x = _fwd(product, sources[2], ctx.activation)
            grad_weight = flat.t().matmul(x.reshape(-1, weight.shape[1]))
        grad_x = grad.matmul(weight) if wants_x else None
        return grad_x, grad_weight, (flat.sum(0) if wants_bias else None), *[None] * 5


def _source(args: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What the activation that x is the result of was made from, (product, activation, x, weight, bias); None if it is
    none.

    A tensor written to since is none, and a traced one carries no such note.
    """
    x = args["x"]
    note = x.__dict__.get(_NOTE)
    if note is None or note[0] != x._version or not registry.needs_grad(*args.values()):
        return None
    return note[1:]


_NOTE = "_ctxfast_activation_of"


def supports(args: Mapping[str, Any]) -> str | None:
    """None, or why the Triton kernels cannot run this call."""
    objection = triton_rows.why_not("x", args["x"])
    if objection is not None:
        return objection
    if args["weight_dtype"] is not None:
        return "int8 products run on the CPU."
    if args["activation"] == "none" and (torch.compiler.is_compiling() or _source(args) is None):
        return "there is no activation to fuse or to make again: torch's linear layer is all of it."
    return None


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, weight_dtype: torch.dtype | None
) -> Tensor:
    """See ``ctxfast.functional.linear_act``."""
    if activation == "none":
        return _LinearOfActivation.apply(x, weight, bias, *_source(dict(x=x, weight=weight, bias=bias)))
    if registry.needs_grad(x, weight, bias):
        kept = None if torch.compiler.is_compiling() else []
        out = _LinearAct.apply(x, weight, bias, activation, kept)
        if kept:
            setattr(out, _NOTE, (out._version, kept[0], activation, x, weight, bias))
        return out
    # On the CPU torch's epilogue is the erf form.
    if x.is_cuda and bias is not None and activation in ("relu", "gelu_tanh"):
        flat = x.reshape(-1, x.shape[-1])
        out = torch._addmm_activation(bias, flat, weight.t(), use_gelu=activation == "gelu_tanh")
        return out.view(*x.shape[:-1], weight.shape[0])
    return _fwd(F.linear(x, weight), bias, activation)


def raw_calls(args: Mapping[str, Any]) -> list[tuple[Any, tuple]]:
    """The registered operators behind one call, with arguments for torch.library.opcheck."""
    bias, activation = args["bias"], args["activation"]
    product = F.linear(args["x"], args["weight"])
    return [
        (_fwd, (product, bias, activation)),
        (_bwd, (torch.randn_like(product), product, bias, activation, bias is not None)),
    ]


def launches(dtype: str, arch: int) -> Iterator[triton_rows.Launch]:
    """What csrc/triton_resources.py compiles: every activation at BERT-Base's feed-forward size."""
    for activation in ("gelu", "gelu_tanh", "relu", "tanh"):
        shared = dict(N=3072, ACTIVATION=activation, HAS_BIAS=True)
        yield f"forward {activation}", triton_kernels.forward, shared, tile(3072)
        yield f"backward {activation}", triton_kernels.backward, shared | dict(SUMS=True), tile(3072)
