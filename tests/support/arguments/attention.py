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
    (dict(qkv=zeros(5, 6, 4), bias=None), ValueError,
     "qkv has shape (5, 6, 4); expected (tokens, 3, heads, head_dim): the packed query, key and value rows. Pack a "
     "padded batch with ctxfast.packing first."),
    (dict(num_kv_heads=0), ValueError, "num_kv_heads is 0; expected an int above 0, or None."),
    (dict(num_kv_heads=2), ValueError,
     "qkv has shape (5, 3, 2, 4); expected (tokens, heads + 2*num_kv_heads, head_dim) with num_kv_heads = 2 and a "
     "multiple of it as heads: the packed query, key and value rows."),
    (dict(qkv=zeros(5, 7, 4), num_kv_heads=2), ValueError,
     "qkv has shape (5, 7, 4); expected (tokens, heads + 2*num_kv_heads, head_dim) with num_kv_heads = 2 and a "
     "multiple of it as heads: the packed query, key and value rows."),
    (dict(qkv=zeros(5, 8, 4), num_kv_heads=2), ValueError,
     "bias has shape (3, 2, 4); expected (heads + 2*num_kv_heads, head_dim) = (8, 4)."),
    (dict(relative_bias=zeros(3, 5)), ValueError,
     "relative_bias has shape (3, 5); expected (heads, 2*reach - 1) = (2, any)."),
    (dict(relative_bias=zeros(2, 4)), ValueError,
     "relative_bias has 4 columns; expected an odd number, 2*reach - 1: one for each distance from -(reach - 1) to "
     "reach - 1."),
    (dict(relative_bias=zeros(2, 5).half()), TypeError,
     "relative_bias has dtype torch.float16; expected torch.float32, whatever half precision qkv has."),
    (dict(window=-1), ValueError, "window is -1; expected an int of 0 or more, or None to attend to all keys."),
    (dict(window=2.0), ValueError, "window is 2.0; expected an int of 0 or more, or None to attend to all keys."),
    (dict(rotary=zeros(3, 4)), ValueError,
     "rotary has shape (3, 4); expected (positions, 2, rotated/2) = (any, 2, any)."),
    (dict(rotary=zeros(3, 2, 3)), ValueError,
     "rotary has shape (3, 2, 3), cosines and sines for 6 dimensions of a head; expected 2 to head_dim = 4 of them."),
    (dict(rotary=zeros(2, 2, 2)), ValueError,
     "rotary has 2 positions; expected at least max_seqlen = 3. Make a longer table, or split the sequences."),
    (dict(rotary=zeros(3, 2, 2).requires_grad_()), ValueError,
     "rotary requires a gradient; expected a table that has none. Pass rotary.detach()."),
    (dict(dropout_p=1.0), ValueError, "dropout_p is 1.0; expected a probability, 0 <= dropout_p < 1."),
)  # fmt: skip
