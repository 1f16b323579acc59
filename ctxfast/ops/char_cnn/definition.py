# SPDX-License-Identifier: Apache-2.0
"""What the backwards of ``char_cnn`` share: their outputs, and the definition's gradients where they are
differentiated themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._core import registry, torch_ops


def gradient_outputs(table: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Of the table, of every weight, then of every bias; uninitialised."""
    of_weights = [torch_ops.allocate(weight.shape, table) for weight in weights]
    of_biases = [torch_ops.allocate(weight.shape[:1], table) for weight in weights]
    return [torch_ops.allocate(table.shape, table), *of_weights, *of_biases]


def gradients(
    grad: Tensor, ids: Tensor, table: Tensor, parameters: Sequence[Tensor], is_tanh: bool, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Of the table and the parameters, weights first, then as many biases."""
    count = len(parameters) // 2

    def words(table: Tensor, *given: Tensor) -> Tensor:
        return registry.OPS["char_cnn"].reference(
            ids, table, given[:count], given[count:], "tanh" if is_tanh else "relu"
        )

    return torch_ops.definition_gradients(words, (table, *parameters), wanted, (grad,))
