# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``char_cnn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import zeros


def _weights(at: int | None = None, put: Any = None) -> list[Any]:
    """The weights of two layers, one of them replaced."""
    shapes = ((24, 8), (24,), (8, 8), (8,), (8,), (8,), (6, 8), None, (8, 6), (8,), (8,), (8,)) * 2
    weights = [None if shape is None else zeros(shape) for shape in shapes]
    if at is not None:
        weights[at] = put
    return weights


GOOD = dict(
    char_ids=zeros(3, 6, dtype=torch.int64),
    char_embeddings=zeros(9, 4),
    conv_weights=[zeros(5, 4, 2), zeros(7, 4, 6)],
    conv_biases=[zeros(5), zeros(7)],
    activation="relu",
)
BAD = (
    (dict(char_ids=zeros(3, 6)), TypeError,
     "char_ids has dtype torch.float32; expected int64 or int32. Convert it with .long()."),
    (dict(char_ids=torch.full((3, 6), 9)), ValueError,
     "char_ids holds 9; expected values in 0..8. These are the rows of char_embeddings."),
    (dict(conv_biases=[zeros(5)]), ValueError,
     "conv_weights holds 2 tensors and conv_biases 1; expected one of each per filter width."),
    (dict(conv_weights=[zeros(5, 4, 2), zeros(7, 4, 8)]), ValueError,
     "conv_weights[1] has width 8; expected at most 6, the characters of a word in char_ids."),
    (dict(activation="gelu"), ValueError, "activation is 'gelu'; expected one of 'relu', 'tanh'."),
)  # fmt: skip
