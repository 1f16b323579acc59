# SPDX-License-Identifier: Apache-2.0
"""The answer to a question as a span of a text, or none: SQuAD 1.1 and 2.0."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.bert.heads import BertForQuestionAnswering
from ...models.bert.tokenization import BertTokenizer
from ...models.heads.bidaf import BiDaf
from ...models.lstm_heads import LstmSpanFinder
from ...models.token_vectors import Sources
from ..readers.squad import Question
from . import metrics
from .bert_inputs import Frame, Row, collate_rows, encoded, unlimited, usual_length
from .builder import Choice, TaskBuilder
from .features import WordInputs, WordItem, save_feature_model, split_words
from .predictor import Predictor, write_text

# Weight of a window's length in choosing the window with most context for a token, as in Google's code.
_LENGTH_SHARE = 0.01
_USUAL_LENGTH = 384
_SURE = 1e9
_DECIDING = ("max_answer", "n_best", "null_threshold")  # fields of Choice by which an answer is chosen


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """A candidate answer, its score (start logit + end logit) and its share of the softmax over the candidates."""

    text: str
    score: float
    probability: float = 0.0


@dataclass(slots=True)
class Finding:
    """What was found for a question.

    Attributes:
        id: the question's.
        spans: the best spans, the best first; none if no span fits.
        null_score: score of "no answer": the lowest over the windows.
        answer: the best span, or "" if no answer is likelier.
    """

    id: str
    spans: list[ScoredAnswer]
    null_score: float
    answer: str = ""

    @property
    def null_odds(self) -> float:
        """How much likelier no answer is than the best span: the difference of scores."""
        return self.null_score - self.spans[0].score if self.spans else math.inf


@dataclass(slots=True)
class _Window:
    """Where a window stands: its example, the first of its tokens among the text's and in the row, and where each token
    of the text stands among its characters."""

    example: int
    start: int
    size: int
    place: int
    offsets: list[tuple[int, int]]


@dataclass(slots=True)
class _Candidates:
    spans: list[tuple[float, int, int]] = field(default_factory=list)
    null_score: float = math.inf


class _SpanFinder(Predictor):
    """What both kinds share: from logits of starts and ends to answers. Predictions are ``Finding``.

    Args:
        max_answer: tokens of an answer.
        n_best: candidates for each window and for each question.
        null_threshold: no answer is predicted where its score exceeds the best span's by more than this; None: never
            (SQuAD 1.1).
    """

    task = "span"

    def __init__(self, max_answer: int, n_best: int, null_threshold: float | None) -> None:
        self.max_answer, self.n_best, self.null_threshold = max_answer, n_best, null_threshold
        self.options = {"max_answer": max_answer, "n_best": n_best, "null_threshold": null_threshold}

    @property
    def main_figure(self) -> str:
        return "f1"

    def predict(self, examples: Sequence[Question], items: Sequence[Any] | None = None) -> list[Finding]:
        rows = self.items(examples) if items is None else items
        by_example: list[list[_Window]] = [[] for _ in examples]
        for row in rows:
            by_example[row.data.example].append(row.data)
        found = [_Candidates() for _ in examples]
        for chosen, output in self.outputs(rows):
            starts, ends = output.start_logits.float().cpu(), output.end_logits.float().cpu()
            for k, row in enumerate(chosen):
                own = found[row.data.example]
                self._collect(own, row.data, by_example[row.data.example], starts[k], ends[k])
        return [
            self._finding(example, own, windows[0].offsets)
            for example, own, windows in zip(examples, found, by_example)
        ]

    def _count(self, example: Question, target: tuple[int, int] | None, is_held: bool) -> None:
        """What is said of an answer that cannot be learned, or not be found."""
        if target is not None and is_held and target[1] - target[0] >= self.max_answer:
            self.lost[f"answers of more than {self.max_answer} tokens, never found (--max-answer)"] += 1
        elif example.answers and not is_held:
            self.lost["answers that no window holds whole, learned as no answer (--max-length, --doc-stride)"] += 1

    def _collect(
        self, found: _Candidates, window: _Window, others: Sequence[_Window], start: Tensor, end: Tensor
    ) -> None:
        """Add the spans of a window: of the best starts and ends those that stand in the text, in order, not too long,
        and whose start has more context here than in any other window."""
        found.null_score = min(found.null_score, float(start[0] + end[0]))
        inside = slice(window.place, window.place + window.size)
        count = min(self.n_best, window.size)
        firsts, lasts = start[inside].topk(count), end[inside].topk(count)
        for score, first in zip(firsts.values.tolist(), firsts.indices.tolist()):
            if not _has_most_context(window, others, window.start + first):
                continue
            for more, last in zip(lasts.values.tolist(), lasts.indices.tolist()):
                if first <= last < first + self.max_answer:
                    found.spans.append((score + more, window.start + first, window.start + last))

    def _finding(self, example: Question, own: _Candidates, offsets: list[tuple[int, int]]) -> Finding:
        spans: dict[str, float] = {}
        for score, first, last in sorted(own.spans, key=lambda span: (-span[0], span[1], span[2])):
            # Some tokenizers count the space before a word in.
            end = _after_marks(example.context, offsets[last][1])
            text = example.context[offsets[first][0] : end].strip()
            if text and text not in spans:
                spans[text] = score
            if len(spans) == self.n_best:
                break
        top = max(spans.values(), default=0.0)
        weights = [math.exp(score - top) for score in spans.values()]
        kept = [ScoredAnswer(text, score, w / sum(weights)) for (text, score), w in zip(spans.items(), weights)]
        finding = Finding(example.id, kept, own.null_score)
        is_null = self.null_threshold is not None and finding.null_odds > self.null_threshold
        finding.answer = kept[0].text if kept and not is_null else ""
        return finding

    def scores(self, examples: Sequence[Question], predictions: Sequence[Finding]) -> dict[str, float]:
        """SQuAD's ``f1`` and ``exact``, and parts: see ``metrics.squad_scores``; where some questions have no answer,
        also those of the best threshold: see ``metrics.squad_best_scores``."""
        gold = {example.id: [answer.text for answer in example.answers] for example in examples}
        result = metrics.squad_scores(gold, {one.id: one.answer for one in predictions})
        result = {"f1": result.pop("f1"), **result}
        if "no_answer_accuracy" in result:
            # Without any span, "no answer" is sure; a number, as JSON has no infinity.
            odds = {one.id: one.null_odds if one.spans else _SURE for one in predictions}
            best = {one.id: one.spans[0].text if one.spans else "" for one in predictions}
            result |= metrics.squad_best_scores(gold, best, odds)
        return result

    def write_predictions(self, path: Path, examples: Sequence[Question], predictions: Sequence[Finding]) -> list[Path]:
        """SQuAD's predictions.json (id -> answer), and beside it NAME-nbest.json and NAME-null-odds.json."""
        nbest = {
            one.id: [
                {"text": span.text, "score": round(span.score, 6), "probability": round(span.probability, 6)}
                for span in one.spans
            ]
            for one in predictions
        }
        odds = {one.id: round(one.null_odds, 6) if one.spans else None for one in predictions}
        parts = {
            path: {one.id: one.answer for one in predictions},
            path.with_name(f"{path.stem}-nbest.json"): nbest,
            path.with_name(f"{path.stem}-null-odds.json"): odds,
        }
        return [
            write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
            for file, content in parts.items()
        ]


