# SPDX-License-Identifier: Apache-2.0
"""``add_layer_norm``: the definition, in plain PyTorch (Ba et al. 2016; residual block of Vaswani et al. 2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _widest(*given: Tensor | None) -> torch.dtype:
    is_double = any(each is not None and each.dtype == torch.float64 for each in given)
    return torch.float64 if is_double else torch.float32


def add_layer_norm(
    x: Tensor,  # (..., N)
    residual: Tensor | None,  # (..., N)
    weight: Tensor,  # (N,)
    bias: Tensor,  # (N,)
    x_bias: Tensor | None,  # (N,)
    eps: float,
    dropout_p: float,
    out_dtype: torch.dtype | None = None,
    dropout_mask: Tensor | None = None,  # (..., N)
) -> Tensor:
    """See ``ctxfast.functional.add_layer_norm``; ``dropout_mask`` is multiplied by in place of a drawn one."""
    if out_dtype is not None:
        # Of inputs of several dtypes, each as it is: in the widest of them, and float32 at least.
        given = (x, residual, weight, bias, x_bias)
        dtype = _widest(*given)
        given = (None if each is None else each.to(dtype) for each in given)
        return add_layer_norm(*given, eps, dropout_p, None, dropout_mask).to(out_dtype)
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
