# SPDX-License-Identifier: Apache-2.0
"""One post-LN encoder layer over packed tokens, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import tools, whole_layer
from .all_rows import AllRows
from .attention import SelfAttention
from .feed_forward import Intermediate, ProjectAddLayerNorm
from .layer_norm import AddLayerNorm


class AttentionBlock(tools.Unscripted):
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

    @tools.one_call
    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows: AllRows | None = None) -> Tensor:
        """x (T, N) -> (T, N)."""
        return self.output(self.self(x, cu_seqlens, max_seqlen, rows), x)


class TransformerLayer(tools.Unscripted):
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

    @tools.one_call
    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, rows: AllRows | None = None) -> Tensor:
        """x (T, N) packed tokens, cu_seqlens (S + 1,) int32, max_seqlen (the longest sequence, or
        more) -> (T, N). With ``rows``, x holds every row of a padded batch."""
        if rows is None and whole_layer.is_open(x):
            states = whole_layer.run(x, cu_seqlens, max_seqlen, [self.whole()])
            if states is not None:
                return states[0]
        x = self.attention(x, cu_seqlens, max_seqlen, rows)
        return self.output(self.intermediate(x), x)

    def whole(self) -> whole_layer.Layer | None:
        """What one call needs to compute this layer, as it is now; None where its parts must be called."""
        # By their tables: through attributes it takes ten times as long, and all of a short text's layer some 100 us.
        modules = self._modules
        attention, widen, narrow = modules["attention"], modules["intermediate"], modules["output"]
        own, project = attention._modules["self"], attention._modules["output"]
        parts = (
            attention, own, project, project._modules["dense"], project._modules["LayerNorm"], widen,
            widen._modules["dense"], narrow, narrow._modules["dense"], narrow._modules["LayerNorm"],
        )  # fmt: skip
        # Somebody may have put another module in place of one.
        if tuple(map(type, parts)) != _KINDS or any(map(whole_layer.is_watched, parts)):
            return None
        _, _, _, project_dense, first_norm, _, widen_dense, _, narrow_dense, last_norm = parts
        choosing = (own, project, widen, narrow)
        if any([part.impl is not None for part in (*choosing, first_norm, last_norm)]):
            return None
        if first_norm.eps != last_norm.eps or any([part.weight_dtype is not own.weight_dtype for part in choosing]):
            return None
        if self.training and (own.dropout or first_norm.dropout or last_norm.dropout):
            return None
        qkv = own._parameters
        weights = (
            qkv["qkv_weight"], qkv["qkv_bias"], *_pair(project_dense), *_pair(first_norm), *_pair(widen_dense),
            *_pair(narrow_dense), *_pair(last_norm),
        )  # fmt: skip
        options = dict(
            num_heads=own.num_heads, activation=widen.activation, eps=first_norm.eps, weight_dtype=own.weight_dtype
        )
        return whole_layer.Layer(weights, options)


def run_whole(
    layers: Iterable[nn.Module], x: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, all_layers: bool = False
) -> tuple[Tensor, ...] | None:
    """What the last of some layers gives, or every one, by one call; None where they must be called one by one."""
    if not whole_layer.is_open(x):
        return None
    found = []
    for layer in layers:
        if type(layer) is not TransformerLayer or whole_layer.is_watched(layer):
            return None
        found.append(layer.whole())
    return whole_layer.run(x, cu_seqlens, max_seqlen, found, all_layers=all_layers)


# Of the parts that ``TransformerLayer.whole`` lists.
_KINDS = (AttentionBlock, SelfAttention, ProjectAddLayerNorm, nn.Linear, AddLayerNorm, Intermediate, nn.Linear,
          ProjectAddLayerNorm, nn.Linear, AddLayerNorm)  # fmt: skip


def _pair(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]
