# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``linear_act``."""

from __future__ import annotations

from torch import zeros

GOOD = dict(x=zeros(3, 8), weight=zeros(6, 8), bias=zeros(6), activation="gelu")
BAD = (
    (dict(x=zeros(())), ValueError, "x has shape (); expected (..., in_features)."),
    (dict(weight=zeros(6, 7)), ValueError, "weight has shape (6, 7); expected (out_features, in_features) = (any, 8)."),
    (dict(bias=zeros(5)), ValueError, "bias has shape (5,); expected (out_features,) = (6,)."),
    (dict(activation="swish"), ValueError,
     "activation is 'swish'; expected one of 'none', 'gelu', 'gelu_tanh', 'relu', 'tanh', 'silu'."),
)  # fmt: skip
