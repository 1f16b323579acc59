# SPDX-License-Identifier: Apache-2.0
"""``embed_layer_norm``: the definition, in plain PyTorch (Devlin et al. 2019, figure 2; ERNIE 2.0's task embedding)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def embed_layer_norm(
    input_ids: Tensor,  # (T,)
    position_ids: Tensor,  # (T,)
    token_type_ids: Tensor,  # (T,)
    word_embeddings: Tensor,  # (V, N)
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,  # (N,)
    bias: Tensor,  # (N,)
    task_type_ids: Tensor | None,  # (T,)
    task_type_embeddings: Tensor | None,
    eps: float,
    padding_idx: int | None,
    position_padding_idx: int | None,
    dropout_p: float,
    dropout_mask: Tensor | None = None,  # (T, N)
) -> Tensor:
    """See ``ctxfast.functional.embed_layer_norm``; ``dropout_mask`` is multiplied by in place of a drawn one."""
    x = F.embedding(input_ids, word_embeddings, padding_idx)
    x = x + F.embedding(token_type_ids, token_type_embeddings)
    x = x + F.embedding(position_ids, position_embeddings, position_padding_idx)
    if task_type_ids is not None:
        x = x + F.embedding(task_type_ids, task_type_embeddings)
    x = F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    if dropout_mask is not None:
        return x * dropout_mask
    return F.dropout(x, dropout_p) if dropout_p > 0 else x
