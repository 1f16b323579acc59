# SPDX-License-Identifier: Apache-2.0
"""``feed_forward``: the definition, in plain PyTorch (Vaswani et al. 2017, section 3.3; gated, Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.definitions import activated, gated as gate, rounded


def feed_forward(
    x: Tensor,  # (..., N_in)
    weight1: Tensor,  # (M, N_in), gated (2M, N_in)
    bias1: Tensor | None,  # (M,), gated (2M,)
    weight2: Tensor,  # (N_out, M)
    bias2: Tensor | None,  # (N_out,)
    activation: str,
    weight_dtype: torch.dtype | None,
    gated: bool = False,
) -> Tensor:
    """See ``ctxfast.functional.feed_forward``."""
    product = F.linear(rounded(x, weight_dtype), rounded(weight1, weight_dtype), bias1)
    wide = gate(product, activation) if gated else activated(product, activation)
    return F.linear(rounded(wide, weight_dtype), rounded(weight2, weight_dtype), bias2)