class BertSpanFinder(_SpanFinder):
    """BERT with a start and an end for the answer, [CLS] question [SEP] window of the text [SEP].

    A text longer than the model is read in windows; windows in which no answer stands have it at [CLS].

    Args:
        model, tokenizer: BERT and its tokenizer.
        max_length: tokens of a window, special tokens and question included; None for 384, or the model's limit if that
            is lower.
        doc_stride: tokens from one window to the next.
        max_query: tokens of a question; the rest is cut.
        max_answer, n_best, null_threshold: as ``_SpanFinder`` says: how answers are chosen.

    Raises:
        ValueError: a length the model does not have, a stride larger than a window.

    Reference: Devlin et al. 2019, 4.2 and 4.3.
    """

    form = "bert"
    model: BertForQuestionAnswering

    def __init__(
        self,
        model: BertForQuestionAnswering,
        tokenizer: BertTokenizer,
        *,
        max_length: int | None = None,
        doc_stride: int = 128,
        max_query: int = 64,
        max_answer: int = 30,
        n_best: int = 20,
        null_threshold: float | None = 0.0,
    ) -> None:
        super().__init__(max_answer, n_best, null_threshold)
        self.model, self.tokenizer = model, tokenizer
        self.max_length = usual_length(max_length, _USUAL_LENGTH, model.config.max_length, tokenizer)
        self._frame = Frame(tokenizer)
        room = self._frame.room(self.max_length, True) - max_query
        if room < 1 or not 1 <= doc_stride <= room:
            raise ValueError(
                f"ctxfast.finetune: doc_stride is {doc_stride}, max_query {max_query}, max_length {self.max_length}; "
                f"expected a stride of 1 to {max(room, 1)}, the tokens that a question leaves."
            )
        self.doc_stride, self.max_query = doc_stride, max_query
        self.options |= {"max_length": self.max_length, "doc_stride": doc_stride, "max_query": max_query}

    def items(self, examples: Sequence[Question]) -> list[Row]:
        tokenizer = unlimited(self.tokenizer)
        contexts: dict[str, Any] = {}
        new = list(dict.fromkeys(example.context for example in examples))
        for text, encoding in zip(new, encoded(tokenizer.encode_batch, new)):
            contexts[text] = self._bare(encoding)
        questions = encoded(tokenizer.encode_batch, [example.question for example in examples])
        rows = []
        for index, (example, encoding) in enumerate(zip(examples, questions)):
            ids, offsets = contexts[example.context]
            question = self._bare(encoding)[0]
            if len(question) > self.max_query:
                self.lost[f"questions of more than {self.max_query} tokens, cut (--max-query)"] += 1
                question = question[: self.max_query]
            target = _token_span(offsets, example)
            room = self._frame.room(self.max_length, True) - len(question)
            start, is_held = 0, False
            while True:
                size = min(room, len(ids) - start)
                row = self._frame.row(question, ids[start : start + size])
                place = len(self._frame.before) + len(question) + len(self._frame.between)
                row.labels = (0, 0)
                if target is not None and start <= target[0] and target[1] < start + size:
                    row.labels = (target[0] - start + place, target[1] - start + place)
                    is_held = True
                row.data = _Window(index, start, size, place, offsets)
                rows.append(row)
                if start + size >= len(ids):
                    break
                start += min(size, self.doc_stride)
            self._count(example, target, is_held)
        return rows

    def _bare(self, encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets without the special tokens around."""
        first, last = len(self._frame.before), len(encoding) - len(self._frame.after)
        return encoding.ids[first:last], encoding.offsets[first:last]

    def collate(self, items: Sequence[Row]) -> dict[str, Any]:
        batch = collate_rows(items, self.tokenizer.pad_token_id, False)
        for k, name in enumerate(("start_positions", "end_positions")):
            batch[name] = torch.tensor([row.labels[k] for row in items])
        return batch

    def save_model(self, directory: Path) -> None:
        self.model.save_pretrained(directory, overwrite=True)
        self.tokenizer.save(directory)


class FeatureSpanFinder(_SpanFinder):
    """A head with attention over a frozen BERT or ELMo, an ELMo trained with it, or words alone; texts are read whole.

    Words are runs of letters and digits, and all other characters one by one, Chinese and Japanese ones included.

    Args:
        model: a head of ``SpanFinderBuilder.heads``, or an ``OverElmo`` around one.
        inputs: what the model reads of words.
        head: the options the head was made with, to make it again.
        max_answer, n_best, null_threshold: how answers are chosen; an answer is counted in words.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        inputs: WordInputs,
        *,
        head: dict[str, Any],
        max_answer: int = 30,
        n_best: int = 20,
        null_threshold: float | None = 0.0,
    ) -> None:
        super().__init__(max_answer, n_best, null_threshold)
        self.model, self._words = model, inputs
        self.form = inputs.form
        self.options |= {"features": inputs.features, "head": head}

    def items(self, examples: Sequence[Question]) -> list[_Asked]:
        contexts: dict[str, tuple[WordItem, list[tuple[int, int]]]] = {}
        items = []
        for index, example in enumerate(examples):
            if example.context not in contexts:
                found = split_words(example.context, at_signs=True)
                contexts[example.context] = WordItem([word for word, _ in found]), [place for _, place in found]
            context, offsets = contexts[example.context]
            question = WordItem([word for word, _ in split_words(example.question, at_signs=True)])
            target = _token_span(offsets, example)
            self._count(example, target, target is not None)
            # Column 0 stands for no answer.
            labels = (0, 0) if target is None else (target[0] + 1, target[1] + 1)
            items.append(_Asked(context, question, labels, _Window(index, 0, len(offsets), 1, offsets)))
        self._words.keep([*(context for context, _ in contexts.values()), *(item.question for item in items)])
        return items

    def collate(self, items: Sequence[_Asked]) -> dict[str, Any]:
        batch = self._words.collate([*(item.context for item in items), *(item.question for item in items)])
        for k, name in enumerate(("start_positions", "end_positions")):
            batch[name] = torch.tensor([item.labels[k] for item in items])
        return batch

    def save_model(self, directory: Path) -> None:
        save_feature_model(self.model, self._words, directory)


