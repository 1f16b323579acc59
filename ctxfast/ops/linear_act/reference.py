# SPDX-License-Identifier: Apache-2.0
"""``linear_act``: the definition, in plain PyTorch (GELU: Hendrycks & Gimpel 2016, exact and tanh form)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh")


def _rounded(x: Tensor) -> Tensor:
    """Rows in whole steps of 1/127 of their largest magnitude; the gradient passes straight through."""
    if x.shape[-1] == 0:
        return x
    fixed = x.detach()
    most = fixed.abs().amax(dim=-1, keepdim=True)
    steps = torch.where(most > 1e-30, 127.0 / most, torch.zeros_like(most))
    return torch.round(fixed * steps) * (most / 127.0) + (x - fixed)


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, weight_dtype: torch.dtype | None
) -> Tensor:
    """See ``ctxfast.functional.linear_act``."""
    if weight_dtype is torch.int8:
        x, weight = _rounded(x), _rounded(weight)
    y = F.linear(x, weight, bias)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "relu":
        return F.relu(y)
    if activation == "tanh":
        return torch.tanh(y)
    return y
