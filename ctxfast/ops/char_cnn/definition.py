# SPDX-License-Identifier: Apache-2.0
"""Gradients of the definition of ``char_cnn``, for a backward that is itself differentiated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._core import registry, torch_ops


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
