# SPDX-License-Identifier: Apache-2.0
"""``transformer_layers``: the definition, in plain PyTorch (Vaswani et al. 2017, section 3.1; Devlin et al. 2019).

As in ``attention``'s definition, packed rows are spread over a (sequences, max_seqlen) grid and masked there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.definitions import activated, rounded

# (weight, bias)
Pair = tuple[Tensor, "Tensor | None"]


def _product(x: Tensor, pair: Pair, weight_dtype: torch.dtype | None) -> Tensor:
    weight, bias = pair
    return F.linear(rounded(x, weight_dtype), rounded(weight, weight_dtype), bias)


def _attended(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """(T, 3, H, D) -> (T, H, D)."""
    total, _, _, head_dim = qkv.shape
    cu_seqlens = cu_seqlens.long()
    column = torch.arange(max_seqlen, device=qkv.device)
    inside = column < (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]  # (S, L)
    row = (cu_seqlens[:-1, None] + column).clamp(max=total - 1)
    query, key, value = qkv[row].permute(2, 0, 3, 1, 4)  # (S, H, L, D) each
    wide = torch.promote_types(qkv.dtype, torch.float32)
    scores = (torch.matmul(query, key.transpose(-1, -2)) * head_dim**-0.5).to(wide)
    scores = scores.masked_fill(~inside[:, None, None, :], torch.finfo(wide).min)
    context = torch.matmul(torch.softmax(scores, dim=-1).to(qkv.dtype), value).transpose(1, 2)  # (S, L, H, D)
    token = torch.arange(total, device=qkv.device)
    sequence = (token[:, None] >= cu_seqlens[1:]).sum(dim=1)
    return context[sequence, token - cu_seqlens[sequence]]


def _layer(
    x: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weights: Sequence[Tensor | None],
    num_heads: int,
    activation: str,
    eps: float,
    weight_dtype: torch.dtype | None,
) -> Tensor:
    qkv, project, attention_norm, widen, narrow, output_norm = zip(weights[::2], weights[1::2])
    size = x.shape[1:]
    rows = _product(x, qkv, weight_dtype).unflatten(-1, (3, num_heads, size[0] // num_heads))
    # Without tokens nothing is attended to; the sum keeps the graph. A recorded graph's sizes are no ints: it has some.
    is_empty = (isinstance(x.shape[0], int) and x.shape[0] == 0) or max_seqlen == 0
    context = rows.sum(dim=1) if is_empty else _attended(rows, cu_seqlens, max_seqlen)
    projected = _product(context.flatten(1), project, weight_dtype)
    x = F.layer_norm(x + projected, size, *attention_norm, eps)
    wide = activated(_product(x, widen, weight_dtype), activation)
    return F.layer_norm(x + _product(wide, narrow, weight_dtype), size, *output_norm, eps)


def transformer_layers(
    x: Tensor,  # (T, N)
    cu_seqlens: Tensor,  # (S + 1,)
    max_seqlen: int,
    # of each layer: qkv (3N, N), project (N, N), attention_norm (N,), widen (M, N), narrow (N, M), output_norm (N,),
    # weight and bias each
    weights: Sequence[Tensor | None],
    num_heads: int,
    activation: str,
    eps: float,
    weight_dtype: torch.dtype | None,
    all_layers: bool,
) -> Tensor | tuple[Tensor, ...]:
    """See ``ctxfast.functional.transformer_layers``."""
    states = []
    # In the inputs' dtype, under autocast too: it has lowered them already, and would raise parts of a layer again.
    has_autocast = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if has_autocast else nullcontext():
        for i in range(0, len(weights), 12):
            x = _layer(x, cu_seqlens, max_seqlen, weights[i : i + 12], num_heads, activation, eps, weight_dtype)
            states.append(x)
    return tuple(states) if all_layers else x
