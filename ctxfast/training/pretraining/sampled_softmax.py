# SPDX-License-Identifier: Apache-2.0
"""Softmax over a sample of a large vocabulary: the loss biLMs are trained with."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def log_uniform_negatives(draw: np.random.Generator, count: int, size: int) -> tuple[np.ndarray, int]:
    """Different words of a vocabulary that is sorted by falling frequency.

    Word k is drawn with chance ``log((k + 2) / (k + 1)) / log(V + 1)``.

    Args:
        draw: the generator.
        count: words wanted.
        size: V.

    Returns:
        (count,) int64, in the order drawn, and how many draws it took to find so many different ones.

    Raises:
        ValueError: more words than the vocabulary has.

    Reference: the log-uniform (Zipfian) candidate sampler of TensorFlow, which bilm-tf trains with.
    """
    if not 1 <= count < size:
        raise ValueError(
            f"ctxfast.training: negatives is {count}; expected 1 to {size - 1}, less than the {size} words of the "
            "vocabulary. Pass 0 for a full softmax."
        )
    found = np.empty(0, dtype=np.int64)
    is_new = np.ones(size, dtype=np.bool_)
    tries = 0
    while True:
        drawn = np.exp(draw.random(2 * count) * math.log(size + 1)).astype(np.int64) - 1
        drawn = np.clip(drawn, 0, size - 1)
        # The rarest words take many rounds where nearly all are wanted; most of a later round is known.
        places = np.flatnonzero(is_new[drawn])
        _, first = np.unique(drawn[places], return_index=True)
        places = places[np.sort(first)]
        if len(found) + len(places) >= count:
            places = places[: count - len(found)]
            return np.concatenate([found, drawn[places]]), tries + int(places[-1]) + 1
        found = np.concatenate([found, drawn[places]])
        is_new[drawn[places]] = False
        tries += len(drawn)


def _log_expected(words: Tensor, tries: Tensor, size: int) -> Tensor:
    """Log of how often a word is expected among the negatives of ``tries`` draws."""
    chance = torch.log((words.double() + 2) / (words.double() + 1)) / math.log(size + 1)
    return torch.log(-torch.expm1(tries.double() * torch.log1p(-chance))).float()


def sampled_softmax_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, negatives: Tensor, tries: Tensor
) -> Tensor:
    """Mean cross entropy of each target against itself and the negatives.

    Every logit is lowered by the log of how often its word is expected among the negatives, and negatives that are a
    row's target are left out of that row, so that the loss's gradient approaches the full softmax's.

    Args:
        hidden: (N, P).
        weight, bias: (V, P) and (V,) of the whole output layer.
        targets: (N,) int64.
        negatives, tries: of ``log_uniform_negatives``: (S,) int64 and a scalar, on the device of ``hidden``.

    Returns:
        A scalar, float32. The softmax is taken in float32.

    Reference: Jean et al. 2015; TensorFlow's sampled_softmax_loss.
    """
    size = weight.shape[0]
    true = (hidden * weight[targets].to(hidden.dtype)).sum(1).float() + bias[targets].float()
    true = true - _log_expected(targets, tries, size)
    others = F.linear(hidden, weight[negatives].to(hidden.dtype)).float() + bias[negatives].float()
    others = others - _log_expected(negatives, tries, size)
    others = others.masked_fill(negatives == targets[:, None], -torch.inf)
    normal = torch.logaddexp(torch.logsumexp(others, 1), true)
    return (normal - true).mean()
