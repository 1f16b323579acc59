# SPDX-License-Identifier: Apache-2.0
"""A class, or a number, for every text or pair of texts."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.bert.heads import BertForSequenceClassification
from ...models.bert.tokenization import BertTokenizer
from ...models.heads.bcn import BiattentiveClassifier
from ...models.heads.esim import Esim
from ...models.lstm_heads import LstmClassifier
from ...models.token_vectors import Sources
from ..readers.files import fail
from ..readers.tables import Example
from . import metrics
from .bert_inputs import Row, collate_rows, encoded, usual_length
from .builder import Choice, TaskBuilder
from .features import WordInputs, WordItem, save_feature_model, split_words
from .predictor import Predictor, check_label, label_numbers, write_text

_USUAL_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Prediction:
    """A class with its probability, or a number (as ``label``, probability None)."""

    label: str
    probability: float | None


def class_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels of training data, sorted."""
    return tuple(sorted({example.gold for example in examples}))


def check_labels(path: str | os.PathLike[str], examples: Sequence[Example], known: Sequence[str]) -> None:
    """Refuse labels that do not occur in the training data or, without ``known``, that are not numbers.

    Raises:
        ValueError: with file and line.
    """
    names = frozenset(known)
    for example in examples:
        if known and example.label is not None:
            check_label(path, example.line, example.label, names)
        elif example.label is not None:
            try:
                is_number = math.isfinite(float(example.label))
            except ValueError:
                is_number = False
            if not is_number:
                raise fail(path, f"line {example.line}", f"label {example.label!r}; expected a finite number")


