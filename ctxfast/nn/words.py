# SPDX-License-Identifier: Apache-2.0
"""Words as rows of character ids: the distinct ones of a batch, and sentence marks around them."""

from __future__ import annotations

import torch
from torch import Tensor


def _multipliers(count: int) -> list[int]:
    """``count`` odd 64-bit numbers, the same in every process (the generator of Steele et al. 2014)."""
    values, state = [], 0
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        z = (z ^ (z >> 31)) | 1
        values.append(z - 2**64 if z >= 2**63 else z)
    return values


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of (N, C) integers, (U, C), and for each row its place among them, (N,).

    Rows are told apart by a 64-bit hash, which is much faster to sort than rows, and compared afterwards: should two
    different rows ever share a hash, whole rows are sorted.
    """
    rows = rows.long()
    factors = torch.tensor(_multipliers(rows.shape[1]), device=rows.device)
    keys, inverse = torch.unique((rows * factors).sum(1), return_inverse=True)
    order = torch.arange(rows.shape[0], device=rows.device)
    first = torch.full_like(keys, rows.shape[0]).scatter_reduce_(0, inverse, order, "amin")
    distinct = rows[first]
    if not torch.equal(distinct[inverse], rows):
        distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
    return distinct, inverse


def add_sentence_marks(tokens: Tensor, mask: Tensor, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Put ``begin`` before and ``end`` after every sentence.

    Args:
        tokens: (B, T, N), right-padded.
        mask: (B, T) bool, True at tokens.
        begin, end: (N,).

    Returns:
        (B, T + 2, N), zeros past each ``end``, and its mask.
    """
    batch, steps, size = tokens.shape
    lengths = mask.sum(1, keepdim=True)  # (B, 1)
    position = torch.arange(steps + 2, device=tokens.device)[None]
    edge = tokens.new_zeros(batch, 1, size)
    inside = ((position >= 1) & (position <= lengths))[:, :, None]
    longer = torch.cat([edge, tokens, edge], 1)
    longer = torch.where(inside, longer, torch.zeros_like(longer))
    longer = torch.where((position == 0)[:, :, None], begin, longer)
    longer = torch.where((position == lengths + 1)[:, :, None], end, longer)
    return longer, position < lengths + 2
