# SPDX-License-Identifier: Apache-2.0
"""Good and bad arguments of ``add_norm``."""

from __future__ import annotations

from torch import float16, zeros

GOOD = dict(x=zeros(3, 8), residual=zeros(3, 8), weight=zeros(8), bias=zeros(8), x_bias=zeros(8))
BAD = (
    (dict(x=zeros(3, 0)), ValueError, "x has shape (3, 0); expected (..., hidden_size) with hidden_size >= 1."),
    (dict(residual=zeros(2, 8)), ValueError, "residual has shape (2, 8); expected the shape of x = (3, 8)."),
    (dict(weight=None), TypeError, "weight is None; expected a tensor of shape (8,)."),
    (dict(bias=zeros(7)), ValueError, "bias has shape (7,); expected (hidden_size,) = (8,)."),
    (
        dict(residual=zeros(3, 8, dtype=float16)),
        TypeError,
        "residual has dtype torch.float16; expected torch.float32, that of x. Convert one of them, or run under "
        "torch.autocast.",
    ),
    (dict(norm="batch"), ValueError, "norm is 'batch'; expected one of 'layer', 'rms'."),
    (dict(eps=0.0), ValueError, "eps is 0.0; expected a number above 0."),
)  # fmt: skip
