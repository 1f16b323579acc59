# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``transformer_layers``."""

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


GOOD = dict(x=zeros(5, 8), cu_seqlens=torch.tensor([0, 2, 5]), max_seqlen=3, weights=_weights(), num_heads=2)
BAD = (
    (dict(x=zeros(1, 5, 8)), ValueError,
     "x has shape (1, 5, 8); expected (tokens, hidden_size), packed. Pack a padded batch with ctxfast.packing first."),
    (dict(x=zeros(5, 8).long()), TypeError,
     "x has dtype torch.int64; expected float32, float16, bfloat16 or float64. Convert it with .float()."),
    (dict(num_heads=3), ValueError, "num_heads is 3; expected a divisor of hidden_size = 8."),
    (dict(weights=[]), ValueError,
     "weights holds 0 tensors; expected 12 for each of one or more layers: weight and bias of qkv, project, "
     "attention_norm, widen, narrow, output_norm."),
    (dict(weights=_weights()[:-1]), ValueError,
     "weights holds 23 tensors; expected 12 for each of one or more layers: weight and bias of qkv, project, "
     "attention_norm, widen, narrow, output_norm."),
    (dict(weights=_weights(at=0, put=zeros(8, 24))), ValueError,
     "weight of qkv of layer 0 has shape (8, 24); expected (3*hidden_size, hidden_size) = (24, 8)."),
    (dict(weights=_weights(at=15, put=zeros(7))), ValueError,
     "bias of project of layer 1 has shape (7,); expected (hidden_size,) = (8,)."),
    (dict(weights=_weights(at=5, put=None)), TypeError,
     "bias of attention_norm of layer 0 is a NoneType; expected a torch.Tensor."),
    (dict(weights=_weights(at=6, put=None)), TypeError,
     "weight of widen of layer 0 is a NoneType; expected a torch.Tensor."),
    (dict(weights=_weights(at=18, put=zeros(7, 8))), ValueError,
     "weight of widen of layer 1 has shape (7, 8); expected (intermediate_size, hidden_size) = (6, 8)."),
    (dict(weights=_weights(at=8, put=zeros(8, 7))), ValueError,
     "weight of narrow of layer 0 has shape (8, 7); expected (hidden_size, intermediate_size) = (8, 6)."),
    (dict(weights=_weights(at=18, put=zeros(6, 8).half())), TypeError,
     "weight of widen of layer 1 has dtype torch.float16; expected torch.float32, that of x. Convert one of them, or "
     "run under torch.autocast."),
    (dict(cu_seqlens=torch.tensor([0, 6, 5])), ValueError,
     "cu_seqlens runs from 0 to 5; expected offsets that never fall, from 0 to the 5 rows of x."),
    (dict(max_seqlen=2), ValueError, "max_seqlen is 2; expected at least 3, the longest sequence in cu_seqlens."),
    (dict(max_seqlen=3.5), TypeError, "max_seqlen is a float; expected an int."),
    (dict(activation="swish"), ValueError,
     "activation is 'swish'; expected one of 'none', 'gelu', 'gelu_tanh', 'relu', 'tanh', 'silu'."),
    (dict(dropout_p=(0.1, 0.1)), ValueError,
     "dropout_p holds 2 probabilities; expected 3: of an attention weight, and of an element before each of the two "
     "residual sums."),
    (dict(dropout_p=(0.1, 1.0, 0.1)), ValueError, "dropout_p is 1.0; expected a probability, 0 <= dropout_p < 1."),
    (dict(relative_bias=zeros(3, 5)), ValueError,
     "relative_bias has shape (3, 5); expected (num_heads, 2*reach - 1) = (2, any)."),
    (dict(relative_bias=zeros(2, 4)), ValueError,
     "relative_bias has shape (2, 4) and dtype torch.float32; expected an odd number of columns, 2*reach - 1, in "
     "torch.float32, whatever half precision x has."),
    (dict(compute_dtype=torch.float32), ValueError,
     "compute_dtype is torch.float32; expected one of None, torch.float16, torch.bfloat16."),
    (dict(compute_dtype=torch.float16, weights=_weights(at=0, put=zeros(24, 8).long())), TypeError,
     "weight of qkv of layer 0 has dtype torch.int64; expected float32, float16, bfloat16 or float64. Convert it with "
     ".float()."),
    (dict(weight_dtype=torch.float16), ValueError, "weight_dtype is torch.float16; expected one of None, torch.int8."),
)  # fmt: skip
