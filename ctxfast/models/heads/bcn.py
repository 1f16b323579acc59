# SPDX-License-Identifier: Apache-2.0
"""The biattentive classification network for single texts: a class, or a number, for every text.

Shape letters: B texts, T words, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ...nn import LSTM
from ..token_vectors import Sources, TokenVectors
from .outputs import LstmOutput, loss_of_texts
from .sequences import masked_max, masked_mean, masked_softmax, run_lstm, word_mask

_POOL = 4  # linear layers of a maxout layer
# Dropout of the maxout layers by that of the rest, 0.5 in AllenNLP's configuration: 0.2 and 0.3.
_LAST_DROPOUTS = (0.4, 0.6)


class BiattentiveClassifier(nn.Module):
    """Words attend to one another, and a second LSTM reads what they found.

    ``X = bilstm(relu(W w))``; ``A = softmax(X X')``; ``Y = bilstm([X; X - A X; X * (A X)])``; the maximum, minimum,
    mean and self-attention of Y stand for the text, and three maxout layers classify it.

    Args:
        sources: what words' vectors are made of; its second mix stands beside Y.
        num_classes: C; 1 for a number.
        hidden_size: H, of each direction of both LSTMs and of W.
        lstm_layers: of the first LSTM.
        dropout: of words' vectors and of what W gives; the maxout layers' are in proportion.

    Reference: McCann et al. 2017, 5; Peters et al. 2018, A.6; AllenNLP's BiattentiveClassificationNetwork, whose output
    layers are without McCann's batch normalisation.
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
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(sources.width, hidden_size)
        self.encoder = LSTM(hidden_size, hidden_size, lstm_layers, batch_first=True, bidirectional=True)
        self.integrator = LSTM(6 * hidden_size, hidden_size, batch_first=True, bidirectional=True)
        width = 2 * hidden_size + sources.output_width
        self.attention = nn.Linear(width, 1)
        sizes = (4 * width, 2 * width, width, num_classes)
        self.outputs = nn.ModuleList(nn.Linear(size, after * _POOL) for size, after in zip(sizes, sizes[1:]))
        self.last_dropouts = nn.ModuleList(nn.Dropout(share * dropout) for share in _LAST_DROPOUTS)

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        labels: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> LstmOutput:
        """layers, lengths and words as ``TokenVectors.vectors``; labels (B,) int64, or floating for numbers -> logits
        (B, C) and the mean loss."""
        vectors, _ = self.reader.vectors(layers, lengths, words)
        mask = word_mask(lengths, vectors.shape[1])
        hidden = self.dropout(torch.relu(self.dense(self.dropout(vectors))))
        encoded = run_lstm(self.encoder, hidden, lengths)
        attended = masked_softmax(encoded @ encoded.transpose(1, 2), mask[:, None]) @ encoded
        joined = torch.cat((encoded, encoded - attended, encoded * attended), -1)
        integrated = self.reader.beside(run_lstm(self.integrator, joined, lengths), layers, lengths)
        weights = masked_softmax(self.attention(integrated)[..., 0], mask)
        own = (weights[:, None] @ integrated)[:, 0]
        most, least = masked_max(integrated, mask), -masked_max(-integrated, mask)
        text = torch.cat((most, least, masked_mean(integrated, mask), own), 1)
        for layer, dropout in zip(self.outputs, (*self.last_dropouts, None)):
            pools = layer(text).unflatten(1, (-1, _POOL))
            text = pools.amax(-1) if dropout is None else dropout(pools.amax(-1))
        return LstmOutput(loss_of_texts(text, labels, self.reader), text)
