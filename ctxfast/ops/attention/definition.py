# SPDX-License-Identifier: Apache-2.0
"""What the implementations of attention share: the scale of scores, and the definition's gradients for a backward that
is itself differentiated."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..._core import registry, torch_ops


def scale(qkv: Tensor, softmax_scale: float | None) -> float:
    """The factor on scores, as asked for or 1/sqrt(D)."""
    return 1.0 / math.sqrt(qkv.shape[3]) if softmax_scale is None else softmax_scale


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
    max_seqlen, factor, dropout_p = numbers

    def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
        return registry.OPS["attention"].reference(qkv, cu_seqlens, max_seqlen, bias, factor, dropout_p, mask)

    return torch_ops.definition_gradients(attend, (qkv, bias), wanted, (grad,))
