# SPDX-License-Identifier: Apache-2.0
"""End-to-end coreference: which spans of a document are mentions, and which earlier mention each one goes back to.

Shape letters: S sentences, T words of a sentence, n words of a document, C candidate spans, k kept spans, M gold
mentions, G size of a span's vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...nn import LSTM
from ..token_vectors import Sources, TokenVectors
from .sequences import masked_softmax, run_lstm

_HIDDEN = 150  # of the feed-forward scorers, two layers each
_FEATURE = 20  # size of the vectors of widths, distances and speakers
_DISTANCES = (2, 3, 4, 5, 8, 16, 32, 64)  # where buckets of distances begin, after 1


class CoreferenceOutput(NamedTuple):
    """``loss`` (None without labels) and, for each document, the kept spans (k, 2), first and last word in the
    document, and the place among them of the antecedent of each, (k,), -1 for none."""

    loss: Tensor | None
    spans: list[Tensor]
    antecedents: list[Tensor]


class CoreferenceResolver(nn.Module):
    """Scores spans as mentions, keeps the best, and ranks for each the earlier ones and "none" as its antecedent.

    A span's vector: ``g = [x_first, x_last, sum_t a_t w_t, width]`` with x of a biLSTM over each sentence, w the words'
    vectors and a the softmax of ``ffnn(x_t)`` within the span. ``s_m = ffnn(g)``;
    ``s(i, j) = s_m(i) + s_m(j) + g_i W g_j + ffnn([g_i, g_j, g_i * g_j, distance, same speaker])``; "none" scores 0.
    The loss is the mean over kept spans of ``-log`` of the share of all gold antecedents, "none" where there are none.

    Args:
        sources: what words' vectors are made of; its second mix stands beside x.
        hidden_size, lstm_layers: of the LSTM, in each direction.
        dropout: of words' vectors, x, the scorers' hidden layers and features.
        max_span: words of a span, within a sentence.
        spans_per_word: how many spans are kept, by the document's words. They are taken by their scores, those that
            cross one already taken are left out.
        antecedents: how many earlier spans are ranked for each, those best by the first three terms of s.

    Reference: Lee et al. 2017, and 2018 for the coarse scores; without genre, and without 2018's second-order spans.
    """

    def __init__(
        self,
        sources: Sources,
        *,
        hidden_size: int = 200,
        lstm_layers: int = 1,
        dropout: float = 0.2,
        max_span: int = 10,
        spans_per_word: float = 0.4,
        antecedents: int = 50,
    ) -> None:
        super().__init__()
        self.max_span, self.spans_per_word, self.antecedents = max_span, spans_per_word, antecedents
        self.reader = TokenVectors(sources)
        self.dropout = nn.Dropout(dropout)
        self.encoder = LSTM(sources.width, hidden_size, lstm_layers, batch_first=True, bidirectional=True)
        width = 2 * hidden_size + sources.output_width
        span = 2 * width + sources.width + _FEATURE
        self.widths = nn.Embedding(max_span, _FEATURE)
        self.distances = nn.Embedding(len(_DISTANCES) + 1, _FEATURE)
        self.speakers = nn.Embedding(2, _FEATURE)
        self.head_scores = _scorer(width, dropout)
        self.mention_scores = _scorer(span, dropout)
        self.coarse = nn.Linear(span, span, bias=False)
        self.pair_scores = _scorer(3 * span + 2 * _FEATURE, dropout)

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        documents: Sequence[int],
        speakers: Tensor,
        labels: Sequence[Tensor] | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> CoreferenceOutput:
        """Resolve documents.

        Args:
            layers, lengths, words: as ``TokenVectors.vectors``, of S sentences.
            documents: how many of the sentences belong to each document.
            speakers: (S,) int64, a number for every speaker of a document.
            labels: for each document (M, 3) int64: first word, last word and cluster of each mention.
        """
        vectors, mask = self.reader.vectors(layers, lengths, words)
        vectors = self.dropout(vectors)
        states = self.dropout(self.reader.beside(run_lstm(self.encoder, vectors, lengths), layers, lengths))
        owners = torch.arange(len(lengths), device=lengths.device)[:, None].expand(mask.shape)[mask]
        counts = [int(own.sum()) for own in lengths.split(list(documents))]
        spans: list[Tensor] = []
        antecedents: list[Tensor] = []
        losses: list[Tensor] = []
        parts = zip(vectors[mask].split(counts), states[mask].split(counts), owners.split(counts))
        for number, (own_vectors, own_states, own) in enumerate(parts):
            kept, vector, scores = self._mentions(own_vectors, own_states, own)
            ranked, places, is_earlier = self._rank(vector, scores, speakers[own[kept[:, 0]]])
            none = places.new_full((len(places), 1), -1)
            spans.append(kept)
            antecedents.append(torch.cat((none, places), 1).gather(1, ranked.argmax(1, keepdim=True))[:, 0])
            if labels is not None:
                losses.append(_losses(ranked, places, is_earlier, kept, labels[number]))
        loss = None if labels is None else torch.cat(losses).mean() + self.reader.penalty()
        return CoreferenceOutput(loss, spans, antecedents)

    def _mentions(self, vectors: Tensor, states: Tensor, owners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A document's words (n, ...) and their sentences (n,) -> kept spans (k, 2), their vectors (k, G) and scores
        (k,), in the order of the text."""
        steps = torch.arange(len(owners), device=owners.device)
        firsts = steps[:, None].expand(-1, self.max_span)
        lasts = firsts + torch.arange(self.max_span, device=owners.device)
        may_be = (lasts < len(owners)) & (owners[lasts.clamp(max=len(owners) - 1)] == owners[firsts])
        firsts, lasts = firsts[may_be], lasts[may_be]
        inside = (steps >= firsts[:, None]) & (steps <= lasts[:, None])  # (C, n)
        weights = masked_softmax(self.head_scores(states)[:, 0].expand(inside.shape), inside)
        width = self.dropout(self.widths(lasts - firsts))
        spans = torch.cat((states[firsts], states[lasts], weights @ vectors, width), 1)
        scores = self.mention_scores(spans)[:, 0]
        most = max(1, int(self.spans_per_word * len(owners)))
        chosen = torch.tensor(_best_without_crossing(scores, firsts, lasts, most), device=owners.device)
        return torch.stack((firsts[chosen], lasts[chosen]), 1), spans[chosen], scores[chosen]

    def _rank(self, spans: Tensor, scores: Tensor, speakers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spans (k, G), their scores and speakers (k,) -> scores of "none" and of antecedents (k, 1 + a), the places of
        the antecedents among the spans (k, a), and which of them are earlier spans."""
        count = len(spans)
        own = torch.arange(count, device=spans.device)
        is_earlier = own[:, None] > own
        rough = scores[:, None] + scores + self.dropout(self.coarse(spans)) @ spans.T
        lowest = torch.finfo(rough.dtype).min
        rough, places = rough.masked_fill(~is_earlier, lowest).topk(min(self.antecedents, count - 1), 1)
        is_earlier = is_earlier.gather(1, places)
        gaps = torch.tensor(_DISTANCES, device=spans.device)
        distance = self.distances(torch.bucketize((own[:, None] - places).clamp(min=1), gaps, right=True))
        speaker = self.speakers((speakers[:, None] == speakers[places]).long())
        one, other = spans[:, None].expand(-1, places.shape[1], -1), spans[places]
        pairs = torch.cat((one, other, one * other, self.dropout(distance), self.dropout(speaker)), -1)
        # Where there is no earlier span, nothing is added to the lowest number: that would overflow.
        fine = self.pair_scores(pairs)[..., 0]
        found = (rough.masked_fill(~is_earlier, 0.0) + fine).masked_fill(~is_earlier, lowest)
        return torch.cat((found.new_zeros(count, 1), found), 1).float(), places, is_earlier


def _scorer(width: int, dropout: float) -> nn.Sequential:
    """Two hidden layers and a number: (..., width) -> (..., 1)."""
    layers: list[nn.Module] = []
    for size in (width, _HIDDEN):
        layers += [nn.Linear(size, _HIDDEN), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(_HIDDEN, 1))


def _best_without_crossing(scores: Tensor, firsts: Tensor, lasts: Tensor, most: int) -> list[int]:
    """Places of the best spans in the order of the text; two cross where each holds one end of the other alone."""
    ends: list[tuple[int, int]] = list(zip(firsts.tolist(), lasts.tolist()))
    longest: dict[int, int] = {}  # by where taken spans begin, where the longest ends
    earliest: dict[int, int] = {}  # by where they end, where the earliest begins
    taken: list[int] = []
    for place in scores.detach().sort(descending=True, stable=True).indices.tolist():
        first, last = ends[place]
        goes_out = any(longest.get(word, -1) > last for word in range(first + 1, last + 1))
        if goes_out or any(earliest.get(word, first) < first for word in range(first, last)):
            continue
        longest[first] = max(longest[first], last) if first in longest else last
        earliest[last] = min(earliest[last], first) if last in earliest else first
        taken.append(place)
        if len(taken) == most:
            break
    return sorted(taken)


def _losses(ranked: Tensor, places: Tensor, is_earlier: Tensor, spans: Tensor, gold: Tensor) -> Tensor:
    """-log of the share of the gold antecedents of each span, (k,)."""
    gold = torch.cat((gold, gold.new_full((1, 3), -1)))  # so that there is one
    is_same = (spans[:, None] == gold[:, :2]).all(-1)  # (k, M + 1)
    clusters = torch.where(is_same.any(1), gold[is_same.int().argmax(1), 2], -1)
    is_gold = (clusters[:, None] == clusters[places]) & (clusters[:, None] >= 0) & is_earlier
    is_gold = torch.cat((~is_gold.any(1, keepdim=True), is_gold), 1)
    lowest = torch.finfo(ranked.dtype).min
    return ranked.logsumexp(1) - ranked.masked_fill(~is_gold, lowest).logsumexp(1)