@dataclass(slots=True)
class _Asked:
    context: WordItem
    question: WordItem
    labels: tuple[int, int]
    data: _Window

    @property
    def length(self) -> int:
        return self.context.length


def _after_marks(text: str, end: int) -> int:
    """Behind the combining marks at ``end``: they belong to the letter before, but a tokenizer that strips accents ends
    its token there."""
    while end < len(text) and unicodedata.category(text[end]).startswith("M"):
        end += 1
    return end


def _token_span(offsets: Sequence[tuple[int, int]], example: Question) -> tuple[int, int] | None:
    """First and last token of the first answer; None without one, or if no token touches it."""
    if not example.answers:
        return None
    begin = example.answers[0].start
    end = begin + len(example.answers[0].text)
    touched = [k for k, (first, last) in enumerate(offsets) if first < end and last > begin]
    return (touched[0], touched[-1]) if touched else None


def _has_most_context(window: _Window, windows: Sequence[_Window], token: int) -> bool:
    """Whether this window gives a token more context on its shorter side than any other; the first of equals."""
    best, chosen = -1.0, None
    for other in windows:
        if other.start <= token < other.start + other.size:
            left, right = token - other.start, other.start + other.size - 1 - token
            score = min(left, right) + _LENGTH_SHARE * other.size
            if score > best:
                best, chosen = score, other
    return chosen is window


