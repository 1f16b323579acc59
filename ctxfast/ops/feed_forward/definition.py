# SPDX-License-Identifier: Apache-2.0
"""Gradients of ``feed_forward`` that are themselves differentiated: those of its definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._core import registry, torch_ops


def gradients(
    given: Sequence[Tensor | None], activation: str, gated: bool, wanted: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Of x, weight1, bias1, weight2 and bias2, None for those not ``wanted``."""
    definition = registry.OPS["feed_forward"].reference
    return torch_ops.definition_gradients(
        lambda *given: definition(*given, activation, None, gated), given, wanted, (grad,)
    )
