# SPDX-License-Identifier: Apache-2.0
"""``attention``: the definition, in plain PyTorch (Vaswani et al. 2017, eq. 1; no causal mask).

Packed rows are spread over a (sequences, max_seqlen) grid and masked there: it reads no value on the host, so it
runs and compiles on any device, at the price of the padding that the real implementations avoid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rotated(rows: Tensor, table: Tensor, place: Tensor) -> Tensor:
    """The first dimensions of (T, heads, D) rotated by each token's place, d together with d + R/2."""
    cos, sin = table[place][:, :, None].unbind(1)  # (T, 1, R/2)
    half = cos.shape[-1]
    first, second, rest = rows.to(table.dtype).split((half, half, rows.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1).to(rows.dtype)


def attention(
    qkv: Tensor,  # (T, 3, H, D), or (T, H + 2G, D)
    cu_seqlens: Tensor,  # (S + 1,)
    max_seqlen: int,
    bias: Tensor | None,  # (3, H, D), or (H + 2G, D)
    softmax_scale: float | None,
    dropout_p: float,
    relative_bias: Tensor | None = None,  # (H, 2R - 1)
    window: int | None = None,
    rotary: Tensor | None = None,  # (P, 2, R/2)
    num_kv_heads: int | None = None,  # G
    dropout_mask: Tensor | None = None,  # (S, H, L, L)
) -> Tensor:
    """See ``ctxfast.functional.attention``; ``dropout_mask`` is multiplied by in place of a drawn one."""
    total, head_dim = qkv.shape[0], qkv.shape[-1]
    if bias is not None:
        qkv = qkv + bias
    if num_kv_heads is None:
        query, key, value = qkv.unbind(1)  # (T, H, D)
    else:
        heads = qkv.shape[1] - 2 * num_kv_heads
        query, key, value = qkv.split((heads, num_kv_heads, num_kv_heads), dim=1)
    # A traced or exported graph, whose number of tokens is not known yet, is one for some tokens.
    is_exporting = getattr(torch.compiler, "is_exporting", bool)()  # since torch 2.7
    if (isinstance(total, int) and not is_exporting and total == 0) or max_seqlen == 0:
        return query.clone()  # (0, H, D), still attached to the graph
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    column = torch.arange(max_seqlen, device=qkv.device)
    inside = column < lengths[:, None]  # (S, L)
    row = (cu_seqlens[:-1, None] + column).clamp(max=total - 1)
    token = torch.arange(total, device=qkv.device)
    sequence = (token[:, None] >= cu_seqlens[1:]).sum(dim=1)
    place = token - cu_seqlens[sequence]
    if rotary is not None:
        query, key = rotated(query, rotary, place), rotated(key, rotary, place)
    query, key, value = (each[row].transpose(1, 2) for each in (query, key, value))  # (S, H or G, L, D)
    if num_kv_heads is not None:
        key, value = (each.repeat_interleave(query.shape[1] // num_kv_heads, dim=1) for each in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    # fp32 softmax for half precision; float64 stays float64.
    wide = torch.promote_types(qkv.dtype, torch.float32)
    scores = scores.to(wide)
    distance = column - column[:, None]  # (L, L), of keys from queries
    if relative_bias is not None:
        reach = (relative_bias.shape[1] + 1) // 2
        scores = scores + relative_bias[:, distance.clamp(1 - reach, reach - 1) + reach - 1]
    is_met = inside[:, None, None, :]
    if window is not None:
        is_met = is_met & (distance.abs() <= window)
    weights = torch.softmax(scores.masked_fill(~is_met, torch.finfo(wide).min), dim=-1)
    if dropout_mask is not None:
        weights = weights * dropout_mask
    elif dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    context = torch.matmul(weights.to(qkv.dtype), value)  # (S, H, L, D)
    return context.transpose(1, 2)[sequence, place]
