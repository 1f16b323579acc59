# SPDX-License-Identifier: Apache-2.0
"""One post-LN encoder layer over packed tokens, under Hugging Face's names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import SelfAttention
from .feed_forward import Intermediate, ProjectAddLayerNorm


class AttentionBlock(nn.Module):
    """Self-attention, output projection, residual and LayerNorm: ``self.{query,key,value}``,
    ``output.{dense,LayerNorm}``."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.self = SelfAttention(hidden_size, num_heads, dropout=attention_dropout, **place)
        self.output = ProjectAddLayerNorm(hidden_size, hidden_size, eps=eps, dropout=dropout, **place)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x (T, N) -> (T, N)."""
        return self.output(self.self(x, cu_seqlens, max_seqlen), x)


class TransformerLayer(nn.Module):
    """A layer of BERT's encoder: attention block, then feed-forward block, each ended by residual
    and LayerNorm.

    Args:
        hidden_size: N.
        num_heads: H, a divisor of N.
        intermediate_size: width of the feed-forward block.
        activation: an activation of ``ctxfast.linear_act``.
        eps: of both LayerNorms.
        dropout: before both residuals, in training.
        attention_dropout: of the attention weights, in training.

    Implementations are chosen per call; ``with ctxfast.use_impl(...)`` or the ``impl`` attribute of
    an inner module (``layer.attention.self.impl = "reference"``) asks for one.

    Parameters: ``attention.self.{query,key,value}``, ``attention.output.{dense,LayerNorm}``,
    ``intermediate.dense``, ``output.{dense,LayerNorm}``.
    Reference: Devlin et al. 2019; names as in Hugging Face's BertLayer.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        activation: str = "gelu",
        eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.attention = AttentionBlock(
            hidden_size,
            num_heads,
            eps=eps,
            dropout=dropout,
            attention_dropout=attention_dropout,
            **place,
        )
        self.intermediate = Intermediate(hidden_size, intermediate_size, activation, **place)
        self.output = ProjectAddLayerNorm(intermediate_size, hidden_size, eps=eps, dropout=dropout, **place)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        """x (T, N) packed tokens, cu_seqlens (S + 1,) int32, max_seqlen (the longest sequence, or
        more) -> (T, N)."""
        x = self.attention(x, cu_seqlens, max_seqlen)
        return self.output(self.intermediate(x), x)
