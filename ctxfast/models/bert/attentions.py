# SPDX-License-Identifier: Apache-2.0
"""Attention weights of a BERT, which packed attention never holds: made from the hidden states, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...packing import Packing


def attention_weights(
    layers: Sequence[Any], states: Sequence[Tensor], packing: Packing, relative_bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Of every layer, (B, H, L, L): which share of each query (row) goes to each key. Zeros at padding.

    Args:
        layers: ``nn.TransformerLayer`` each.
        states: what each layer reads, (T, N); there may be more.
        packing: where their rows stand.
        relative_bias: as ``functional.attention`` takes it; texts are then without gaps.

    Softmax is float32 (float64 for float64), without dropout; the result has the dtype of ``states``.
    """
    bias = None if relative_bias is None else _by_pair(relative_bias, packing.seqlen)
    found = []
    for layer, x in zip(layers, states):
        own = layer.attention.self
        rows = packing.unpack(F.linear(x, *own.qkv())).unflatten(-1, (3, own.num_heads, own.head_dim))
        query, key = (part.transpose(1, 2) for part in rows[:, :, :2].unbind(2))  # (B, H, L, D)
        real = packing.unpack(x.new_ones(x.shape[0], 1))[..., 0].bool()
        scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(x.dtype, torch.float32)) * own.head_dim**-0.5
        scores = scores if bias is None else scores + bias
        scores = scores.masked_fill(~real[:, None, None, :], torch.finfo(scores.dtype).min)
        both = real[:, None, :, None] & real[:, None, None, :]
        found.append(torch.softmax(scores, -1).masked_fill(~both, 0.0).to(x.dtype))
    return tuple(found)


def _by_pair(relative_bias: Tensor, length: int) -> Tensor:
    """(H, 2R - 1) -> (H, L, L): the bias of each query and key."""
    reach = (relative_bias.shape[1] + 1) // 2
    place = torch.arange(length, device=relative_bias.device)
    distance = (place - place[:, None]).clamp(1 - reach, reach - 1)
    return relative_bias[:, distance + reach - 1]
