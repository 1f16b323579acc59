# SPDX-License-Identifier: Apache-2.0
"""Heads over vectors of words, of an encoder's layers or of the words by themselves: a bidirectional LSTM, classes.

As the papers' feature-based models: ELMo's task models, and BERT's feature-based tagger (Devlin et al. 2019, 5.3).

Shape letters: B texts, T words, K layers, N size of a layer, C classes, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import LSTM
from ..nn.crf import Crf, bio_rules
from .elmo.bilm import ElmoBiLm
from .elmo.character_encoder import remove_sentence_marks
from .heads.outputs import (
    PREDICATE_DIM,
    LstmOutput,
    SpanLogits,
    is_bio,
    loss_of_spans,
    loss_of_texts,
    loss_of_words,
)
from .heads.sequences import run_lstm
from .token_vectors import Sources, TokenVectors


class _Reader(TokenVectors):
    """Words of texts -> (B, T, 2H): their vectors, dropout, LSTM, and the second mix if there is one."""

    def __init__(
        self, sources: Sources, hidden_size: int, lstm_layers: int, dropout: float, marks_predicate: bool = False
    ) -> None:
        super().__init__(sources)
        self.dropout = nn.Dropout(dropout)
        self.predicate = nn.Embedding(2, PREDICATE_DIM) if marks_predicate else None
        self.lstm = LSTM(
            sources.width + (PREDICATE_DIM if marks_predicate else 0),
            hidden_size,
            lstm_layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if lstm_layers > 1 else 0.0,
        )
        self.width = 2 * hidden_size + sources.output_width

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        predicate: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        x, _ = self.vectors(layers, lengths, words)
        x = self.dropout(x)
        if self.predicate is not None:
            assert predicate is not None
            x = torch.cat((x, self.predicate(predicate.long())), -1)
        return self.dropout(self.beside(run_lstm(self.lstm, x, lengths), layers, lengths))


class LstmTagger(nn.Module):
    """A class for every word.

    Args:
        sources: what words' vectors are made of.
        tags: names of the classes.
        hidden_size, lstm_layers: of the LSTM, in each direction.
        dropout: of its input, between its layers and of its output.
        crf: whether tags are scored together; under BIO names, sequences that BIO2 forbids are never predicted.
        marks_predicate: whether a learned mark tells the words of the predicate from others.
    """

    def __init__(
        self,
        sources: Sources,
        tags: Sequence[str],
        *,
        hidden_size: int = 256,
        lstm_layers: int = 2,
        dropout: float = 0.3,
        crf: bool = False,
        marks_predicate: bool = False,
    ) -> None:
        super().__init__()
        self.reader = _Reader(sources, hidden_size, lstm_layers, dropout, marks_predicate)
        self.classifier = nn.Linear(self.reader.width, len(tags))
        self.crf = Crf(len(tags), bio_rules(tags) if is_bio(tags) else None) if crf else None

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        predicate: Tensor | None = None,
        labels: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> LstmOutput:
        """layers, lengths and words as ``TokenVectors.vectors``; predicate (B, T) 0 or 1; labels (B, T), -100 past a
        text's end -> ``LstmOutput``. The loss is averaged over words."""
        logits = self.classifier(self.reader(layers, lengths, predicate, words))
        if labels is None:
            return LstmOutput(None, logits)
        if self.crf is not None:
            return LstmOutput(self.crf(logits, labels, lengths) + self.reader.penalty(), logits)
        return LstmOutput(loss_of_words(logits, labels, self.reader), logits)

    @torch.no_grad()
    def decode(self, logits: Tensor, lengths: Tensor) -> list[list[int]]:
        """Classes of the words of each text."""
        if self.crf is not None:
            return self.crf.decode(logits, lengths)
        rows = logits.argmax(-1).tolist()
        return [row[:length] for row, length in zip(rows, lengths.tolist())]


