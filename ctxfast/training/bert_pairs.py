# SPDX-License-Identifier: Apache-2.0
"""Sequences for pretraining beside BERT's own pairs: sentence order, single segments, dialogues.

All work on coded ids (see ``spans``) as ``bert_instances.pairs`` does, and draw from the generator they are given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from .bert_instances import Document, Pair, PairOptions, Vocabulary, truncate

KINDS = ("next", "order", "none", "dialogue")


def order_pairs(
    document: Document, vocabulary: Vocabulary, options: PairOptions, draw: random.Random
) -> Iterator[Pair]:
    """Two neighbouring stretches of a document, swapped half of the time (``is_random_next``: they are swapped).

    Reference: ERNIE's demonstration data; Lan et al. 2020 (sentence-order prediction).
    """
    limit = options.max_seq_length - 3
    for chunk in _chunks(document, limit, options, draw):
        if len(chunk) == 1:  # one long sentence: its halves are neighbours, too
            middle = len(chunk[0]) // 2
            chunk = [chunk[0][:middle], chunk[0][middle:]]
        cut = draw.randint(1, len(chunk) - 1)
        first = [token for sentence in chunk[:cut] for token in sentence]
        second = [token for sentence in chunk[cut:] for token in sentence]
        truncate(first, second, limit, draw)
        if not first or not second:
            continue
        is_swapped = draw.random() < 0.5
        if is_swapped:
            first, second = second, first
        ids = [vocabulary.cls_id, *first, vocabulary.sep_id, *second, vocabulary.sep_id]
        yield Pair(ids, len(first) + 2, is_swapped)


def segments(document: Document, vocabulary: Vocabulary, options: PairOptions, draw: random.Random) -> Iterator[Pair]:
    """Stretches of a document as one segment each; what is longer than a sequence is cut off.

    Reference: Liu et al. 2019 (DOC-SENTENCES).
    """
    limit = options.max_seq_length - 2
    for chunk in _chunks(document, limit, options, draw):
        tokens = [token for sentence in chunk for token in sentence][:limit]
        yield Pair([vocabulary.cls_id, *tokens, vocabulary.sep_id], len(tokens) + 2, False)


def _chunks(document: Document, limit: int, options: PairOptions, draw: random.Random) -> Iterator[list[list[int]]]:
    """Sentences one after another until a target length is met, as BERT's pairs are filled."""
    target = draw.randint(2, limit) if draw.random() < options.short_seq_prob else limit
    chunk: list[list[int]] = []
    length = 0
    for place, sentence in enumerate(document):
        chunk.append(sentence)
        length += len(sentence)
        if length >= target or place == len(document) - 1:
            if length > 1:
                yield chunk
            chunk, length = [], 0


def dialogues(
    corpus: Sequence[Document], index: int, vocabulary: Vocabulary, options: PairOptions, draw: random.Random
) -> Iterator[Pair]:
    """Three turns of a dialogue; half of the time one of them comes from another dialogue (``is_random_next``).

    A document is a dialogue, a line a turn; the speakers take turns, so token types, which tell who speaks, alternate
    from a first speaker drawn at random. A lone or last turn that finds no two others is left out.

    Reference: Sun et al. 2019 (ERNIE 1.0), section 3.3 (dialogue language model).
    """
    turns = corpus[index]
    limit = (options.max_seq_length - 4) // 3
    for start in range(0, len(turns) - 2, 2):
        chosen = [turn[:limit] for turn in turns[start : start + 3]]
        is_random_next = draw.random() < 0.5
        if is_random_next:
            other = draw.randrange(len(corpus) - 1)
            strange = corpus[other + (other >= index)]
            chosen[draw.randrange(3)] = strange[draw.randrange(len(strange))][:limit]
        speaker = draw.randrange(2)
        ids, types = [vocabulary.cls_id], [speaker]
        for turn in chosen:
            ids += [*turn, vocabulary.sep_id]
            types += [speaker] * (len(turn) + 1)
            speaker = 1 - speaker
        yield Pair(ids, len(chosen[0]) + 2, is_random_next, types)
