# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``attention``."""

from __future__ import annotations

import torch
from torch import zeros

GOOD = dict(qkv=zeros(5, 3, 2, 4), cu_seqlens=torch.tensor([0, 2, 5]), max_seqlen=3, bias=zeros(3, 2, 4))
BAD = (
    (dict(qkv=zeros(5, 2, 2, 4)), ValueError,
     "qkv has shape (5, 2, 2, 4); expected (tokens, 3, heads, head_dim): the packed query, key and value rows. Pack a "
     "padded batch with ctxfast.packing first."),
    (dict(cu_seqlens=torch.tensor([0, 2, 4])), ValueError,
     "cu_seqlens runs from 0 to 4; expected offsets that never fall, from 0 to the 5 rows of qkv."),
    (dict(cu_seqlens=torch.tensor([0, 6, 5])), ValueError,
     "cu_seqlens runs from 0 to 5; expected offsets that never fall, from 0 to the 5 rows of qkv."),
    (dict(cu_seqlens=zeros(0, dtype=torch.int32)), ValueError, "cu_seqlens has shape (0,); expected (sequences + 1,)."),
    (dict(max_seqlen=2), ValueError, "max_seqlen is 2; expected at least 3, the longest sequence in cu_seqlens."),
    (dict(max_seqlen=3.0), TypeError, "max_seqlen is a float; expected an int."),
    (dict(bias=zeros(3, 4, 2)), ValueError, "bias has shape (3, 4, 2); expected (3, heads, head_dim) = (3, 2, 4)."),
    (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0; expected a probability, 0 <= dropout_p < 1."),
)  # fmt: skip
