# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``feed_forward``."""

from __future__ import annotations

from torch import float16, zeros

GOOD = dict(x=zeros(3, 8), weight1=zeros(6, 8), bias1=zeros(6), weight2=zeros(5, 6), bias2=zeros(5))
BAD = (
    (dict(x=zeros(())), ValueError, "x has shape (); expected (..., in_features)."),
    (dict(x=[1.0]), TypeError, "x is a list; expected a torch.Tensor."),
    (dict(weight1=zeros(6, 7)), ValueError,
     "weight1 has shape (6, 7); expected (intermediate_size, in_features) = (any, 8)."),
    (dict(bias1=zeros(5)), ValueError, "bias1 has shape (5,); expected (intermediate_size,) = (6,)."),
    (dict(weight2=zeros(5, 7)), ValueError,
     "weight2 has shape (5, 7); expected (out_features, intermediate_size) = (any, 6)."),
    (dict(weight2=None), TypeError, "weight2 is a NoneType; expected a torch.Tensor."),
    (dict(bias2=zeros(6)), ValueError, "bias2 has shape (6,); expected (out_features,) = (5,)."),
    (dict(weight2=zeros(5, 6, dtype=float16)), TypeError,
     "weight2 has dtype torch.float16; expected torch.float32, that of x. Convert one of them, or run under "
     "torch.autocast."),
    (dict(activation="swish"), ValueError,
     "activation is 'swish'; expected one of 'none', 'gelu', 'gelu_tanh', 'relu', 'tanh', 'silu'."),
    (dict(gated=True), ValueError,
     "weight2 has shape (5, 6); expected (out_features, intermediate_size) = (any, 3)."),
    (dict(weight1=zeros(7, 8), bias1=zeros(7), gated=True), ValueError,
     "weight1 has 7 rows; expected an even number with gated: those of the half that is activated, then those of the "
     "half that it is multiplied by."),
    (dict(weight_dtype=float16), ValueError, "weight_dtype is torch.float16; expected one of None, torch.int8."),
)  # fmt: skip
