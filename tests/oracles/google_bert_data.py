# SPDX-License-Identifier: Apache-2.0
"""The stated algorithm of BERT's pretraining data, written down a second time, on strings and in one piece."""

from __future__ import annotations

import random


def create(documents, vocab_words, *, seq, short, dupe, prob, most, whole, seed):
    """Rows (tokens, segments, random next?, positions, labels) of documents that are lists of lists of strings."""
    rng = random.Random(seed)
    docs = [[s for s in d if s] for d in documents]
    docs = [d for d in docs if d]
    rng.shuffle(docs)
    rows = []
    for _ in range(dupe):
        for number, doc in enumerate(docs):
            room = seq - 3
            goal = room
            if rng.random() < short:
                goal = rng.randint(2, room)
            pile, have, i = [], 0, 0
            while i < len(doc):
                pile.append(doc[i])
                have += len(doc[i])
                if i == len(doc) - 1 or have >= goal:
                    a_end = 1
                    if len(pile) >= 2:
                        a_end = rng.randint(1, len(pile) - 1)
                    a, b = sum(pile[:a_end], []), []
                    random_next = False
                    if len(pile) == 1 or rng.random() < 0.5:
                        random_next = True
                        need = goal - len(a)
                        for _attempt in range(10):
                            other = rng.randint(0, len(docs) - 1)
                            if other != number:
                                break
                        begin = rng.randint(0, len(docs[other]) - 1)
                        for j in range(begin, len(docs[other])):
                            b = b + docs[other][j]
                            if len(b) >= need:
                                break
                        i -= len(pile) - a_end
                    else:
                        b = sum(pile[a_end:], [])
                    while len(a) + len(b) > room:
                        if len(a) > len(b):
                            a = a[1:] if rng.random() < 0.5 else a[:-1]
                        else:
                            b = b[1:] if rng.random() < 0.5 else b[:-1]
                    tokens = ["[CLS]", *a, "[SEP]", *b, "[SEP]"]
                    segments = [0] * (len(a) + 2) + [1] * (len(b) + 1)
                    rows.append((*_mask(tokens, vocab_words, rng, prob, most, whole, segments), random_next))
                    pile, have = [], 0
                i += 1
    rng.shuffle(rows)
    return rows


def _mask(tokens, vocab_words, rng, prob, most, whole, segments):
    groups = []
    for i, token in enumerate(tokens):
        if token in ("[CLS]", "[SEP]"):
            continue
        if whole and groups and token.startswith("##"):
            groups[-1] += [i]
        else:
            groups += [[i]]
    rng.shuffle(groups)
    out, goal, done = list(tokens), min(most, max(1, int(round(len(tokens) * prob)))), []
    for group in groups:
        if len(done) >= goal:
            break
        if len(done) + len(group) <= goal:
            for i in group:
                if rng.random() < 0.8:
                    out[i] = "[MASK]"
                elif rng.random() >= 0.5:
                    out[i] = vocab_words[rng.randint(0, len(vocab_words) - 1)]
                done.append((i, tokens[i]))
    done.sort()
    return out, segments, [i for i, _ in done], [word for _, word in done]