class _Classifier(Predictor):
    """What both kinds of classifier share. Without labels it is a regression. Predictions are ``Prediction``."""

    def __init__(self, labels: Sequence[str], is_pair: bool) -> None:
        self.task = "pair" if is_pair else "classify"
        self.is_pair, self.labels = is_pair, tuple(labels)
        self._numbers = label_numbers(labels)

    @property
    def main_figure(self) -> str:
        return "accuracy" if self.labels else "spearman"

    def _target(self, example: Example) -> float | int | None:
        if example.label is None:
            return None
        return self._numbers.get(example.label) if self.labels else float(example.label)

    def _targets(self, values: Sequence[Any]) -> dict[str, Tensor]:
        if any(value is None for value in values):
            return {}
        return {"labels": torch.tensor(values, dtype=torch.int64 if self.labels else torch.float32)}

    def _read(self, logits: Tensor) -> list[Prediction]:
        if not self.labels:
            return [Prediction(f"{value:.6g}", None) for value in logits[:, 0].float().tolist()]
        shares, best = logits.float().softmax(-1).max(-1)
        return [Prediction(self.labels[k], share) for k, share in zip(best.tolist(), shares.tolist())]

    def predict(self, examples: Sequence[Example], items: Sequence[Any] | None = None) -> list[Prediction]:
        result: list[Any] = [None] * len(examples)
        for chosen, output in self.outputs(self.items(examples) if items is None else items):
            for item, one in zip(chosen, self._read(output.logits)):
                result[item.data] = one  # the example's number
        return result

    def scores(self, examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
        """``accuracy``, ``f1_macro``, ``matthews`` and, for two classes, ``f1``; of numbers ``pearson``, ``spearman``
        and ``mse``."""
        if not self.labels:
            gold = [float(example.gold) for example in examples]
            return metrics.regression_scores(gold, [float(one.label) for one in predictions])
        # A label that does not occur in the training data gets a number of its own, which is never predicted.
        numbers = dict(self._numbers)
        gold = [numbers.setdefault(example.gold, len(numbers)) for example in examples]
        return metrics.class_scores(gold, [numbers[one.label] for one in predictions], len(numbers))

    def write_predictions(
        self, path: Path, examples: Sequence[Example], predictions: Sequence[Prediction]
    ) -> list[Path]:
        """A JSON object a line: ``line`` (of the input), ``prediction``, ``probability``, ``label`` if there is one."""
        lines = []
        for example, one in zip(examples, predictions):
            entry: dict[str, Any] = {"line": example.line}
            if one.probability is not None:
                entry |= {"prediction": one.label, "probability": round(one.probability, 6)}
            else:
                entry["prediction"] = float(one.label)
            if example.label is not None:
                entry["label"] = example.label
            lines.append(json.dumps(entry, ensure_ascii=False))
        return [write_text(path, "\n".join(lines) + "\n")]


class BertClassifier(_Classifier):
    """BERT with a class for each text, or a pair as [CLS] a [SEP] b [SEP]; all layers trained.

    Args:
        model: with as many labels as ``labels``, or one for numbers.
        tokenizer: the model's.
        labels: names of classes; () for numbers.
        is_pair: whether examples are pairs.
        max_length: tokens of a text, special ones included; longer ones are cut, of pairs the longer text first. None
            for 128, or the model's limit if that is lower.

    Raises:
        ValueError: a length the model does not have.

    Reference: Devlin et al. 2019, 4.1.
    """

    form = "bert"
    model: BertForSequenceClassification

    def __init__(
        self,
        model: BertForSequenceClassification,
        tokenizer: BertTokenizer,
        labels: Sequence[str],
        *,
        is_pair: bool = False,
        max_length: int | None = None,
    ) -> None:
        super().__init__(labels, is_pair)
        self.model, self.tokenizer = model, tokenizer
        self.max_length = usual_length(max_length, _USUAL_LENGTH, model.config.max_length, tokenizer)
        self.options = {"max_length": self.max_length}

    def items(self, examples: Sequence[Example]) -> list[Row]:
        texts = [(example.text, example.pair) if self.is_pair else example.text for example in examples]
        found = encoded(self.tokenizer.encode_batch, texts, max_length=self.max_length, truncation=True)
        rows = []
        for index, (example, encoding) in enumerate(zip(examples, found)):
            if encoding.truncated:
                self.lost[f"texts of more than {self.max_length} tokens, cut (--max-length)"] += 1
            rows.append(Row(encoding.ids, encoding.type_ids, self._target(example), index))
        return rows

    def collate(self, items: Sequence[Row]) -> dict[str, Any]:
        batch = collate_rows(items, self.tokenizer.pad_token_id, False)
        return batch | self._targets([row.labels for row in items])

    def save_model(self, directory: Path) -> None:
        self.model.save_pretrained(directory, overwrite=True)
        self.tokenizer.save(directory)


class FeatureClassifier(_Classifier):
    """An LSTM head over a frozen BERT or ELMo, an ELMo trained with it, or words alone. Texts are split at white
    space, and around Chinese and Japanese characters.

    Args:
        model: a head of ``ClassifierBuilder.heads``, or an ``OverElmo`` around one.
        inputs: what the model reads of words.
        labels: names of classes; () for numbers.
        is_pair: whether examples are pairs.
        head: the options the head was made with, to make it again.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        inputs: WordInputs,
        labels: Sequence[str],
        *,
        is_pair: bool = False,
        head: dict[str, Any],
    ) -> None:
        super().__init__(labels, is_pair)
        self.model, self._words = model, inputs
        self.form = inputs.form
        self.options = {"features": inputs.features, "head": head}

    def items(self, examples: Sequence[Example]) -> list[_Texts]:
        items = []
        for index, example in enumerate(examples):
            texts = [example.text, example.pair] if self.is_pair else [example.text]
            items.append(
                _Texts(
                    [WordItem([word for word, _ in split_words(text)]) for text in texts], self._target(example), index
                )
            )
        self._words.keep([text for item in items for text in item.texts])
        return items

    def collate(self, items: Sequence[_Texts]) -> dict[str, Any]:
        texts = [item.texts[k] for k in range(2 if self.is_pair else 1) for item in items]
        return self._words.collate(texts) | self._targets([item.target for item in items])

    def save_model(self, directory: Path) -> None:
        save_feature_model(self.model, self._words, directory)


@dataclass(slots=True)
class _Texts:
    texts: list[WordItem]
    target: Any
    data: int

    @property
    def length(self) -> int:
        return max(text.length for text in self.texts)


@dataclasses.dataclass(frozen=True)
class ClassifierBuilder(TaskBuilder):
    """Of texts, or of pairs."""

    is_pair: bool
    architecture = "ForSequenceClassification"

    @property
    def heads(self) -> dict[str, Any]:
        own = functools.partial(LstmClassifier, is_pair=self.is_pair)
        return {"lstm": own, "esim": Esim} if self.is_pair else {"lstm": own, "bcn": BiattentiveClassifier}

    def network(self, model: Any, labels: Sequence[str], **place: Any) -> BertForSequenceClassification:
        network = BertForSequenceClassification.from_pretrained(model, num_labels=list(labels) or 1, **place)
        # The file may be of another kind of problem; Hugging Face's pipelines look here, too.
        problem = "single_label_classification" if labels else "regression"
        extra = {**network.config.extra, "problem_type": problem}
        network.config = dataclasses.replace(network.config, extra=extra)
        return network

    def over_bert(
        self, network: Any, tokenizer: BertTokenizer, labels: Sequence[str], choice: Choice, **options: Any
    ) -> BertClassifier:
        return BertClassifier(network, tokenizer, labels, is_pair=self.is_pair, **options)

    def head(self, kind: Any, sources: Sources, labels: Sequence[str], **options: Any) -> nn.Module:
        return kind(sources, max(len(labels), 1), **options)

    def over_features(
        self, model: Any, inputs: WordInputs, labels: Sequence[str], choice: Choice, head: dict[str, Any]
    ) -> FeatureClassifier:
        return FeatureClassifier(model, inputs, labels, is_pair=self.is_pair, head=head)

    def words(self, examples: Sequence[Example]) -> Iterable[Sequence[str]]:
        for example in examples:
            yield [word for word, _ in split_words(example.text)]
            if self.is_pair and example.pair is not None:
                yield [word for word, _ in split_words(example.pair)]

    def has_classes(self, num_labels: int) -> bool:
        return num_labels > 1  # one output is a number
