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


def attention(
    qkv: Tensor,  # (T, 3, H, D)
    cu_seqlens: Tensor,  # (S + 1,)
    max_seqlen: int,
    bias: Tensor | None,  # (3, H, D)
    softmax_scale: float | None,
    dropout_p: float,
    dropout_mask: Tensor | None = None,  # (S, H, L, L)
) -> Tensor:
    """See ``ctxfast.functional.attention``; ``dropout_mask`` is multiplied by in place of a drawn one."""
    total, _, heads, head_dim = qkv.shape
    if bias is not None:
        qkv = qkv + bias
    # A traced or exported graph, whose number of tokens is not known yet, is one for some tokens.
    is_exporting = getattr(torch.compiler, "is_exporting", bool)()  # since torch 2.7
    if (isinstance(total, int) and not is_exporting and total == 0) or max_seqlen == 0:
        return qkv.sum(dim=1)  # (0, H, D), still attached to the graph
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    cu_seqlens = cu_seqlens.long()
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    column = torch.arange(max_seqlen, device=qkv.device)
    inside = column < lengths[:, None]  # (S, L)
    row = (cu_seqlens[:-1, None] + column).clamp(max=total - 1)
    query, key, value = qkv[row].permute(2, 0, 3, 1, 4)  # (S, H, L, D) each
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    # fp32 softmax for half precision; float64 stays float64.
    wide = torch.promote_types(qkv.dtype, torch.float32)
    scores = scores.to(wide).masked_fill(~inside[:, None, None, :], torch.finfo(wide).min)
    weights = torch.softmax(scores, dim=-1)
    if dropout_mask is not None:
        weights = weights * dropout_mask
    elif dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    context = torch.matmul(weights.to(qkv.dtype), value)  # (S, H, L, D)
    token = torch.arange(total, device=qkv.device)
    sequence = (token[:, None] >= cu_seqlens[1:]).sum(dim=1)
    return context.transpose(1, 2)[sequence, token - cu_seqlens[sequence]]
