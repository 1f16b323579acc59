# SPDX-License-Identifier: Apache-2.0
"""Sequences for pretraining beside BERT's own pairs: sentence order, single segments, dialogues.

All work on coded ids (see ``spans``) as ``bert_instances.pairs`` does, and draw from the generator they are given.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from .bert_instances import Document, Pair, PairOptions, Vocabulary, truncate
from .knowledge_spans import FLAG_SHIFT, SPEAKER

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
    """Stretches of a document as one segment each. What does not fit begins the next one, so every token is used but a
    lone last one.

    Reference: Liu et al. 2019 (DOC-SENTENCES).
    """
    limit = options.max_seq_length - 2
    target = _target(limit, options, draw)
    held: list[int] = []
    for place, sentence in enumerate(document):
        held += sentence
        start, is_last = 0, place == len(document) - 1
        while len(held) - start >= target or (is_last and len(held) - start > 1):
            tokens = held[start : start + limit]
            start += len(tokens)
            yield Pair([vocabulary.cls_id, *tokens, vocabulary.sep_id], len(tokens) + 2, False)
        held = held[start:]


def _target(limit: int, options: PairOptions, draw: random.Random) -> int:
    """Tokens a document's sequences aim at."""
    return draw.randint(2, limit) if draw.random() < options.short_seq_prob else limit


def _chunks(document: Document, limit: int, options: PairOptions, draw: random.Random) -> Iterator[list[list[int]]]:
    """Sentences one after another until a target length is met, as BERT's pairs are filled."""
    target = _target(limit, options, draw)
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

    A document is a dialogue, a sentence a turn, its first token marked with ``SPEAKER`` where the second of the two
    speakers has it. Token types tell who speaks: 0 for the one with the first of the three turns (query), 1 for the
    other (response): the forms QRQ, QRR, QQR. Three turns of one speaker are left out, and so is a last turn that finds
    no two others.

    Reference: Sun et al. 2019 (ERNIE 1.0), section 3.3 (dialogue language model).
    """
    turns = corpus[index]
    speakers = [turn[0] >> FLAG_SHIFT & SPEAKER for turn in turns]
    limit = (options.max_seq_length - 4) // 3
    for start in range(0, len(turns) - 2, 2):
        roles = [int(speaker != speakers[start]) for speaker in speakers[start : start + 3]]
        if not any(roles):
            continue
        chosen = [turn[:limit] for turn in turns[start : start + 3]]
        is_random_next = draw.random() < 0.5
        if is_random_next:
            other = draw.randrange(len(corpus) - 1)
            strange = corpus[other + (other >= index)]
            chosen[draw.randrange(3)] = strange[draw.randrange(len(strange))][:limit]
        ids, types = [vocabulary.cls_id], [0]
        for turn, role in zip(chosen, roles):
            ids += [*turn, vocabulary.sep_id]
            types += [role] * (len(turn) + 1)
        yield Pair(ids, len(chosen[0]) + 2, is_random_next, types)


def speakers(turns: Sequence[str]) -> tuple[list[str], list[bool]]:
    """What is said in a dialogue's lines, and whether the second speaker says it.

    A line is ``name<TAB>text``; without tabs the speakers take turns.

    Raises:
        ValueError: names on some lines only, more than two of them, or a name with nothing said.
    """
    who = "ctxfast.training.bert_pairs"
    named = [turn.partition("\t") for turn in turns]
    if not any(tab for _, tab, _ in named):
        return list(turns), [place % 2 == 1 for place in range(len(turns))]
    first = named[0][0]
    names = list(dict.fromkeys(name for name, _, _ in named))
    for turn, (_, tab, said) in zip(turns, named):
        if not tab or not said.strip():
            raise ValueError(
                f"{who}: a turn is {turn!r}; expected a speaker, a tab and text, as others of its dialogue."
            )
    if len(names) > 2:
        raise ValueError(f"{who}: a dialogue has the speakers {', '.join(names[:5])}; expected two at most.")
    return [said.strip() for _, _, said in named], [name != first for name, _, _ in named]
