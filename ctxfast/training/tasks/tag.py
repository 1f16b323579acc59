# SPDX-License-Identifier: Apache-2.0
"""A tag for every word: entities, parts of speech, arguments of a predicate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...models.bert.heads import BertForTokenClassification
from ...models.bert.tokenization import BertTokenizer
from ...models.heads.highway_lstm import HighwayTagger
from ...models.heads.outputs import is_bio
from ...models.lstm_heads import LstmTagger, OverElmo
from ...models.token_vectors import Sources
from ..readers.conll import Sentence
from . import metrics
from .bert_inputs import Frame, Row, collate_rows, windows, word_pieces
from .builder import Choice, TaskBuilder
from .features import WordInputs, WordItem, save_feature_model
from .predictor import IGNORE, Predictor, check_label, label_numbers, pad, write_text

PREDICATES = ("none", "type", "sep")
# A word may have this share of a window at most; pieces beyond it are left out.
_LONGEST_WORD = 4


def tag_names(sentences: Sequence[Sentence]) -> tuple[str, ...]:
    """The tags of training data, sorted; BIO tags have O first, and both B- and I- of every kind."""
    found = {tag for sentence in sentences for tag in sentence.gold}
    if is_bio(found):
        kinds = sorted({tag[2:] for tag in found if tag != "O"})
        return ("O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI"))
    return tuple(sorted(found))


def check_tags(path: str | os.PathLike[str], sentences: Sequence[Sentence], known: Sequence[str]) -> None:
    """Refuse tags that do not occur in the training data.

    Raises:
        ValueError: with file, line and the tags there are.
    """
    names = frozenset(known)
    for sentence in sentences:
        for place, tag in enumerate(sentence.tags or ()):
            check_label(path, sentence.line_of(place), tag, names)


def _without_v(tags: Sequence[str]) -> list[str]:
    return ["O" if tag[2:] == "V" else tag for tag in tags]


class _Tagger(Predictor):
    """What both kinds of tagger share. Predictions are lists of tags, a tag a word."""

    task = "tag"

    def __init__(self, labels: Sequence[str], is_spans: bool) -> None:
        self.labels = tuple(labels)
        self.is_spans = is_spans
        self._numbers = label_numbers(labels)

    @property
    def main_figure(self) -> str:
        return "f1" if self.is_spans else "accuracy"

    def _check_predicates(self, examples: Sequence[Sentence]) -> None:
        if any(sentence.predicate is None for sentence in examples):
            raise ValueError(
                "ctxfast.finetune: the model marks the predicate of a sentence, but the data has none; expected "
                "--predicate-column (read_conll's predicate_column)."
            )

    def weight(self, batch: dict[str, Any]) -> float:
        return float((batch["labels"] != IGNORE).sum())

    def scores(self, examples: Sequence[Sentence], predictions: Sequence[list[str]]) -> dict[str, float]:
        """``f1``, ``precision``, ``recall`` of entities (and of each kind) with ``accuracy`` of words, or that alone
        where tags are not spans. Where a predicate is marked, spans of kind V, which are the predicate itself, do not
        count, as in CoNLL-2005's srl-eval."""
        gold = [sentence.gold for sentence in examples]
        result: dict[str, float] = {}
        if self.is_spans and all(sentence.predicate is not None for sentence in examples):
            result = metrics.entity_scores(*[[_without_v(tags) for tags in side] for side in (gold, predictions)])
        elif self.is_spans:
            result = metrics.entity_scores(gold, predictions)
        return result | {"accuracy": metrics.token_accuracy(gold, predictions)}

    def write_predictions(
        self, path: Path, examples: Sequence[Sentence], predictions: Sequence[list[str]]
    ) -> list[Path]:
        """Columns word, gold tag where there is one, predicted tag; a blank line after a sentence."""
        lines = []
        for sentence, tags in zip(examples, predictions):
            columns = [sentence.words, *([sentence.tags] if sentence.tags else []), tags]
            lines += ["\t".join(row) for row in zip(*columns)] + [""]
        return [write_text(path, "\n".join(lines) + "\n")]


