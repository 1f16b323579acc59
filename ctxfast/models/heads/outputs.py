# SPDX-License-Identifier: Apache-2.0
"""What heads give, and their losses.

Shape letters: B texts, T words, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from ..token_vectors import TokenVectors

PREDICATE_DIM = 100  # size of the learned mark of a predicate's words


class LstmOutput(NamedTuple):
    """``loss`` (None without labels) and ``logits``, (B, T, C) of a tagger, (B, C) of a classifier."""

    loss: Tensor | None
    logits: Tensor


class SpanLogits(NamedTuple):
    """``loss`` (None without positions), and (B, T + 1) logits of start and end; column 0 stands for no answer."""

    loss: Tensor | None
    start_logits: Tensor
    end_logits: Tensor


def is_bio(tags: Iterable[str]) -> bool:
    """Whether tags are BIO's."""
    return all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags)


def loss_of_words(logits: Tensor, labels: Tensor, reader: TokenVectors) -> Tensor:
    """The mean over words that have a class: logits (B, T, C), labels (B, T), below 0 elsewhere."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    return loss / (labels >= 0).sum().clamp(min=1) + reader.penalty()


def loss_of_texts(logits: Tensor, labels: Tensor | None, reader: TokenVectors) -> Tensor | None:
    """The mean over texts: logits (B, C), labels (B,) int64, or floating for numbers; None without labels."""
    if labels is None:
        return None
    if labels.is_floating_point():
        return F.mse_loss(logits.float()[:, 0], labels) + reader.penalty()
    return F.cross_entropy(logits.float(), labels) + reader.penalty()


def loss_of_spans(
    start: Tensor, end: Tensor, start_positions: Tensor | None, end_positions: Tensor | None, reader: TokenVectors
) -> Tensor | None:
    """The mean over texts and both ends: logits (B, T + 1), positions (B,) int64; None without positions."""
    if start_positions is None or end_positions is None:
        return None
    return (F.cross_entropy(start, start_positions) + F.cross_entropy(end, end_positions)) / 2 + reader.penalty()