class SpanFinderBuilder(TaskBuilder):
    """Of answers."""

    architecture = "ForQuestionAnswering"
    heads = {"lstm": LstmSpanFinder, "bidaf": BiDaf}

    def network(self, model: Any, labels: Sequence[str], **place: Any) -> BertForQuestionAnswering:
        return BertForQuestionAnswering.from_pretrained(model, **place)

    def over_bert(
        self, network: Any, tokenizer: BertTokenizer, labels: Sequence[str], choice: Choice, **options: Any
    ) -> BertSpanFinder:
        return BertSpanFinder(network, tokenizer, **choice.fields("doc_stride", "max_query", *_DECIDING), **options)

    def head(self, kind: Any, sources: Sources, labels: Sequence[str], **options: Any) -> nn.Module:
        return kind(sources, **options)

    def over_features(
        self, model: Any, inputs: WordInputs, labels: Sequence[str], choice: Choice, head: dict[str, Any]
    ) -> FeatureSpanFinder:
        return FeatureSpanFinder(model, inputs, head=head, **choice.fields(*_DECIDING))

    def words(self, examples: Sequence[Question]) -> Iterable[Sequence[str]]:
        """Each context once, whatever the number of its questions."""
        contexts = dict.fromkeys(example.context for example in examples)
        for text in (*contexts, *(example.question for example in examples)):
            yield [word for word, _ in split_words(text, at_signs=True)]

    def has_classes(self, num_labels: int) -> bool:
        return False

    def foreign_changes(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"null_threshold": None}  # SQuAD 1.1's way
