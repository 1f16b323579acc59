# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Hugging Face's with weights large enough that a wrong mask shows, and a padded batch for them."""

from __future__ import annotations

import torch
from torch import nn

IDS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])


def tiny_model(kind: str, head: str = "Model", dropout: float = 0.0, **options) -> nn.Module:
    """A tiny model with weights large enough that attention is far from uniform."""
    options = dict(initializer_range=0.2, vocab_size=40, max_position_embeddings=64, pad_token_id=1) | options
    if kind == "DistilBert":
        sizes = dict(dim=16, n_layers=2, n_heads=2, hidden_dim=32, dropout=dropout, attention_dropout=dropout)
        sizes |= dict(qa_dropout=0.0, seq_classif_dropout=0.0)
    else:
        sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        options = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout) | options
    import transformers

    torch.manual_seed(4)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    return getattr(transformers, f"{kind}{head}")(config).eval()
