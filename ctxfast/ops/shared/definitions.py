# SPDX-License-Identifier: Apache-2.0
"""Parts of several ops' definitions, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "tanh", "silu")


def activated(x: Tensor, activation: str) -> Tensor:
    """``activation(x)``, one of ``ACTIVATIONS``."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return torch.tanh(x) if activation == "tanh" else x


def gated(x: Tensor, activation: str) -> Tensor:
    """``activation(a) * b`` of the halves of x (..., 2M) -> (..., M)."""
    a, b = x.chunk(2, dim=-1)
    return activated(a, activation) * b


def whole_steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (last dimension, of at least one element) in whole steps of 1/127 of their largest magnitude, ties to even;
    and what a step of each row is worth (..., 1)."""
    most = x.abs().amax(dim=-1, keepdim=True)
    steps = torch.where(most > 1e-30, 127.0 / most, torch.zeros_like(most))
    return torch.round(x * steps), most / 127.0


def rounded_rows(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``x`` as its rows (last dimension) are held in ``dtype``, in the dtype of ``x``; None leaves it alone.

    bfloat16: nearest, ties to even. int8: see ``whole_steps``.
    """
    if dtype is None or x.shape[-1] == 0:
        return x
    if dtype != torch.int8:
        return x.to(dtype).to(x.dtype)
    whole, worth = whole_steps(x)
    return whole * worth


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The same for a factor of a product: the gradient passes straight through."""
    if dtype is None:
        return x
    fixed = x.detach()
    return rounded_rows(fixed, dtype) + (x - fixed)
