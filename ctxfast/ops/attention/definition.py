# SPDX-License-Identifier: Apache-2.0
"""What the implementations of attention share: the scale of scores, and the definition's gradients for a backward that
is itself differentiated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..._core import registry, torch_ops


def scale(qkv: Tensor, softmax_scale: float | None) -> float:
    """The factor on scores, as asked for or 1/sqrt(D)."""
    return 1.0 / math.sqrt(qkv.shape[-1]) if softmax_scale is None else softmax_scale


def head_counts(qkv: Tensor, num_kv_heads: int | None) -> tuple[int, int]:
    """H of queries and G of keys and values."""
    if num_kv_heads is None:
        return qkv.shape[2], qkv.shape[2]
    return qkv.shape[1] - 2 * num_kv_heads, num_kv_heads


class Constants(NamedTuple):
    """What a call computes with that has no gradient, but where sequences lie and the places' angles."""

    max_seqlen: int
    scale: float
    dropout_p: float
    window: int | None = None
    num_kv_heads: int | None = None


def gradients(
    grad: Tensor,
    inputs: Sequence[Tensor | None],
    cu_seqlens: Tensor,
    rotary: Tensor | None,
    constants: Constants,
    mask: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Of the ``inputs`` qkv, bias and relative_bias. ``mask``: dropout's factors."""

    def attend(qkv: Tensor, bias: Tensor | None, relative_bias: Tensor | None) -> Tensor:
        max_seqlen, factor, dropout_p, window, num_kv_heads = constants
        return registry.OPS["attention"].reference(
            qkv, cu_seqlens, max_seqlen, bias, factor, dropout_p, relative_bias, window, rotary, num_kv_heads, mask
        )

    return torch_ops.definition_gradients(attend, inputs, wanted, (grad,))
