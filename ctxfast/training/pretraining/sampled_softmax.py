# SPDX-License-Identifier: Apache-2.0
"""Softmax over a sample of a large vocabulary: the loss biLMs are trained with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# A power of two: exact.
_SCALE = 1024.0


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
        A scalar, float32. The softmax is taken in float32; products are in the dtype of ``hidden``. The gradient is
        made in the forward pass and cannot be differentiated again.

    Reference: Jean et al. 2015; TensorFlow's sampled_softmax_loss.
    """
    corrections = (_log_expected(words, tries, weight.shape[0]) for words in (targets, negatives))
    return _SampledSoftmax.apply(hidden, weight, bias, targets, negatives, *corrections)


class _SampledSoftmax(torch.autograd.Function):
    """The loss, and its gradient beside it: a block of logits is made once and becomes its own gradient in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, negatives: Tensor,
        true_correction: Tensor, correction: Tensor,
    ) -> Tensor:  # fmt: skip
        rows, dtype = hidden.shape[0], hidden.dtype
        own, sampled = weight[targets].to(dtype), weight[negatives].to(dtype)
        true = (hidden * own).sum(1).float() + bias[targets].float() - true_correction
        shift = bias[negatives].float() - correction
        # Where a row's target is among the negatives; -1: nowhere.
        place = negatives.new_full((weight.shape[0],), -1)
        place[negatives] = torch.arange(negatives.shape[0], device=negatives.device)
        place = place[targets]
        losses, of_true = torch.empty_like(true), torch.empty_like(true)
        of_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
        of_sampled = torch.zeros(sampled.shape, dtype=torch.float32, device=hidden.device)
        of_shift = torch.zeros_like(shift)
        is_wanted = any(ctx.needs_input_grad[:3])
        block, strip = _rows_at_once(hidden, negatives.shape[0])
        for start in range(0, rows, block):
            part = slice(start, min(start + block, rows))
            logits = F.linear(hidden[part], sampled)
            for first in range(part.start, part.stop, strip):
                piece = slice(first, min(first + strip, part.stop))
                chances = logits[first - start : piece.stop - start]
                losses[piece], of_true[piece] = _chances(chances, shift, true[piece], place[piece], of_shift)
            if is_wanted:
                of_hidden[part] = logits @ sampled
                of_sampled += logits.t() @ hidden[part]
        if is_wanted:
            # A block's gradients are those of a sum of losses times _SCALE, which keeps them from vanishing in float16.
            of_hidden /= _SCALE
            of_sampled /= _SCALE
            of_shift /= _SCALE
            of_hidden += of_true[:, None] * own
            ctx.save_for_backward(
                of_hidden, of_true[:, None] * hidden, of_true, of_sampled, of_shift, targets, negatives
            )
            ctx.facts = weight.shape, weight.dtype, bias.dtype, dtype
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_own, of_true, of_sampled, of_shift, targets, negatives = ctx.saved_tensors
        shape, weight_dtype, bias_dtype, dtype = ctx.facts
        scale = grad / of_true.shape[0]
        of_weight = torch.zeros(shape, dtype=torch.float32, device=of_hidden.device)
        # Few rows have a gradient: they are scaled before they are put in place.
        of_weight.index_add_(0, negatives, of_sampled * scale)
        of_weight.index_add_(0, targets, of_own.float() * scale)
        of_bias = torch.zeros(shape[0], dtype=torch.float32, device=of_hidden.device)
        of_bias.index_add_(0, negatives, of_shift * scale)
        of_bias.index_add_(0, targets, of_true * scale)
        return (
            (of_hidden * scale).to(dtype), of_weight.to(weight_dtype), of_bias.to(bias_dtype), None, None, None, None,
        )  # fmt: skip


def _rows_at_once(hidden: Tensor, negatives: int) -> tuple[int, int]:
    """Rows of a block, whose logits are made by one product, and of a strip, whose softmax stays in a core's cache."""
    block, strip = (1 << 22, 1 << 17) if hidden.device.type == "cpu" else (1 << 26, 1 << 26)
    return max(1, block // negatives), max(1, strip // negatives)


def _chances(logits: Tensor, shift: Tensor, true: Tensor, place: Tensor, of_shift: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of a strip of rows and their gradients by the targets' logits.

    ``logits`` (R, S) become gradients times ``_SCALE``, whose sum over rows is added to ``of_shift``. ``place`` (R):
    the column of a row's target, which does not count, or -1.
    """
    wide = logits + shift
    # Written where there is none, too, so that the host need not ask: column 0 gets back what it had.
    column = place.clamp_min(0)[:, None]
    wide.scatter_(1, column, torch.where(place[:, None] < 0, wide.gather(1, column), -torch.inf))
    highest = torch.maximum(wide.amax(1), true)
    wide.sub_(highest[:, None]).exp_()
    own = torch.exp(true - highest)
    total = wide.sum(1) + own
    wide.div_((total / _SCALE)[:, None])
    of_shift += wide.sum(0)
    logits.copy_(wide)
    return total.log() + highest - true, own / total - 1