class LstmClassifier(nn.Module):
    """A class, or a number, for every text or pair of texts.

    The maximum and the mean of the LSTM's outputs stand for a text, ``[u, v, |u - v|, u * v]`` for a pair of them
    (Conneau et al. 2017), which is given as 2B texts: all the first ones, then all the second ones.

    Args:
        sources, hidden_size, lstm_layers, dropout: as ``LstmTagger``.
        num_classes: C; 1 for a number.
        is_pair: whether texts come in pairs.
    """

    def __init__(
        self,
        sources: Sources,
        num_classes: int,
        *,
        is_pair: bool = False,
        hidden_size: int = 256,
        lstm_layers: int = 1,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.is_pair = is_pair
        self.reader = _Reader(sources, hidden_size, lstm_layers, dropout)
        width = 2 * self.reader.width * (4 if is_pair else 1)
        self.dense = nn.Linear(width, 2 * hidden_size)
        self.classifier = nn.Linear(2 * hidden_size, num_classes)

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        labels: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> LstmOutput:
        """layers, lengths and words as ``TokenVectors.vectors``, of twice as many texts as pairs; labels (pairs,)
        int64, or floating for numbers."""
        x = self.reader(layers, lengths, words=words)
        is_real = (torch.arange(x.shape[1], device=x.device) < lengths.clamp(min=1)[:, None])[..., None]
        mean = x.where(is_real, 0.0).sum(1) / lengths.clamp(min=1)[:, None].to(x.dtype)
        text = torch.cat((x.masked_fill(~is_real, torch.finfo(x.dtype).min).amax(1), mean), 1)
        if self.is_pair:
            u, v = text.chunk(2)
            text = torch.cat((u, v, (u - v).abs(), u * v), 1)
        logits = self.classifier(self.reader.dropout(torch.tanh(self.dense(text))))
        return LstmOutput(loss_of_texts(logits, labels, self.reader), logits)


class LstmSpanFinder(nn.Module):
    """Start and end of the answer to a question among the words of a text, or none.

    Text and question go through one LSTM; each word of the text attends to the question, and a second LSTM reads both.
    A text and its question are given as 2B texts: all texts, then all questions.

    Args:
        sources, hidden_size, lstm_layers, dropout: as ``LstmTagger``; the second LSTM has one layer.

    Reference: after Seo et al. 2017 (BiDAF), the model of ELMo's SQuAD figures, without its second attention.
    """

    def __init__(self, sources: Sources, *, hidden_size: int = 256, lstm_layers: int = 1, dropout: float = 0.3) -> None:
        super().__init__()
        self.reader = _Reader(sources, hidden_size, lstm_layers, dropout)
        width = self.reader.width
        self.similarity = nn.Parameter(torch.ones(width) / width**0.5)
        self.merge = nn.Linear(3 * width, 2 * hidden_size)
        self.second = _Reader(Sources(1, 2 * hidden_size), hidden_size, 1, dropout)
        self.positions = nn.Linear(2 * hidden_size, 2)
        self.no_answer = nn.Linear(2 * hidden_size, 2)

    def forward(
        self,
        layers: Tensor | None,
        lengths: Tensor,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        words: Mapping[str, Tensor] | None = None,
    ) -> SpanLogits:
        """layers, lengths and words as ``TokenVectors.vectors``, of 2B texts; positions (B,) int64: 0 for no answer,
        else the word's number + 1."""
        texts, questions = self.reader(layers, lengths, words=words).chunk(2)
        text_lengths, question_lengths = lengths.chunk(2)
        steps = torch.arange(texts.shape[1], device=texts.device)
        scores = (texts * self.similarity) @ questions.transpose(1, 2)
        is_question = steps < question_lengths.clamp(min=1)[:, None]
        attended = scores.masked_fill(~is_question[:, None], torch.finfo(scores.dtype).min).softmax(-1) @ questions
        merged = torch.relu(self.merge(torch.cat((texts, attended, texts * attended), -1)))
        read = self.second(merged[:, None], text_lengths)
        is_text = (steps < text_lengths[:, None])[..., None]
        lowest = torch.finfo(read.dtype).min
        none = self.no_answer(read.masked_fill(~is_text, lowest).amax(1).clamp(min=-1))
        logits = torch.cat((none[:, None], self.positions(read).masked_fill(~is_text, lowest)), 1).float()
        start, end = logits.unbind(-1)
        return SpanLogits(loss_of_spans(start, end, start_positions, end_positions, self.reader), start, end)


class OverElmo(nn.Module):
    """A head over an ELMo language model that is trained with it.

    Args:
        bilm: the language model; its parameters require gradients.
        head: one of this module's or of ``heads`` over its ``num_layers`` layers.
    """

    def __init__(self, bilm: ElmoBiLm, head: nn.Module) -> None:
        super().__init__()
        self.bilm = bilm
        self.head: Any = head

    def forward(self, character_ids: Tensor, lengths: Tensor, **rest: Any) -> Any:
        """character_ids (B, T, C) of ``batch_to_ids``; the rest as the head's ``forward``."""
        found = self.bilm(character_ids)
        layers = torch.stack([remove_sentence_marks(layer, found["mask"]) for layer in found["activations"]], 1)
        return self.head(layers, lengths, **rest)

    def decode(self, logits: Tensor, lengths: Tensor) -> list[list[int]]:
        """The head's."""
        return self.head.decode(logits, lengths)
