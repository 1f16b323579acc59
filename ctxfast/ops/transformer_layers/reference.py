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


# What dropout multiplies a layer's attention weights (S, H, L, L) and what goes into its LayerNorms (T, N) by; None for
# none, or for one to be drawn.
Masks = tuple["Tensor | None", "Tensor | None", "Tensor | None"]
_NO_MASKS: Masks = (None, None, None)


def _product(x: Tensor, pair: Pair, weight_dtype: torch.dtype | None) -> Tensor:
    weight, bias = pair
    return F.linear(rounded(x, weight_dtype), rounded(weight, weight_dtype), bias)


def _dropped(x: Tensor, p: float, mask: Tensor | None) -> Tensor:
    if mask is not None:
        return x * mask
    return F.dropout(x, p) if p > 0 else x


def _attended(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, p: float, mask: Tensor | None, relative_bias: Tensor | None
) -> Tensor:
    """(T, 3, H, D) -> (T, H, D)."""
    total, _, _, head_dim = qkv.shape
    cu_seqlens = cu_seqlens.long()
    column = torch.arange(max_seqlen, device=qkv.device)
    inside = column < (cu_seqlens[1:] - cu_seqlens[:-1])[:, None]  # (S, L)
    row = (cu_seqlens[:-1, None] + column).clamp(max=total - 1)
    query, key, value = qkv[row].permute(2, 0, 3, 1, 4)  # (S, H, L, D) each
    wide = torch.promote_types(qkv.dtype, torch.float32)
    scores = (torch.matmul(query, key.transpose(-1, -2)) * head_dim**-0.5).to(wide)
    if relative_bias is not None:
        reach = (relative_bias.shape[1] + 1) // 2
        distance = (column - column[:, None]).clamp(1 - reach, reach - 1)  # (L, L), of keys from queries
        scores = scores + relative_bias[:, distance + reach - 1]
    scores = scores.masked_fill(~inside[:, None, None, :], torch.finfo(wide).min)
    shares = _dropped(torch.softmax(scores, dim=-1), p, mask)
    context = torch.matmul(shares.to(qkv.dtype), value).transpose(1, 2)  # (S, L, H, D)
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
    dropout_p: tuple[float, float, float],
    compute_dtype: torch.dtype | None,
    relative_bias: Tensor | None,
    masks: Masks,
) -> Tensor:
    size = x.shape[1:]
    attention_p, dropout_p, last_p = dropout_p
    attention_mask, mask, last_mask = masks
    wide = x.dtype if compute_dtype is None else torch.promote_types(x.dtype, torch.float32)

    def low(tensor: Tensor | None) -> Tensor | None:
        return tensor if compute_dtype is None or tensor is None else tensor.to(compute_dtype)

    def ended(x: Tensor, y: Tensor, pair: Pair, norm: Pair, p: float, mask: Tensor | None) -> Tensor:
        """The end of a block; with ``compute_dtype`` the bias is added in float32."""
        if compute_dtype is None:
            product = _product(y, pair, weight_dtype)
        else:
            product = _product(y, (low(pair[0]), None), weight_dtype).to(wide)
            product = product if pair[1] is None else product + pair[1].to(wide)
        scale, shift = norm
        return F.layer_norm(x.to(wide) + _dropped(product, p, mask), size, scale.to(wide), shift.to(wide), eps)

    qkv, project, attention_norm, widen, narrow, output_norm = zip(weights[::2], weights[1::2])
    rows = _product(low(x), tuple(map(low, qkv)), weight_dtype).unflatten(-1, (3, num_heads, size[0] // num_heads))
    # Without tokens nothing is attended to; the sum keeps the graph. A recorded graph's sizes are no ints: it has some.
    is_empty = (isinstance(x.shape[0], int) and x.shape[0] == 0) or max_seqlen == 0
    if is_empty:
        context = rows.sum(dim=1)
    else:
        context = _attended(rows, cu_seqlens, max_seqlen, attention_p, attention_mask, relative_bias)
    x = ended(x, context.flatten(1), project, attention_norm, dropout_p, mask)
    made = activated(_product(low(x), tuple(map(low, widen)), weight_dtype), activation)
    return ended(x, made, narrow, output_norm, last_p, last_mask)


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
    dropout_p: tuple[float, float, float] = (0.0, 0.0, 0.0),
    compute_dtype: torch.dtype | None = None,
    relative_bias: Tensor | None = None,  # (H, 2R - 1), of all layers
    dropout_masks: Sequence[Masks] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """See ``ctxfast.functional.transformer_layers``; ``dropout_masks``, of each layer, stand in for drawn ones."""
    states = []
    # In the dtypes asked for, under autocast too: it would raise and lower others.
    has_autocast = torch.amp.is_autocast_available(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if has_autocast else nullcontext():
        for i in range(0, len(weights), 12):
            x = _layer(
                x, cu_seqlens, max_seqlen, weights[i : i + 12], num_heads, activation, eps, weight_dtype, dropout_p,
                compute_dtype, relative_bias, _NO_MASKS if dropout_masks is None else dropout_masks[i // 12],
            )  # fmt: skip
            states.append(x)
    return tuple(states) if all_layers else x
