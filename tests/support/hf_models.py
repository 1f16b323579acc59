# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Hugging Face's, ours of the same weights beside them, and a padded batch."""

from __future__ import annotations

import torch
from torch import nn

from ctxfast.models.bert import heads
from ctxfast.models.bert.config import BertConfig
from ctxfast.models.bert.modeling import Bert

# model_type -> how names of its classes begin.
HF_FAMILIES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "ernie": "Ernie"}
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


def pair(
    model_type: str = "bert", head: str = "Model", attention: str = "eager", **fields
) -> tuple[nn.Module, nn.Module]:
    """Ours and Hugging Face's of the same random weights, in eval mode; ``fields`` are the configuration's."""
    import transformers

    config = BertConfig.from_dict({"model_type": model_type, **fields})
    family = HF_FAMILIES[model_type]
    theirs_config = getattr(transformers, f"{family}Config").from_dict(config.to_dict())
    theirs_config._attn_implementation = attention
    theirs = getattr(transformers, family + head)(theirs_config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() == 1:  # biases and LayerNorm start at 0 and 1, which hides mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = (Bert(config) if head == "Model" else getattr(heads, f"Bert{head}")(config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs
