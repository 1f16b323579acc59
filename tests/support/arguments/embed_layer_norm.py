# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``embed_layer_norm``."""

from __future__ import annotations

import torch
from torch import zeros

_IDS = zeros(5, dtype=torch.int64)

GOOD = dict(
    input_ids=_IDS,
    position_ids=_IDS,
    token_type_ids=_IDS,
    word_embeddings=zeros(9, 8),
    position_embeddings=zeros(7, 8),
    token_type_embeddings=zeros(2, 8),
    weight=zeros(8),
    bias=zeros(8),
    task_type_ids=_IDS,
    task_type_embeddings=zeros(3, 8),
)
BAD = (
    (dict(word_embeddings=zeros(9)), ValueError, "word_embeddings has shape (9,); expected (vocab_size, hidden_size)."),
    (dict(input_ids=zeros(1, 5).long()), ValueError, "input_ids has shape (1, 5); expected (tokens,), packed."),
    (dict(input_ids=torch.tensor([0, 1, 9, 0, 0])), ValueError,
     "input_ids holds 9; expected values in 0..8. These are the rows of word_embeddings."),
    (dict(position_ids=torch.tensor([0, -1, 0, 0, 0])), ValueError,
     "position_ids holds -1; expected values in 0..6. These are the rows of position_embeddings."),
    (dict(token_type_ids=zeros(4).long()), ValueError, "token_type_ids has shape (4,); expected (tokens,) = (5,)."),
    (dict(task_type_ids=None), ValueError,
     "task_type_ids is None; expected both task_type_ids and task_type_embeddings, or neither."),
    (dict(position_embeddings=zeros(7, 9)), ValueError,
     "position_embeddings has shape (7, 9); expected (rows, hidden_size) = (any, 8)."),
)  # fmt: skip
