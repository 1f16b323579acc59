# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention's definition, for a backward that is itself differentiated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..._core import registry, torch_ops


def gradients(
    grad: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    numbers: tuple[int, float, float],
    mask: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Of ``qkv`` and ``bias``. ``numbers``: max_seqlen, softmax_scale, dropout_p; ``mask``: dropout's factors."""
    max_seqlen, scale, dropout_p = numbers

    def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
        return registry.OPS["attention"].reference(qkv, cu_seqlens, max_seqlen, bias, scale, dropout_p, mask)

    return torch_ops.definition_gradients(attend, (qkv, bias), wanted, (grad,))
