# SPDX-License-Identifier: Apache-2.0
"""Autograd of ``char_cnn``, over the two operators of an implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._core import registry, torch_ops


def gradient_outputs(table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Of the table, of every weight, then of every bias; uninitialised."""
    of_weights = [torch_ops.allocate(weight.shape, table) for weight in weights]
    of_biases = [torch_ops.allocate(weight.shape[:1], table) for weight in weights]
    return [torch_ops.allocate(table.shape, table), *of_weights, *of_biases]


def _definition_gradients(
    grad: Tensor, ids: Tensor, table: Tensor, parameters: Sequence[Tensor], is_tanh: bool, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Of the table and the parameters, weights first, then as many biases."""
    count = len(parameters) // 2

    def words(table: Tensor, *given: Tensor) -> Tensor:
        return registry.OPS["char_cnn"].reference(
            ids, table, given[:count], given[count:], "tanh" if is_tanh else "relu"
        )

    return torch_ops.definition_gradients(words, (table, *parameters), wanted, (grad,))


class CharCnn(torch.autograd.Function):
    """``fwd`` and ``bwd`` are the operators. ``fwd`` gives the output and, for each number of it, where the window
    begins that it comes from; ``switch`` is its last argument."""

    @staticmethod
    def forward(
        ctx: Any, fwd: Callable[..., Sequence[Tensor]], bwd: Callable[..., list[Tensor]], switch: bool, ids: Tensor,
        is_tanh: bool, table: Tensor, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        count = len(parameters) // 2
        weights, biases = list(parameters[:count]), list(parameters[count:])
        y, at = fwd(ids, table, weights, biases, is_tanh, switch)
        ctx.save_for_backward(y, at, ids, table, *parameters)
        ctx.rest = (bwd, is_tanh)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, at, ids, table, *parameters = ctx.saved_tensors
        bwd, is_tanh = ctx.rest
        if torch_ops.needs_definition(grad):
            grads = _definition_gradients(grad, ids, table, parameters, is_tanh, ctx.needs_input_grad[5:])
        else:
            grad = grad * (1 - y * y) if is_tanh else grad.masked_fill(y <= 0, 0.0)
            grads = bwd(grad, at, ids, table, parameters[: len(parameters) // 2])
        return None, None, None, None, None, *grads
