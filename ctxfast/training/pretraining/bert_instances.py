# SPDX-License-Identifier: Apache-2.0
"""BERT's pretraining instances: sentence pairs with masked words, made from documents as Google's
create_pretraining_data makes them.

Every random number comes from one ``random.Random``, in the order of the original; ``bert_corpus.Recipe`` uses them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Document = list[list[int]]  # sentences of token ids

MASKED, KEPT = 0.8, 0.5  # of chosen tokens become [MASK]; of the rest stay as they are; the others become any token
_TRIES_FOR_ANOTHER_DOCUMENT = 10


@dataclass(frozen=True)
class Vocabulary:
    """What instances need to know of a vocabulary.

    Args:
        size: number of ids; random replacements are drawn from all of them, special ones too, as in the original.
        cls_id, sep_id, mask_id: ids of [CLS], [SEP] and [MASK].
        continues: ids of pieces that continue a word (``##...``).
    """

    size: int
    cls_id: int
    sep_id: int
    mask_id: int
    continues: frozenset[int]


@dataclass(frozen=True)
class PairOptions:
    """How pairs are made. Defaults are Google's.

    Args:
        max_seq_length: tokens of an instance at most, [CLS] and two [SEP] included.
        short_seq_prob: share of documents' passes whose pairs aim at a shorter length, drawn from 2 up.
        dupe_factor: passes over the corpus, each with other pairs and masks.
        masked_lm_prob: share of tokens that are predicted.
        max_predictions_per_seq: most of them in an instance.
        do_whole_word_mask: pieces of a word are chosen together.

    Raises:
        ValueError: values that leave nothing to make.
    """

    max_seq_length: int = 128
    short_seq_prob: float = 0.1
    dupe_factor: int = 10
    masked_lm_prob: float = 0.15
    max_predictions_per_seq: int = 20
    do_whole_word_mask: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_seq_length", 5, None),
            ("short_seq_prob", 0.0, 1.0),
            ("dupe_factor", 1, None),
            ("masked_lm_prob", 0.0, 1.0),
            ("max_predictions_per_seq", 1, None),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and not value <= high):
                wanted = f"{low} or more" if high is None else f"{low} to {high}"
                raise ValueError(f"ctxfast.training: {name} is {value}; expected {wanted}.")


@dataclass(frozen=True)
class Pair:
    """A sequence before masking.

    Attributes:
        ids: with [CLS] and [SEP].
        first_length: of [CLS] A [SEP]; the rest is B [SEP].
        is_random_next: the label: a segment is not what the text had there.
        types: token types; None: 0 for the first segment, 1 for the second.
    """

    ids: list[int]
    first_length: int
    is_random_next: bool
    types: list[int] | None = None

    @property
    def token_type_ids(self) -> list[int]:
        """0 for [CLS] A [SEP], 1 for B [SEP], unless ``types`` says otherwise."""
        return self.types or [0] * self.first_length + [1] * (len(self.ids) - self.first_length)


@dataclass(frozen=True)
class Instance:
    """A pair with its masked words: ``ids[positions[k]]`` was ``labels[k]``. Positions rise."""

    ids: list[int]
    first_length: int
    is_random_next: bool
    positions: list[int]
    labels: list[int]
    types: list[int] | None = None

    @property
    def token_type_ids(self) -> list[int]:
        """As the pair's."""
        return self.types or [0] * self.first_length + [1] * (len(self.ids) - self.first_length)


def pairs(
    corpus: Sequence[Document], index: int, vocabulary: Vocabulary, options: PairOptions, draw: random.Random
) -> Iterator[Pair]:
    """The pairs of one document, in order. Masks drawn from ``draw`` between them keep the original's order."""
    document = corpus[index]
    limit = options.max_seq_length - 3
    # Mostly whole sequences: shorter ones now and then, so that fine-tuning finds them familiar.
    target = draw.randint(2, limit) if draw.random() < options.short_seq_prob else limit
    chunk: list[list[int]] = []
    length = at = 0
    while at < len(document):
        chunk.append(document[at])
        length += len(document[at])
        if at == len(document) - 1 or length >= target:
            cut = draw.randint(1, len(chunk) - 1) if len(chunk) >= 2 else 1
            first = [token for sentence in chunk[:cut] for token in sentence]
            is_random_next = len(chunk) == 1 or draw.random() < 0.5
            if is_random_next:
                second = _from_elsewhere(corpus, index, target - len(first), draw)
                at -= len(chunk) - cut  # unused sentences are used again
            else:
                second = [token for sentence in chunk[cut:] for token in sentence]
            truncate(first, second, limit, draw)
            ids = [vocabulary.cls_id, *first, vocabulary.sep_id, *second, vocabulary.sep_id]
            yield Pair(ids, len(first) + 2, is_random_next)
            chunk, length = [], 0
        at += 1


def _from_elsewhere(corpus: Sequence[Document], index: int, wanted: int, draw: random.Random) -> list[int]:
    """Sentences from a random place of another document, until there are ``wanted`` tokens."""
    for _ in range(_TRIES_FOR_ANOTHER_DOCUMENT):
        other = draw.randint(0, len(corpus) - 1)
        if other != index:
            break
    start = draw.randint(0, len(corpus[other]) - 1)
    tokens: list[int] = []
    for sentence in corpus[other][start:]:
        tokens.extend(sentence)
        if len(tokens) >= wanted:
            break
    return tokens


def truncate(first: list[int], second: list[int], limit: int, draw: random.Random) -> None:
    """Shorten the longer of the two, a token at a time, from either end."""
    # Counted first and cut once: a line may be a book.
    sizes, heads = [len(first), len(second)], [0, 0]
    while sizes[0] + sizes[1] > limit:
        longer = 0 if sizes[0] > sizes[1] else 1
        sizes[longer] -= 1
        if draw.random() < 0.5:
            heads[longer] += 1
    for tokens, size, head in zip((first, second), sizes, heads):
        tokens[:] = tokens[head : head + size]


def words(ids: Sequence[int], vocabulary: Vocabulary, is_whole: bool) -> list[list[int]]:
    """Positions that may be masked, [CLS] and [SEP] left out; pieces of one word together if ``is_whole``."""
    marks = (vocabulary.cls_id, vocabulary.sep_id)
    if not is_whole:
        return [[position] for position, token in enumerate(ids) if token not in marks]
    found: list[list[int]] = []
    for position, token in enumerate(ids):
        if token in marks:
            continue
        if found and token in vocabulary.continues:
            found[-1].append(position)
        else:
            found.append([position])
    return found


def quota(tokens: int, options: PairOptions) -> int:
    """How many tokens of a sequence are predicted at most."""
    return min(options.max_predictions_per_seq, max(1, int(round(tokens * options.masked_lm_prob))))


def shuffle(items: list[Any], draw: random.Random) -> None:
    """``draw.shuffle(items)``, draw for draw, without its calls of Python functions: half of masking's time."""
    bits = draw.getrandbits
    for last in range(len(items) - 1, 0, -1):
        size = last + 1
        width = size.bit_length()
        other = bits(width)
        while other >= size:
            other = bits(width)
        items[last], items[other] = items[other], items[last]


def mask(pair: Pair, vocabulary: Vocabulary, options: PairOptions, draw: random.Random) -> Instance:
    """Masks a pair: words in random order until the quota is met; a word that would exceed it is skipped.

    Each piece of a chosen word is drawn independently: 80 % become [MASK], 10 % stay, 10 % become a random token.
    """
    units = words(pair.ids, vocabulary, options.do_whole_word_mask)
    shuffle(units, draw)
    ids, most = list(pair.ids), quota(len(pair.ids), options)
    chosen: list[int] = []
    for unit in units:
        if len(chosen) >= most:
            break
        if len(chosen) + len(unit) > most:
            continue
        for position in unit:
            chosen.append(position)
            ids[position] = replacement(ids[position], vocabulary, draw)
    chosen.sort()
    labels = [pair.ids[position] for position in chosen]
    return Instance(ids, pair.first_length, pair.is_random_next, chosen, labels, pair.types)


def replacement(token: int, vocabulary: Vocabulary, draw: random.Random) -> int:
    """What stands in place of a chosen token."""
    if draw.random() < MASKED:
        return vocabulary.mask_id
    return token if draw.random() < KEPT else draw.randint(0, vocabulary.size - 1)