class BertTagger(_Tagger):
    """BERT with a class for each token, all layers trained; a word's first piece has its tag.

    Sentences longer than the model are read in overlapping windows; a word's tag is the one of the window with more
    context for it.

    Args:
        model: with as many labels as ``labels``.
        tokenizer: the model's.
        labels: names of tags.
        max_length: pieces of a window, special tokens included; None for the model's limit.
        predicate: how the predicate of a sentence is marked: "none"; "type": its pieces have token type 1; "sep":
            [CLS] sentence [SEP] predicate [SEP] (Shi & Lin 2019).
        is_spans: whether tags are BIO spans, for scores.

    Raises:
        ValueError: a limit the model does not have, a mark that the model cannot make.

    Reference: Devlin et al. 2019, 5.3.
    """

    form = "bert"
    model: BertForTokenClassification

    def __init__(
        self,
        model: BertForTokenClassification,
        tokenizer: BertTokenizer,
        labels: Sequence[str],
        *,
        max_length: int | None = None,
        predicate: str = "none",
        is_spans: bool = True,
    ) -> None:
        super().__init__(labels, is_spans)
        if predicate not in PREDICATES:
            raise ValueError(f"ctxfast.finetune: predicate is {predicate!r}; expected one of {', '.join(PREDICATES)}.")
        if predicate == "type" and tokenizer.single_type:
            raise ValueError(
                "ctxfast.finetune: predicate is 'type', but the model has one token type; expected 'sep' for it."
            )
        limit = model.config.max_length
        if max_length is not None and not 16 <= max_length <= limit:
            raise ValueError(f"ctxfast.finetune: max_length is {max_length}; expected 16 to {limit}, the model's.")
        self.model, self.tokenizer, self.predicate = model, tokenizer, predicate
        self.max_length = max_length or limit
        self._frame = Frame(tokenizer)
        self.options = {"max_length": self.max_length, "predicate": predicate, "is_spans": is_spans}

    def items(self, examples: Sequence[Sentence]) -> list[Row]:
        if self.predicate != "none":
            self._check_predicates(examples)
        rows = []
        for index, (sentence, pieces) in enumerate(
            zip(examples, word_pieces(self.tokenizer, [sentence.words for sentence in examples]))
        ):
            second: list[int] | None = None
            if self.predicate == "sep":
                second = [id for own, is_marked in zip(pieces, sentence.marks) if is_marked for id in own]
                most = self.max_length // _LONGEST_WORD
                self._count("predicates", most, [second])
                second = second[:most]
            room = self._frame.room(self.max_length, second is not None) - len(second or ())
            most = max(room // _LONGEST_WORD, 1)
            self._count("words", most, pieces)
            pieces = [own[:most] for own in pieces]
            for window in windows([len(own) for own in pieces], room):
                rows.append(self._row(sentence, pieces, window, second, index))
        return rows

    def _count(self, what: str, most: int, pieces: Sequence[list[int]]) -> None:
        if count := sum(len(own) > most for own in pieces):
            self.lost[f"{what} of more than {most} tokens, cut"] += count

    def _row(self, sentence: Sentence, pieces: list[list[int]], window: Any, second: Any, index: int) -> Row:
        chosen = range(window.start, window.end)
        row = self._frame.row([id for word in chosen for id in pieces[word]], second)
        row.labels = [IGNORE] * row.length
        places, words = [], []
        place = len(self._frame.before)
        for word in chosen:
            if window.own_start <= word < window.own_end:
                places.append(place)
                words.append(word)
                if sentence.tags is not None:
                    # A tag that does not occur in the training data cannot be learned; it counts as wrong in scores.
                    row.labels[place] = self._numbers.get(sentence.tags[word], IGNORE)
            if self.predicate == "type" and sentence.marks[word]:
                row.types[place : place + len(pieces[word])] = [1] * len(pieces[word])
            place += len(pieces[word])
        row.data = (index, words, places)
        return row

    def collate(self, items: Sequence[Row]) -> dict[str, Any]:
        return collate_rows(items, self.tokenizer.pad_token_id, True)

    def predict(self, examples: Sequence[Sentence], items: Sequence[Any] | None = None) -> list[list[str]]:
        result = [[""] * len(sentence.words) for sentence in examples]
        for chosen, output in self.outputs(self.items(examples) if items is None else items):
            best = output.logits.argmax(-1).tolist()
            for row, own in zip(chosen, best):
                index, words, places = row.data
                for word, place in zip(words, places):
                    result[index][word] = self.labels[own[place]]
        return result

    def save_model(self, directory: Path) -> None:
        self.model.save_pretrained(directory, overwrite=True)
        self.tokenizer.save(directory)


class FeatureTagger(_Tagger):
    """An LSTM head over a frozen BERT or ELMo, an ELMo trained with it, or words alone.

    Args:
        model: a head of ``TaggerBuilder.heads``, or an ``OverElmo`` around one.
        inputs: what the model reads of words.
        labels: names of tags.
        head: the options the head was made with, to make it again.
        is_spans: whether tags are BIO spans, for scores.

    Reference: Peters et al. 2018; Devlin et al. 2019, table 7.
    """

    model: LstmTagger | HighwayTagger | OverElmo

    def __init__(
        self,
        model: LstmTagger | HighwayTagger | OverElmo,
        inputs: WordInputs,
        labels: Sequence[str],
        *,
        head: dict[str, Any],
        is_spans: bool = True,
    ) -> None:
        super().__init__(labels, is_spans)
        self.model, self._words = model, inputs
        self.form = inputs.form
        self.options = {"features": inputs.features, "head": head, "is_spans": is_spans}

    def items(self, examples: Sequence[Sentence]) -> list[WordItem]:
        if self.options["head"].get("marks_predicate"):
            self._check_predicates(examples)
        items = []
        for index, sentence in enumerate(examples):
            labels = None if sentence.tags is None else [self._numbers.get(tag, IGNORE) for tag in sentence.tags]
            items.append(WordItem(sentence.words, labels, sentence.predicate, None, index))
        self._words.keep(items)
        return items

    def collate(self, items: Sequence[WordItem]) -> dict[str, Any]:
        batch = self._words.collate(items)
        if self.options["head"].get("marks_predicate"):
            batch["predicate"] = pad([item.predicate for item in items if item.predicate is not None], 0)
        if all(item.labels is not None for item in items):
            batch["labels"] = pad([item.labels for item in items], IGNORE)
        return batch

    def predict(self, examples: Sequence[Sentence], items: Sequence[Any] | None = None) -> list[list[str]]:
        result: list[list[str]] = [[] for _ in examples]
        for chosen, output in self.outputs(self.items(examples) if items is None else items):
            lengths = self._words.lengths(chosen).to(output.logits.device)
            for item, classes in zip(chosen, self.model.decode(output.logits, lengths)):
                result[item.index] = [self.labels[number] for number in classes]
        return result

    def save_model(self, directory: Path) -> None:
        save_feature_model(self.model, self._words, directory)


class TaggerBuilder(TaskBuilder):
    """Of words."""

    architecture = "ForTokenClassification"
    has_crf = True
    heads = {"lstm": LstmTagger, "highway": HighwayTagger}

    def network(self, model: Any, labels: Sequence[str], **place: Any) -> BertForTokenClassification:
        return BertForTokenClassification.from_pretrained(model, num_labels=list(labels), **place)

    def over_bert(
        self, network: Any, tokenizer: BertTokenizer, labels: Sequence[str], choice: Choice, **options: Any
    ) -> BertTagger:
        return BertTagger(network, tokenizer, labels, **choice.fields("predicate", "is_spans"), **options)

    def head_options(self, choice: Choice) -> dict[str, Any]:
        marks = {"marks_predicate": choice.predicate != "none"}
        return marks if choice.head != "lstm" else {"crf": choice.crf, **marks}

    def head(self, kind: Any, sources: Sources, labels: Sequence[str], **options: Any) -> nn.Module:
        return kind(sources, labels, **options)

    def over_features(
        self, model: Any, inputs: WordInputs, labels: Sequence[str], choice: Choice, head: dict[str, Any]
    ) -> FeatureTagger:
        return FeatureTagger(model, inputs, labels, head=head, is_spans=choice.is_spans)

    def words(self, examples: Sequence[Sentence]) -> Iterable[Sequence[str]]:
        return (sentence.words for sentence in examples)

    def has_classes(self, num_labels: int) -> bool:
        return True

    def foreign_changes(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"is_spans": is_bio(labels)}
