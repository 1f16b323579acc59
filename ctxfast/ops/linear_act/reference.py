# SPDX-License-Identifier: Apache-2.0
"""``linear_act``: the definition, in plain PyTorch (GELU: Hendrycks & Gimpel 2016, exact and tanh form)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh")


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """See ``ctxfast.functional.linear_act``."""
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
