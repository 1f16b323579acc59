# SPDX-License-Identifier: Apache-2.0
"""Rows of token ids for BERT-family models: words and pieces between special tokens, and windows over long texts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...models.bert.tokenization import BertTokenizer, Encoding
from .predictor import IGNORE, pad

# Encodings hold far more than ids (some 150 bytes a token), so only so many exist at a time.
_ENCODED_TEXTS = 2048


@dataclass(slots=True)
class Row:
    """Token ids and types of one input; ``labels`` as its task has them; ``data`` is the task's own."""

    ids: list[int]
    types: list[int]
    labels: Any = None
    data: Any = None

    @property
    def length(self) -> int:
        return len(self.ids)


class Frame:
    """The special tokens of a model around one text or two: [CLS] a [SEP], [CLS] a [SEP] b [SEP], or RoBERTa's."""

    def __init__(self, tokenizer: BertTokenizer) -> None:
        one, two = tokenizer.encode("a"), tokenizer.encode("a", "a")
        place = one.special_tokens_mask.index(0)
        last = len(one) - 1 - one.special_tokens_mask[::-1].index(0)
        self.before, self.after = one.ids[:place], one.ids[last + 1 :]
        text = one.ids[place : last + 1]
        middle = len(self.before) + len(text)
        self.between = two.ids[middle : len(two) - len(text) - len(self.after)]
        self.second_type = 0 if tokenizer.single_type else 1

    def room(self, length: int, with_second: bool = False) -> int:
        """Tokens left of ``length`` for texts."""
        own = len(self.before) + len(self.after) + (len(self.between) if with_second else 0)
        return length - own

    def row(self, first: Sequence[int], second: Sequence[int] | None = None) -> Row:
        """Ids of the texts with special tokens around; those after a text have its type."""
        if second is None:
            ids = [*self.before, *first, *self.after]
            return Row(ids, [0] * len(ids))
        head = [*self.before, *first, *self.between]
        tail = [*second, *self.after]
        # Of RoBERTa's </s></s> both count as type 0, as it has one type only.
        return Row(head + tail, [0] * len(head) + [self.second_type] * len(tail))


def usual_length(asked: int | None, usual: int, limit: int, tokenizer: BertTokenizer) -> int:
    """The tokens asked for, or else the usual number as far as the model goes.

    Raises:
        ValueError: more than the model's limit, or no more than a pair's special tokens.
    """
    least = tokenizer.backend.num_special_tokens_to_add(True) + 1
    if asked is not None and not least <= asked <= limit:
        raise ValueError(f"ctxfast.finetune: max_length is {asked}; expected {least} to {limit}, the model's limit.")
    return min(usual, limit) if asked is None else asked


def unlimited(tokenizer: BertTokenizer) -> BertTokenizer:
    """The tokenizer without a limit on length: texts are cut into windows after it."""
    result = copy.copy(tokenizer)
    result.max_length = None
    return result


def encoded(encode: Callable[..., list[Encoding]], texts: Sequence[Any], **options: Any) -> Iterator[Encoding]:
    """``encode`` (``encode_batch``, ``encode_words_batch``) of many texts, in constant memory."""
    for start in range(0, len(texts), _ENCODED_TEXTS):
        yield from encode(texts[start : start + _ENCODED_TEXTS], **options)


def word_pieces(tokenizer: BertTokenizer, sentences: Sequence[Sequence[str]]) -> Iterator[list[list[int]]]:
    """Ids of the pieces of every word, at least one: a word that leaves none (a control character) is unknown."""
    for words, encoding in zip(sentences, encoded(unlimited(tokenizer).encode_words_batch, sentences)):
        pieces: list[list[int]] = [[] for _ in words]
        for word, id in zip(encoding.word_ids, encoding.ids):
            if word is not None:
                pieces[word].append(id)
        yield [own or [tokenizer.unk_token_id] for own in pieces]


@dataclass(frozen=True, slots=True)
class Window:
    """Words start..end of a sentence; those in own_start..own_end are judged in this window, with most context."""

    start: int
    end: int
    own_start: int
    own_end: int


def windows(sizes: Sequence[int], room: int) -> list[Window]:
    """Words of these sizes in windows of at most ``room`` pieces that overlap by about half.

    Every word is owned by one window; a single one if everything fits. ``room`` is at least the largest size.
    """
    if sum(sizes) <= room:
        return [Window(0, len(sizes), 0, len(sizes))]
    spans: list[tuple[int, int]] = []
    start = 0
    while True:
        end, total = start, 0
        while end < len(sizes) and total + sizes[end] <= room:
            total += sizes[end]
            end += 1
        spans.append((start, end))
        if end == len(sizes):
            break
        skipped = 0
        step = start
        while step < end - 1 and skipped + sizes[step] <= room // 2:
            skipped += sizes[step]
            step += 1
        start = max(step, start + 1)
    # Two windows part their overlap in the middle.
    cuts = [0, *((start + end) // 2 for (_, end), (start, _) in zip(spans, spans[1:])), len(sizes)]
    return [Window(*span, own, until) for span, own, until in zip(spans, cuts, cuts[1:])]


def collate_rows(rows: Sequence[Row], pad_id: int, with_labels: bool) -> dict[str, Any]:
    """``input_ids``, ``token_type_ids``, ``lengths`` (of a mask a GPU's host would have to read them back), and
    ``labels`` (B, L) of tokens if asked for."""
    batch: dict[str, Any] = {
        "input_ids": pad([row.ids for row in rows], pad_id),
        "token_type_ids": pad([row.types for row in rows], 0),
        "lengths": tuple(row.length for row in rows),
    }
    if with_labels:
        batch["labels"] = pad([row.labels for row in rows], IGNORE)
    return batch
