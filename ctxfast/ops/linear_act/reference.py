# SPDX-License-Identifier: Apache-2.0
"""``linear_act``: the definition, in plain PyTorch (GELU: Hendrycks & Gimpel 2016, exact and tanh form)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.definitions import activated, rounded


def linear_act(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, weight_dtype: torch.dtype | None
) -> Tensor:
    """See ``ctxfast.functional.linear_act``."""
    x, weight = rounded(x, weight_dtype), rounded(weight, weight_dtype)
    return activated(F.linear(x, weight, bias), activation)
