# SPDX-License-Identifier: Apache-2.0
"""ESIM: whether one text follows from another, or any class, or number, for every pair of texts.

Shape letters: B pairs, T words, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...nn import LSTM
from ..token_vectors import Sources, TokenVectors
from .outputs import LstmOutput, loss_of_texts
from .sequences import VariationalDropout, masked_max, masked_mean, masked_softmax, run_lstm, word_mask


class Esim(nn.Module):
    """Each text attends to the other, and a second LSTM compares what the words and their counterparts say.

    ``P, Q = bilstm(p), bilstm(q)``; ``P~ = softmax(P Q') Q`` and ``Q~ = softmax(Q P') P``;
    ``V = bilstm(relu(W [P; P~; P - P~; P * P~]))``, and the same of Q; the mean and maximum of both stand for the pair.

    Args:
        sources: what words' vectors are made of; its second mix stands beside P and Q.
        num_classes: C; 1 for a number.
        hidden_size: H, of each direction of both LSTMs, of W and of the last hidden layer.
        lstm_layers: of the first LSTM.
        dropout: of words' vectors and of the second LSTM's input (one mask for all words), and around the last hidden
            layer.

    Reference: Chen et al. 2017; Peters et al. 2018, A.3; AllenNLP's ESIM, whose hidden layer is relu's (Chen's: tanh).
    """

    def __init__(
        self,
        sources: Sources,
        num_classes: int,
        *,
        hidden_size: int = 300,
        lstm_layers: int = 1,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.reader = TokenVectors(sources)
        self.word_dropout, self.dropout = VariationalDropout(dropout), nn.Dropout(dropout)
        self.encoder = LSTM(sources.width, hidden_size, lstm_layers, batch_first=True, bidirectional=True)
        width = 2 * hidden_size + sources.output_width
        self.compare = nn.Linear(4 * width, hidden_size)
        self.composer = LSTM(hidden_size, hidden_size, batch_first=True, bidirectional=True)
        self.dense = nn.Linear(8 * hidden_size, hidden_size)
        self.classifier = nn.Linear(hidden_size, num_classes)

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        labels: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> LstmOutput:
        """layers, lengths and words as ``TokenVectors.vectors``, of 2B texts: all first ones, then all second ones;
        labels (B,) int64, or floating for numbers -> logits (B, C) and the mean loss."""
        vectors, _ = self.reader.vectors(layers, lengths, words)
        mask = word_mask(lengths, vectors.shape[1])
        encoded = run_lstm(self.encoder, self.word_dropout(vectors), lengths)
        encoded = self.reader.beside(encoded, layers, lengths)
        (one, other), (one_mask, other_mask) = encoded.chunk(2), mask.chunk(2)
        scores = one @ other.transpose(1, 2)
        found = torch.cat(
            (
                masked_softmax(scores, other_mask[:, None]) @ other,
                masked_softmax(scores.transpose(1, 2), one_mask[:, None]) @ one,
            )
        )
        compared = torch.relu(self.compare(torch.cat((encoded, found, encoded - found, encoded * found), -1)))
        composed = run_lstm(self.composer, self.word_dropout(compared), lengths)
        texts = torch.cat((masked_mean(composed, mask), masked_max(composed, mask)), 1)
        pair = torch.relu(self.dense(self.dropout(torch.cat(texts.chunk(2), 1))))
        logits = self.classifier(self.dropout(pair))
        return LstmOutput(loss_of_texts(logits, labels, self.reader), logits)
