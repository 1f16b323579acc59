# SPDX-License-Identifier: Apache-2.0
"""BiDAF with self-attention: start and end of the answer to a question among the words of a text, or none.

Shape letters: B texts with their questions, T words, N size of a vector, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...nn import LSTM
from ..token_vectors import Sources, TokenVectors
from .outputs import SpanLogits, loss_of_spans
from .sequences import VariationalDropout, masked_max, masked_softmax, run_lstm, word_mask


class TriLinear(nn.Module):
    """``a_ij = u . x_i + v . y_j + w . (x_i * y_j)``: (B, T, N) and (B, S, N) -> (B, T, S).

    Parameters: ``weight`` (3, N): u, v, w.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, dim))
        bound = (6 / (3 * dim + 1)) ** 0.5  # Glorot's, of a linear layer from 3N to 1
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        u, v, w = self.weight
        return (x @ u)[:, :, None] + (y @ v)[:, None] + (x * w) @ y.transpose(1, 2)


class BiDaf(nn.Module):
    """Text and question attend to each other in both directions, then the text to itself.

    With ``h`` of the text and ``q`` of the question from one biLSTM and ``a`` of ``TriLinear``:
    ``c_i = sum_j softmax_j(a_ij) q_j``; ``b = sum_i softmax_i(max_j a_ij) h_i``;
    ``x_i = relu(W [h_i; c_i; h_i * c_i; b * c_i])``. Then ``z = bilstm(x)``, ``s_i`` is z's attention to itself, its
    own place left out, and ``y_i = x_i + relu(W' [z_i; s_i; z_i * s_i])``. A biLSTM over y gives the starts, one over y
    and its output the ends.

    Args:
        sources: what words' vectors are made of; its second mix stands beside h and q.
        hidden_size: H, of each direction of all LSTMs; of W and W' it is 2H.
        lstm_layers: of the first LSTM.
        dropout: of the inputs of LSTMs and attentions, one mask for all words.

    Reference: Seo et al. 2017; Clark & Gardner 2018, 2.2, whose recurrent layers are GRUs; Peters et al. 2018, A.2. The
    score of "no answer" is a linear layer's over the largest elements of both last LSTMs.
    """

    def __init__(self, sources: Sources, *, hidden_size: int = 100, lstm_layers: int = 1, dropout: float = 0.2) -> None:
        super().__init__()
        self.reader = TokenVectors(sources)
        self.dropout = VariationalDropout(dropout)
        both = 2 * hidden_size
        width = both + sources.output_width
        self.encoder = LSTM(sources.width, hidden_size, lstm_layers, batch_first=True, bidirectional=True)
        self.attention, self.self_attention = TriLinear(width), TriLinear(both)
        self.merge, self.self_merge = nn.Linear(4 * width, both), nn.Linear(3 * both, both)
        self.modeler = LSTM(both, hidden_size, batch_first=True, bidirectional=True)
        self.starter = LSTM(both, hidden_size, batch_first=True, bidirectional=True)
        self.ender = LSTM(2 * both, hidden_size, batch_first=True, bidirectional=True)
        self.start, self.end = nn.Linear(both, 1), nn.Linear(both, 1)
        self.no_answer = nn.Linear(2 * both, 2)

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> SpanLogits:
        """layers, lengths and words as ``TokenVectors.vectors``, of 2B texts: all texts, then all questions; positions
        (B,) int64: 0 for no answer, else the word's number + 1."""
        vectors, _ = self.reader.vectors(layers, lengths, words)
        encoded = run_lstm(self.encoder, self.dropout(vectors), lengths)
        texts, questions = self.dropout(self.reader.beside(encoded, layers, lengths)).chunk(2)
        mask, question_mask = word_mask(lengths, vectors.shape[1]).chunk(2)
        lengths = lengths.chunk(2)[0]
        merged = self.dropout(self._attend(texts, questions, mask, question_mask))
        modeled = self.dropout(run_lstm(self.modeler, merged, lengths))
        y = self.dropout(merged + self._attend_to_itself(modeled, mask))
        starts = run_lstm(self.starter, y, lengths)
        ends = run_lstm(self.ender, torch.cat((y, self.dropout(starts)), -1), lengths)
        none = self.no_answer(torch.cat((masked_max(starts, mask), masked_max(ends, mask)), -1))
        logits = torch.cat((self.start(starts), self.end(ends)), -1)
        # A text without words has no answer.
        is_word = mask & (lengths > 0)[:, None]
        logits = logits.masked_fill(~is_word[..., None], torch.finfo(logits.dtype).min)
        start, end = torch.cat((none[:, None], logits), 1).float().unbind(-1)
        return SpanLogits(loss_of_spans(start, end, start_positions, end_positions, self.reader), start, end)

    def _attend(self, texts: Tensor, questions: Tensor, mask: Tensor, question_mask: Tensor) -> Tensor:
        """(B, T, N) and (B, S, N) -> (B, T, 2H)."""
        scores = self.attention(texts, questions)
        found = masked_softmax(scores, question_mask[:, None]) @ questions
        largest = scores.masked_fill(~question_mask[:, None], torch.finfo(scores.dtype).min).amax(-1)
        back = masked_softmax(largest, mask)[:, None] @ texts
        return torch.relu(self.merge(torch.cat((texts, found, texts * found, back * found), -1)))

    def _attend_to_itself(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, 2H) -> (B, T, 2H)."""
        is_own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        allowed = mask[:, None] & ~is_own
        # The only word of a text finds nothing.
        found = masked_softmax(self.self_attention(x, x), allowed).masked_fill(~allowed, 0.0) @ x
        return torch.relu(self.self_merge(torch.cat((x, found, x * found), -1)))
