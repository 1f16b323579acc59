# SPDX-License-Identifier: Apache-2.0
"""One vector of many: of a text's tokens, as sentence-transformers pools them, and of a text's windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._core import transfer


def sums(rows: Tensor, lengths: Tensor) -> Tensor:
    """(S, N) sums of successive rows, one row after another: a sum does not depend on what else is in the batch."""
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True)


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Row numbers start, start + 1, ..., ``counts`` of them, of every text."""
    before = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - before, counts)


class Pooler:
    """Vectors of texts from packed rows, as sentence-transformers' Pooling makes them.

    Args:
        lengths: (S,) tokens of the texts, all rows in order.
        skipped: tokens at the beginning that are left out, those of a prompt.
        device: of the rows.
    """

    def __init__(self, lengths: np.ndarray, skipped: int, device: torch.device) -> None:
        self._lengths, self._skipped, self._device = lengths, skipped, device
        self._starts = np.cumsum(lengths) - lengths
        self._kept = np.maximum(lengths - skipped, 0)
        self._counts = self._put(self._kept)

    def _put(self, array: np.ndarray) -> Tensor:
        return transfer.to_device(array, self._device)

    def __call__(self, rows: Tensor, mode: str) -> Tensor:
        """(S, N) float32 of (M, N) rows."""
        if mode == "cls":
            first = self._starts + np.where(self._kept > 0, self._skipped, 0)
            return rows.index_select(0, self._put(first)).float()
        if mode == "lasttoken":
            last = rows.index_select(0, self._put(self._starts + self._lengths - 1)).float()
            return last * (self._counts > 0)[:, None]
        if self._skipped:
            rows = rows.index_select(0, self._put(spans(self._starts + self._skipped, self._kept)))
        rows = rows.float()
        if mode == "max":
            return torch.segment_reduce(rows, "max", lengths=self._counts, axis=0, unsafe=True)
        if mode == "weightedmean":
            # Weights grow from a text's first token, which has 1, whether it is left out or not.
            places = spans(np.full_like(self._kept, self._skipped), self._kept) + 1
            weights = self._put(places)[:, None].float()
            return sums(rows * weights, self._counts) / sums(weights, self._counts).clamp(min=1e-9)
        counts = self._counts.clamp(min=1)[:, None]
        return sums(rows, self._counts) / (counts.float().sqrt() if mode == "mean_sqrt_len_tokens" else counts)


class Merged:
    """Vectors of texts from those of their windows: the mean, each window counting by its tokens.

    Args:
        counts: windows of each text.
        lengths: tokens of each window.
    """

    def __init__(self, counts: Sequence[int], lengths: np.ndarray, device: torch.device) -> None:
        self._counts = None
        if max(counts, default=1) > 1:
            owner = np.repeat(np.arange(len(counts)), counts)
            shares = lengths / np.bincount(owner, weights=lengths)[owner]
            self._counts = transfer.to_device(np.array(counts, dtype=np.int64), device)
            self._shares = transfer.to_device(shares.astype(np.float32), device)[:, None]

    def __call__(self, vectors: Tensor) -> Tensor:
        """(windows, N) -> (texts, N)."""
        return vectors if self._counts is None else sums(vectors * self._shares, self._counts)
