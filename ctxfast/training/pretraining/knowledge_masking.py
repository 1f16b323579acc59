# SPDX-License-Identifier: Apache-2.0
"""Masking of words, phrases and entities as wholes, as ERNIE is pretrained."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .bert_instances import Instance, Pair, Vocabulary, replacement, shuffle
from .knowledge_spans import FLAG_SHIFT, ID_MASK, KINDS

LEVELS = ("token", *KINDS)
COUNTS = ("tokens", "spans", "each")


@dataclass(frozen=True)
class KnowledgeMasking:
    """What is masked together, and how much.

    Args:
        levels: level -> probability that a sequence is masked at it: "token" (single pieces), "word", "phrase",
            "entity". One level with probability 1 is a stage of ERNIE's training; several mix the stages. They need
            not add up to 1: they are weights.
        rate: share that is masked.
        count: what ``rate`` is a share of: "tokens" (BERT: units until so many pieces are masked), "spans" (units
            themselves, at least one), "each" (every unit draws for itself).
        together: a unit's pieces share one draw of [MASK] / kept / random; else each piece draws.
        max_predictions_per_seq: most masked pieces of a sequence; None for no limit.

    Raises:
        ValueError: unknown levels or counts, probabilities out of range.

    Reference: Sun et al. 2019 (ERNIE 1.0), section 3.2.
    """

    levels: Mapping[str, float] = field(default_factory=lambda: {"phrase": 1.0})
    rate: float = 0.15
    count: str = "tokens"
    together: bool = False
    max_predictions_per_seq: int | None = None

    def __post_init__(self) -> None:
        who = "ctxfast.training.KnowledgeMasking"
        unknown = [level for level in self.levels if level not in LEVELS]
        if unknown or not self.levels:
            raise ValueError(f"{who}: levels has {unknown or 'nothing'}; expected some of {', '.join(LEVELS)}.")
        if min(self.levels.values()) < 0 or sum(self.levels.values()) <= 0:
            raise ValueError(f"{who}: levels is {dict(self.levels)}; expected weights of 0 or more, not all 0.")
        if not 0 < self.rate <= 1:
            raise ValueError(f"{who}: rate is {self.rate}; expected above 0, at most 1.")
        if self.count not in COUNTS:
            raise ValueError(f"{who}: count is {self.count!r}; expected one of {', '.join(COUNTS)}.")
        if self.max_predictions_per_seq is not None and self.max_predictions_per_seq < 1:
            raise ValueError(
                f"{who}: max_predictions_per_seq is {self.max_predictions_per_seq}; expected 1 or more, or None."
            )

    def level(self, draw: random.Random) -> str:
        """The level a sequence is masked at."""
        if len(self.levels) == 1:
            return next(iter(self.levels))
        return draw.choices(list(self.levels), list(self.levels.values()))[0]


def units(codes: Sequence[int], vocabulary: Vocabulary, level: str) -> list[list[int]]:
    """Positions that are masked together at a level, [CLS] and [SEP] left out. Codes: ids with flags, see ``spans``."""
    found: list[list[int]] = []
    is_open = False
    for position, code in enumerate(codes):
        if code & ID_MASK in (vocabulary.cls_id, vocabulary.sep_id):
            is_open = False
            continue
        begins = level == "token" or code >> FLAG_SHIFT & KINDS[level]
        # A sequence may be cut inside a unit: what is left of it is a unit.
        if is_open and not begins:
            found[-1].append(position)
        else:
            found.append([position])
        is_open = True
    return found


def mask(pair: Pair, vocabulary: Vocabulary, options: KnowledgeMasking, draw: random.Random) -> Instance:
    """Masks a pair of coded ids (see ``spans``); of a chosen unit all pieces are predicted."""
    original = [code & ID_MASK for code in pair.ids]
    candidates = units(pair.ids, vocabulary, options.level(draw))
    most = len(original) if options.max_predictions_per_seq is None else options.max_predictions_per_seq
    if options.count == "each":
        candidates = [unit for unit in candidates if draw.random() < options.rate]
        quota = most
    shuffle(candidates, draw)
    if options.count == "spans":
        candidates = candidates[: max(1, int(len(candidates) * options.rate))]
        quota = most
    elif options.count == "tokens":
        quota = min(most, max(1, round(len(original) * options.rate)))
    ids, chosen = list(original), []
    for unit in candidates:
        if len(chosen) + len(unit) > quota:
            continue
        shared = replacement(-1, vocabulary, draw) if options.together else None
        for position in unit:
            chosen.append(position)
            if shared is None:
                ids[position] = replacement(original[position], vocabulary, draw)
            elif shared == vocabulary.mask_id:
                ids[position] = shared
            elif shared != -1:  # random: each piece another one
                ids[position] = draw.randint(0, vocabulary.size - 1)
    chosen.sort()
    labels = [original[position] for position in chosen]
    return Instance(ids, pair.first_length, pair.is_random_next, chosen, labels, pair.types)
