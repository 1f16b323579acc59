# SPDX-License-Identifier: Apache-2.0
"""The same values in other places of memory, as callers may bring them."""

from __future__ import annotations

import torch
from torch import Tensor

SENTINEL = 777  # lies between the values


def _memory(tensor: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, 1 if tensor.dtype is torch.bool else SENTINEL, dtype=tensor.dtype, device=tensor.device)


def plain(tensor: Tensor) -> Tensor:
    return tensor


def strided(tensor: Tensor) -> Tensor:
    """Gaps between elements and an odd offset from the start of the memory."""
    if tensor.dim() == 0:
        return tensor
    view = _memory(tensor, *tensor.shape[:-1], 2 * tensor.shape[-1] + 1)[..., 1::2]
    view.copy_(tensor)
    return view


def sliced(tensor: Tensor) -> Tensor:
    """Gaps between rows, which start where a contiguous tensor of sizes in multiples of 16 would have one."""
    if tensor.dim() == 0:
        return tensor
    view = _memory(tensor, *tensor.shape[:-1], -(-tensor.shape[-1] // 16) * 16 + 16)[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view


def offset(tensor: Tensor) -> Tensor:
    """Contiguous, starting one element into the memory: not aligned to a vector register."""
    view = _memory(tensor, tensor.numel() + 1)[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    """Dimensions laid out in the opposite order."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def expanded(tensor: Tensor) -> Tensor:
    """Other values: every row along the last dimension is one and the same in memory (strides of 0)."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    row = tensor[(0,) * (tensor.dim() - 1)] if tensor.dim() > 1 else tensor[:1]
    return row.clone().expand(tensor.shape)


ALL = (strided, sliced, offset, transposed, expanded)
