# SPDX-License-Identifier: Apache-2.0
"""What the heads do with padded sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


def run_lstm(lstm: Any, x: Tensor, lengths: Tensor) -> Tensor:
    """A batch-first LSTM over texts without their padding: (B, T, N) and lengths (B,) -> (B, T, H), zeros at padding.

    A text without words runs as one of a single (zero) word.
    """
    rows = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(lstm(rows)[0], batch_first=True, total_length=x.shape[1])[0]


def word_mask(lengths: Tensor, steps: int) -> Tensor:
    """(B, steps) bool, True at words; a text without words has one."""
    return torch.arange(steps, device=lengths.device) < lengths.clamp(min=1)[:, None]


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension, 0 where the mask, which is broadcast, is False."""
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)


def masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T, N), (B, T) -> (B, N), the largest over words."""
    return x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min).amax(1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T, N), (B, T) -> (B, N), the mean over words."""
    return x.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).to(x.dtype)


class VariationalDropout(nn.Dropout):
    """Dropout whose mask is the same for all words of a text: (B, T, N) -> (B, T, N).

    Reference: Gal & Ghahramani 2016.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p:
            return input
        return input * super().forward(torch.ones_like(input[:, :1]))
