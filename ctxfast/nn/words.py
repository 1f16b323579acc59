# SPDX-License-Identifier: Apache-2.0
"""Words as rows of character ids: the distinct ones of a batch, and sentence marks around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._core import checks

Encode = Callable[[Tensor], Tensor]  # words as rows of character ids (W, C) -> (W, P)


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


def encode_unique(rows: Tensor, encode: Encode) -> Tensor:
    """``encode`` of words as rows of character ids, (N, C) -> (N, P), every distinct row computed once.

    How many there are is known only after reading them, so a graph that is being traced or captured computes all.
    """
    is_captured = rows.is_cuda and torch.cuda.is_current_stream_capturing()
    if torch.compiler.is_compiling() or is_captured or rows.shape[0] == 0 or not checks.has_values(rows):
        return encode(rows)
    distinct, inverse = unique_rows(rows)
    return encode(distinct)[inverse]


def encode_sentences(ids: Tensor, mask: Tensor, begin: Tensor, end: Tensor, encode: Encode) -> dict[str, Tensor]:
    """``encode`` of the words of sentences, with marks around them.

    Args:
        ids: (B, T, C) character ids, right-padded.
        mask: (B, T) bool, True at words.
        begin, end: (C,), the words put before and after every sentence.

    Returns:
        ``token_embedding`` (B, T + 2, P) and ``mask`` (B, T + 2) bool. Vectors past a sentence's end are those of an
        all-zero row, not zeros.
    """
    marked, mask = add_sentence_marks(ids, mask, begin, end)
    return {"mask": mask, "token_embedding": encode_unique(marked.flatten(0, 1), encode).unflatten(0, mask.shape)}
