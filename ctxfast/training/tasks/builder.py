# SPDX-License-Identifier: Apache-2.0
"""How a pretrained model is used for a task, and what each task's module supplies to make its predictors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...models.bert.head_base import BertWithHead
from ...models.bert.tokenization import BertTokenizer
from ...models.token_vectors import Sources
from .features import WordInputs
from .predictor import Predictor


@dataclass(frozen=True)
class Choice:
    """How a pretrained model is used.

    Attributes:
        features: None: BERT with all layers trained, or ELMo with its weights trained too. A name of
            ``features.FEATURES``: vectors of a frozen encoder, and an LSTM over them.
        words: what the LSTM reads of words besides, or alone if there is no encoder: "chars" (a character CNN),
            "learned" (a table of word vectors), "chars,learned"; "" for nothing.
        word_dim: size of new vectors of the table.
        trains_vectors: whether the table is trained.
        mix_norm, mix_l2: see ``Sources``.
        head: which model reads the vectors: "lstm", "bcn" of texts, "esim" of pairs, "highway" of words, "bidaf" of
            answers.
        output_mix: see ``Sources``.
        hidden_size, lstm_layers, dropout: of the head.
        crf: whether tags are scored together (with ``features``, or ELMo).
        max_span, spans_per_word, antecedents: see ``CoreferenceResolver``.
        max_length: tokens of a text or window; None for the task's default.
        predicate: see ``BertTagger``; with ``features`` or ELMo anything but "none" is a learned mark.
        is_spans: whether tags are BIO spans.
        doc_stride, max_query, max_answer, n_best, null_threshold: see ``BertSpanFinder``.

    Raises:
        ValueError: a size below 1, a dropout outside 0 <= p < 1, other words, a negative factor.
    """

    features: str | None = None
    words: str = ""
    word_dim: int = 100
    trains_vectors: bool = True
    mix_norm: bool = False
    mix_l2: float = 0.0
    output_mix: bool = False
    head: str = "lstm"
    hidden_size: int = 256
    lstm_layers: int = 2
    dropout: float = 0.3
    crf: bool = False
    max_span: int = 10
    spans_per_word: float = 0.4
    antecedents: int = 50
    max_length: int | None = None
    predicate: str = "none"
    is_spans: bool = True
    doc_stride: int = 128
    max_query: int = 64
    max_answer: int = 30
    n_best: int = 20
    null_threshold: float | None = 0.0

    def __post_init__(self) -> None:
        for name in (
            "word_dim",
            "hidden_size",
            "lstm_layers",
            "doc_stride",
            "max_query",
            "max_answer",
            "n_best",
            "max_span",
            "antecedents",
        ):
            if not getattr(self, name) >= 1:
                raise ValueError(f"ctxfast.finetune: {name} is {getattr(self, name)}; expected 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ctxfast.finetune: dropout is {self.dropout}; expected a probability, 0 <= p < 1.")
        if not 0 < self.spans_per_word < math.inf:
            raise ValueError(f"ctxfast.finetune: spans_per_word is {self.spans_per_word}; expected a number above 0.")
        if not 0 <= self.mix_l2 < math.inf:
            raise ValueError(f"ctxfast.finetune: mix_l2 is {self.mix_l2}; expected a factor, 0 or more.")
        if self.words and (set(self.kinds_of_words) - {"chars", "learned"}):
            raise ValueError(
                f"ctxfast.finetune: words is {self.words!r}; expected 'chars', 'learned' or 'chars,learned'."
            )

    @property
    def kinds_of_words(self) -> tuple[str, ...]:
        """``words``, each by itself."""
        return tuple(self.words.split(",")) if self.words else ()

    def fields(self, *names: str) -> dict[str, Any]:
        """Some of the fields, as keyword arguments."""
        return {name: getattr(self, name) for name in names}


class TaskBuilder(ABC):
    """The parts of a task's predictors, for ``build.build``.

    Attributes:
        architecture: how Hugging Face's classes for it end.
        has_crf: whether its LSTM head can score labels together.
        heads: names of its heads and their classes, each with its vectors of words as ``reader``.
    """

    architecture: str
    heads: Mapping[str, Any]
    has_crf = False

    @abstractmethod
    def network(self, model: Any, labels: Sequence[str], **place: Any) -> BertWithHead:
        """BERT with a head, from a directory or package; ``place``: dtype and device."""

    @abstractmethod
    def over_bert(
        self, network: Any, tokenizer: BertTokenizer, labels: Sequence[str], choice: Choice, **options: Any
    ) -> Predictor:
        """The predictor around such a network; ``options``: ``max_length`` if it is chosen."""

    def head_options(self, choice: Choice) -> dict[str, Any]:
        """Options of the head besides its sizes."""
        return {}

    @abstractmethod
    def head(self, kind: Any, sources: Sources, labels: Sequence[str], **options: Any) -> nn.Module:
        """A head, of a class of ``heads``, over such vectors of words."""

    @abstractmethod
    def over_features(
        self, model: Any, inputs: WordInputs, labels: Sequence[str], choice: Choice, head: dict[str, Any]
    ) -> Predictor:
        """The predictor around such a head, or around an ELMo with one; ``head``: its options."""

    @abstractmethod
    def words(self, examples: Sequence[Any]) -> Iterable[Sequence[str]]:
        """The texts of examples as the words that an LSTM head reads."""

    @abstractmethod
    def has_classes(self, num_labels: int) -> bool:
        """Whether the outputs of a model that Hugging Face's library fine-tuned are classes with names."""

    def foreign_changes(self, labels: Sequence[str]) -> dict[str, Any]:
        """Fields of ``Choice`` that such a model does not say."""
        return {}
