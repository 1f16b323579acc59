# SPDX-License-Identifier: Apache-2.0
"""A linear-chain conditional random field over tags.

Why our own: pytorch-crf and torchcrf were last released in 2019 and 2020.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Not -inf: a gold sequence that breaks the rules must have a finite loss.
_FORBIDDEN = -1e4


def bio_rules(tags: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Which tag may follow which, (C, C) bool [before, after], and which may come first, (C,), under BIO2."""
    follows = torch.ones(len(tags), len(tags), dtype=torch.bool)
    begins = torch.ones(len(tags), dtype=torch.bool)
    for k, tag in enumerate(tags):
        if tag.startswith("I-"):
            begins[k] = False
            for before, other in enumerate(tags):
                follows[before, k] = other != "O" and other[2:] == tag[2:]
    return follows, begins


class Crf(nn.Module):
    """``score(y) = start[y_1] + sum_t emission[t, y_t] + sum_t transition[y_t-1, y_t] + end[y_n]``; its softmax over
    all sequences.

    Args:
        num_tags: C.
        rules: see ``bio_rules``; forbidden transitions are all but impossible, in training and decoding. None allows
            every transition.

    Parameters: ``transitions`` (C, C) [before, after], ``start`` (C,), ``end`` (C,), which start at 0.

    Numerics: float32, also under autocast.

    Reference: Lafferty et al. 2001.
    """

    def __init__(self, num_tags: int, rules: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(num_tags, num_tags))
        self.start = nn.Parameter(torch.zeros(num_tags))
        self.end = nn.Parameter(torch.zeros(num_tags))
        follows, begins = rules or (torch.ones(num_tags, num_tags).bool(), torch.ones(num_tags).bool())
        # Not annotated in the class, where torch.jit.script would read it.
        self._follows: Tensor
        self._begins: Tensor
        self.register_buffer("_follows", torch.where(follows, 0.0, _FORBIDDEN), persistent=False)
        self.register_buffer("_begins", torch.where(begins, 0.0, _FORBIDDEN), persistent=False)

    def forward(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """Negative log likelihood of the tags, averaged over all tokens.

        Args:
            emissions: (B, T, C).
            tags: (B, T) int64; values past a row's length are ignored.
            lengths: (B,) int64, 0..T.

        Returns:
            A scalar; 0 if there are no tokens.
        """
        with torch.autocast(emissions.device.type, enabled=False):
            loss = (self._total(emissions.float(), lengths) - self._score(emissions.float(), tags, lengths)).sum()
        return loss / lengths.sum().clamp(min=1)

    def _total(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """(B,) log of the sum over all sequences; 0 for a row without tokens."""
        transitions = self.transitions + self._follows
        alpha = self.start + self._begins + emissions[:, 0]
        for t in range(1, emissions.shape[1]):
            step = torch.logsumexp(alpha[:, :, None] + transitions, 1) + emissions[:, t]
            alpha = torch.where((t < lengths)[:, None], step, alpha)
        return torch.logsumexp(alpha + self.end, 1).masked_fill(lengths == 0, 0.0)

    def _score(self, emissions: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """(B,) score of the given tags."""
        is_real = torch.arange(emissions.shape[1], device=lengths.device) < lengths[:, None]
        tags = tags.where(is_real, 0)
        score = emissions.gather(2, tags[..., None])[..., 0].where(is_real, 0.0).sum(1)
        moves = (self.transitions + self._follows)[tags[:, :-1], tags[:, 1:]]
        score = score + moves.where(is_real[:, 1:], 0.0).sum(1)
        last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        ends = (self.start + self._begins)[tags[:, 0]] + self.end[last]
        return score + ends.masked_fill(lengths == 0, 0.0)

    @torch.no_grad()
    def decode(self, emissions: Tensor, lengths: Tensor) -> list[list[int]]:
        """The highest-scoring tags of every row (Viterbi).

        emissions (B, T, C), lengths (B,) -> B lists of as many tags as the row has tokens.
        """
        emissions, transitions = emissions.float(), self.transitions + self._follows
        best = self.start + self._begins + emissions[:, 0]
        pointers = []
        for t in range(1, emissions.shape[1]):
            step, pointer = (best[:, :, None] + transitions).max(1)
            is_real = (t < lengths)[:, None]
            best = torch.where(is_real, step + emissions[:, t], best)
            # Past a row's end every tag points to itself.
            pointers.append(torch.where(is_real, pointer, torch.arange(best.shape[1], device=best.device)))
        tags = [(best + self.end).argmax(1)]
        for pointer in reversed(pointers):
            tags.append(pointer.gather(1, tags[-1][:, None])[:, 0])
        rows = torch.stack(tags[::-1], 1).tolist()
        return [row[:length] for row, length in zip(rows, lengths.tolist())]

    def extra_repr(self) -> str:
        return f"num_tags={len(self.start)}"
