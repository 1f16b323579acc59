# SPDX-License-Identifier: Apache-2.0
"""BERT's input embeddings, with RoBERTa's positions and ERNIE's task types."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from . import tools
from .layer_norm import LayerNorm


def roberta_position_ids(input_ids: Tensor, padding_idx: int) -> Tensor:
    """(B, L) ids -> (B, L) positions as RoBERTa numbers them.

    Tokens other than ``padding_idx`` count from ``padding_idx + 1`` in each row, whatever the attention mask says;
    ``padding_idx`` itself has the position ``padding_idx``.

    Reference: fairseq's make_positions, as kept by Hugging Face.
    """
    is_real = input_ids.ne(padding_idx)
    return is_real.cumsum(dim=1) * is_real + padding_idx


class Embeddings(tools.NotScriptable):
    """``dropout(LayerNorm(word + token type + position [+ task type]))`` of packed tokens.

    Args:
        vocab_size, hidden_size, max_position_embeddings, type_vocab_size: sizes of the tables. No token types, and no
            table of them, with a ``type_vocab_size`` of 0 (DistilBERT).
        task_type_vocab_size: rows of ERNIE's task table; None for no such table.
        padding_idx: word id whose row gets no gradient, as in torch.nn.Embedding; None for none.
        position_padding_idx: the same for the position table (RoBERTa); None for none.
        eps: of the LayerNorm.
        dropout: probability of dropping an element in training.
        impl: implementation of ``embed_layer_norm``; None chooses.

    Parameters: ``{word,position,token_type[,task_type]}_embeddings.weight``,
    ``LayerNorm.{weight,bias}``.
    Reference: Devlin et al. 2019, figure 2; Sun et al. 2020; names as in Hugging Face's
    Bert/ErnieEmbeddings.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        *,
        task_type_vocab_size: int | None = None,
        padding_idx: int | None = 0,
        position_padding_idx: int | None = None,
        eps: float = 1e-12,
        dropout: float = 0.0,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.word_embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=padding_idx, **place)
        self.position_embeddings = nn.Embedding(
            max_position_embeddings, hidden_size, padding_idx=position_padding_idx, **place
        )
        self.token_type_embeddings = nn.Embedding(type_vocab_size, hidden_size, **place) if type_vocab_size else None
        if task_type_vocab_size is not None:
            self.task_type_embeddings = nn.Embedding(task_type_vocab_size, hidden_size, **place)
        else:
            self.task_type_embeddings = None
        self.LayerNorm = LayerNorm(hidden_size, eps=eps, **place)
        self.dropout, self.impl = dropout, impl

    @tools.fx_leaf
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
    ) -> Tensor:
        """(T,) int64 each -> (T, N). Types that are not given are 0; without a table of them they are not read.

        Raises:
            RuntimeError: an embedding was replaced by another module, whose ``forward`` would be ignored.
        """
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings", "task_type_embeddings"):
            if getattr(self, name) is not None:
                tools.readable(self, name, getattr(self, name), nn.Embedding)
        # Read after the loop above, which computes weights that are computed before each call.
        words, types = self.word_embeddings.weight, self.token_type_embeddings
        if token_type_ids is None or types is None:
            token_type_ids = torch.zeros_like(input_ids)
        task_table = self.task_type_embeddings
        if task_table is not None and task_type_ids is None:
            task_type_ids = torch.zeros_like(input_ids)
        return functional.embed_layer_norm(
            input_ids,
            position_ids,
            token_type_ids,
            words,
            self.position_embeddings.weight,
            words.new_zeros(1, words.shape[1]) if types is None else types.weight,
            self.LayerNorm.weight,
            self.LayerNorm.bias,
            task_type_ids,
            None if task_table is None else task_table.weight,
            eps=self.LayerNorm.eps,
            padding_idx=self.word_embeddings.padding_idx,
            position_padding_idx=self.position_embeddings.padding_idx,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}, impl={self.impl or 'auto'}"
