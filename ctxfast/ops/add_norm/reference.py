# SPDX-License-Identifier: Apache-2.0
"""``add_norm``: the definition, in plain PyTorch (Ba et al. 2016; Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("layer", "rms")


def normalised(total: Tensor, weight: Tensor, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """The norm of rows (..., N)."""
    if norm == "layer":
        # torch takes the statistics of half-precision rows in fp32.
        return F.layer_norm(total, (total.shape[-1],), weight, bias, eps)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    normal = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    found = normal * weight if bias is None else normal * weight + bias
    return found.to(total.dtype)


def add_norm(
    x: Tensor,  # (..., N)
    residual: Tensor | None,  # (..., N)
    weight: Tensor,  # (N,)
    bias: Tensor | None,  # (N,)
    x_bias: Tensor | None,  # (N,)
    norm: str,
    eps: float,
    dropout_p: float,
    dropout_mask: Tensor | None = None,  # (..., N)
) -> tuple[Tensor, Tensor]:
    """See ``ctxfast.functional.add_norm``; ``dropout_mask`` is multiplied by in place of a drawn one."""
    total = x if x_bias is None else x + x_bias
    if dropout_mask is not None:
        total = total * dropout_mask
    elif dropout_p > 0:
        total = F.dropout(total, dropout_p)
    if residual is not None:
        total = residual + total
    total = total.clone() if total is x else total
    return total, normalised(total, weight, bias, norm, eps)
