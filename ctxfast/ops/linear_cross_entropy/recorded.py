# SPDX-License-Identifier: Apache-2.0
"""Registered operators and autograd of ``linear_cross_entropy``, for one way of taking the softmax of a chunk.

A mean or sum knows every row's share of the result, so gradients are made in the forward, beside the logits, and only
scaled in the backward. Two cases make them in the backward, from logits made again: reduction "none", whose shares come
with the gradient, and float16, where the scale of the loss that keeps small gradients from vanishing comes with it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._core import checks, registry, torch_ops
from . import chunks


class Operators:
    """The two operators of an implementation, ``<name>_fwd`` (losses) and ``<name>_bwd`` (losses and gradients)."""

    def __init__(self, name: str, softmax: chunks.Softmax, key: str) -> None:
        losses, gradients = (partial(kernel, softmax) for kernel in (chunks.losses, chunks.gradients))
        self.losses = torch_ops.define(f"{name}_fwd", losses, chunks.losses_output, key)
        self.gradients = torch_ops.define(f"{name}_bwd", gradients, chunks.gradients_outputs, key)


def _shares(labels: Tensor, ignore_index: int | None, reduction: str) -> Tensor:
    """What a row's loss counts in the result (T), float32."""
    if ignore_index is None:
        share = 1.0 if reduction == "sum" else 1.0 / max(1, labels.shape[0])
        return torch.full(labels.shape, share, dtype=torch.float32, device=labels.device)
    has_label = labels != ignore_index
    if reduction == "sum":
        return has_label.float()
    return has_label.float() / has_label.sum().clamp(min=1)


def _definition_gradients(ctx: Any, operands: Sequence[Tensor | None], labels: Tensor, grad: Tensor) -> tuple[Any, ...]:
    """What a backward returns that is itself differentiated; ``operands``: hidden, weight and bias."""
    grads = torch_ops.definition_gradients(
        lambda hidden, weight, bias: registry.OPS["linear_cross_entropy"].reference(
            hidden, weight, labels, bias, *ctx.rest[1:3]
        ),
        operands, ctx.needs_input_grad[1:4], (grad,),
    )  # fmt: skip
    return (None, *grads, None, None, None, None)


class _InForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operators: Operators, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
        ignore_index: int | None, reduction: str, with_weight: bool,
    ) -> Tensor:  # fmt: skip
        shares = _shares(labels, ignore_index, reduction)
        losses, *grads = operators.gradients(hidden, weight, labels, bias, ignore_index, shares, with_weight)
        # The operands are alive anyway but for hidden, small beside the logits: they may be wanted with more gradients.
        ctx.save_for_backward(hidden, weight, bias, labels, *grads)
        ctx.rest = (operators, ignore_index, reduction)
        return (losses * shares).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, *grads = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:4]
        if torch_ops.needs_definition(grad):
            return _definition_gradients(ctx, (hidden, weight, bias), labels, grad)
        # The result of a loss is most often its end: its gradient is 1, seen where looking costs nothing.
        if not (checks.is_readable(grad) and grad.item() == 1.0):
            grads = [value * grad.to(value.dtype) for value in grads]
        grads = [value if wants else None for value, wants in zip(grads, wanted)]
        return (None, *grads, None, None, None, None)


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, operators: Operators, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
        ignore_index: int | None, reduction: str, with_weight: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.rest = (operators, ignore_index, reduction, with_weight)
        losses = operators.losses(hidden, weight, labels, bias, ignore_index)
        return losses if reduction == "none" else (losses * _shares(labels, ignore_index, reduction)).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels = ctx.saved_tensors
        operators, ignore_index, reduction, with_weight = ctx.rest
        if torch_ops.needs_definition(grad):
            return _definition_gradients(ctx, (hidden, weight, bias), labels, grad)
        scale = grad.float().contiguous() if reduction == "none" else grad * _shares(labels, ignore_index, reduction)
        wanted = ctx.needs_input_grad[1:4]
        _, *grads = operators.gradients(hidden, weight, labels, bias, ignore_index, scale, with_weight)
        return (None, *(value if wants else None for value, wants in zip(grads, wanted)), None, None, None, None)


def call(
    operators: Operators,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int | None,
    reduction: str,
) -> Tensor:
    """The loss, differentiable."""
    if registry.needs_grad(hidden, weight, bias):
        with_weight = weight.requires_grad or (bias is not None and bias.requires_grad)
        in_backward = reduction == "none" or hidden.dtype == torch.float16
        function = _InBackward if in_backward else _InForward
        return function.apply(operators, hidden, weight, bias, labels, ignore_index, reduction, with_weight)
    losses = operators.losses(hidden, weight, labels, bias, ignore_index)
    return losses if reduction == "none" else (losses * _shares(labels, ignore_index, reduction)).sum()


def raw_calls(operators: Operators, args: Mapping[str, Any]) -> list[tuple[Callable[..., Any], tuple]]:
    """Both operators with arguments for torch.library.opcheck."""
    call = (args["hidden"], args["weight"], args["labels"], args["bias"], args["ignore_index"])
    scale = torch.rand(args["labels"].shape, device=args["hidden"].device)
    return [(operators.losses, call), (operators.gradients, (*call, scale, True))]
