# SPDX-License-Identifier: Apache-2.0
"""Deep semantic role labelling: interleaved highway LSTMs over words and a mark of the predicate, and BIO's rules.

Shape letters: B texts, T words, N size of a vector, H hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...nn.crf import Crf, bio_rules
from ..token_vectors import Sources, TokenVectors
from .outputs import PREDICATE_DIM, LstmOutput, is_bio, loss_of_words

_GATES = 5  # input, forget, candidate, output, highway


class HighwayLstm(nn.Module):
    """One direction of an LSTM whose output is mixed with its input by a gate.

    ``i, f, o, r = sigmoid(W x_t + U h_t-1 + b)``, each its own; ``g = tanh(..)``; ``c_t = i g + f c_t-1``;
    ``h_t = r o tanh(c_t) + (1 - r) W_h x_t``.

    Args:
        input_size: N.
        hidden_size: H.
        is_backward: whether it reads from the end.
        dropout: of h_t on its way to the next step, one mask for all steps.

    Parameters: ``input.weight`` (6H, N), ``state.weight`` (5H, H), ``state.bias`` (5H,), in the order i, f, g, o, r,
    and W_h; orthogonal in blocks, the forget gate's bias is 1.

    Reference: Srivastava et al. 2015; Zhang et al. 2016; He et al. 2017, 2.2; AllenNLP's AugmentedLstm.
    """

    def __init__(self, input_size: int, hidden_size: int, is_backward: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden_size, self.is_backward, self.dropout = hidden_size, is_backward, dropout
        self.input = nn.Linear(input_size, (_GATES + 1) * hidden_size, bias=False)
        self.state = nn.Linear(hidden_size, _GATES * hidden_size)
        with torch.no_grad():
            for block in (*self.input.weight.split(hidden_size), *self.state.weight.split(hidden_size)):
                nn.init.orthogonal_(block)
            self.state.bias.zero_()
            self.state.bias[hidden_size : 2 * hidden_size].fill_(1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, N), mask (B, T), True at words, padding at the end -> (B, T, H), zeros at padding."""
        size, steps = self.hidden_size, x.shape[1]
        gates, carried = self.input(x).split([_GATES * size, size], -1)
        hidden = memory = x.new_zeros(x.shape[0], size)
        keep = x.new_ones(x.shape[0], size)
        if self.training and self.dropout:
            keep = keep.bernoulli_(1 - self.dropout) / (1 - self.dropout)
        outputs: list[Tensor] = [hidden] * steps
        for t in range(steps - 1, -1, -1) if self.is_backward else range(steps):
            own = gates[:, t] + self.state(hidden)
            i, f, g, o, r = own.chunk(_GATES, -1)
            memory = torch.sigmoid(i) * torch.tanh(g) + torch.sigmoid(f) * memory
            r = torch.sigmoid(r)
            output = r * torch.sigmoid(o) * torch.tanh(memory) + (1 - r) * carried[:, t]
            # Zeros at padding: a backward direction comes from there and must begin at a text's end as at a batch's.
            real = mask[:, t, None].to(x.dtype)
            memory, outputs[t] = memory * real, output * real
            hidden = outputs[t] * keep
        return torch.stack(outputs, 1)


class HighwayTagger(nn.Module):
    """A class for every word, by highway LSTMs one on another whose directions alternate.

    Args:
        sources: what words' vectors are made of.
        tags: names of the classes; under BIO names, sequences that BIO2 forbids are never predicted.
        hidden_size, lstm_layers: of the LSTMs; the first reads forward.
        dropout: recurrent dropout of every LSTM.
        marks_predicate: whether a learned mark (100 elements) tells the words of the predicate from others.

    Reference: He et al. 2017; Peters et al. 2018, A.4.
    """

    def __init__(
        self,
        sources: Sources,
        tags: Sequence[str],
        *,
        hidden_size: int = 300,
        lstm_layers: int = 8,
        dropout: float = 0.1,
        marks_predicate: bool = False,
    ) -> None:
        super().__init__()
        self.reader = TokenVectors(sources)
        self.predicate = nn.Embedding(2, PREDICATE_DIM) if marks_predicate else None
        width = sources.width + (PREDICATE_DIM if marks_predicate else 0)
        sizes = [width] + [hidden_size] * (lstm_layers - 1)
        self.lstms = nn.ModuleList(HighwayLstm(size, hidden_size, k % 2 == 1, dropout) for k, size in enumerate(sizes))
        self.classifier = nn.Linear(hidden_size + sources.output_width, len(tags))
        # Viterbi with BIO's rules and no scores of its own.
        self.rules = Crf(len(tags), bio_rules(tags) if is_bio(tags) else None).requires_grad_(False)

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        predicate: Tensor | None = None,
        labels: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> LstmOutput:
        """As ``LstmTagger``'s."""
        x, mask = self.reader.vectors(layers, lengths, words)
        if self.predicate is not None:
            assert predicate is not None
            x = torch.cat((x, self.predicate(predicate.long())), -1)
        for lstm in self.lstms:
            x = lstm(x, mask)
        logits = self.classifier(self.reader.beside(x, layers, lengths))
        return LstmOutput(None if labels is None else loss_of_words(logits, labels, self.reader), logits)

    @torch.no_grad()
    def decode(self, logits: Tensor, lengths: Tensor) -> list[list[int]]:
        """The likeliest classes of the words of each text that BIO's rules allow."""
        return self.rules.decode(logits.float().log_softmax(-1), lengths)
