# SPDX-License-Identifier: Apache-2.0
"""``add_layer_norm``: the definition, in plain PyTorch (Ba et al. 2016; residual block of Vaswani et al. 2017)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def add_layer_norm(
    x: Tensor,  # (..., N)
    residual: Tensor | None,  # (..., N)
    weight: Tensor,  # (N,)
    bias: Tensor,  # (N,)
    x_bias: Tensor | None,  # (N,)
    eps: float,
    dropout_p: float,
    dropout_mask: Tensor | None = None,  # (..., N)
) -> Tensor:
    """See ``ctxfast.functional.add_layer_norm``; ``dropout_mask`` is multiplied by in place of a drawn one."""
    if x_bias is not None:
        x = x + x_bias
    if dropout_mask is not None:
        x = x * dropout_mask
    elif dropout_p > 0:
        x = F.dropout(x, dropout_p)
    if residual is not None:
        x = residual + x
    # torch takes the statistics of half-precision rows in fp32.
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
