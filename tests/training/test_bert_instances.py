# SPDX-License-Identifier: Apache-2.0
"""BERT's pretraining instances: equal to the stated algorithm, instance for instance."""

from __future__ import annotations

import random
import time

import pytest
from oracles import google_bert_data

from ctxfast.training.pretraining.bert_corpus import Recipe
from ctxfast.training.pretraining.bert_instances import Instance, PairOptions, Vocabulary, quota, shuffle, truncate

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40)), *(f"##p{i}" for i in range(15))]
ID = {word: i for i, word in enumerate(WORDS)}
VOCABULARY = Vocabulary(
    len(WORDS), ID["[CLS]"], ID["[SEP]"], ID["[MASK]"], frozenset(i for i, w in enumerate(WORDS) if w[:2] == "##")
)


def instances(documents: list, options: PairOptions, seed: int = 12345) -> list[Instance]:
    return [masked for _, masked in Recipe(options=options).make(documents, VOCABULARY, seed)]


def _documents(seed: int, count: int, longest: int = 9) -> list[list[list[str]]]:
    draw = random.Random(seed)

    def sentence() -> list[str]:
        return [draw.choice(WORDS[5:]) if i else draw.choice(WORDS[5:45]) for i in range(draw.randint(0, 12))]

    return [[sentence() for _ in range(draw.randint(0, longest))] for _ in range(count)]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("seq", "short", "dupe"), [(32, 0.1, 3), (16, 0.9, 2), (128, 0.0, 1), (5, 0.5, 2)])
@pytest.mark.parametrize("seed", [0, 12345])
def test_instance_for_instance_as_stated(seq: int, short: float, dupe: int, whole: bool, seed: int) -> None:
    documents = _documents(seed, 12)
    options = PairOptions(seq, short, dupe, masked_lm_prob=0.2, max_predictions_per_seq=6, do_whole_word_mask=whole)
    made = instances([[[ID[w] for w in s] for s in d] for d in documents], options, seed)
    stated = google_bert_data.create(
        documents, WORDS, seq=seq, short=short, dupe=dupe, prob=0.2, most=6, whole=whole, seed=seed
    )
    assert len(made) == len(stated) > 10
    for mine, (tokens, segments, positions, labels, random_next) in zip(made, stated):
        assert [WORDS[i] for i in mine.ids] == tokens
        assert mine.token_type_ids == segments
        assert mine.positions == positions and [WORDS[i] for i in mine.labels] == labels
        assert mine.is_random_next == random_next


def test_shape_of_the_instances() -> None:
    documents = [[[ID[w] for w in s] for s in d] for d in _documents(3, 40)]
    options = PairOptions(max_seq_length=32, dupe_factor=5, do_whole_word_mask=True)
    made = instances(documents, options)
    masked = kept = other = 0
    for one in made:
        assert isinstance(one, Instance) and len(one.ids) <= 32
        marks = [i for i, token in enumerate(one.ids) if token in (VOCABULARY.cls_id, VOCABULARY.sep_id)]
        assert {0, one.first_length - 1, len(one.ids) - 1} <= set(marks)
        assert 1 <= len(one.positions) <= quota(len(one.ids), options) or not one.positions
        assert one.positions == sorted(set(one.positions))
        for position, label in zip(one.positions, one.labels):
            masked += one.ids[position] == VOCABULARY.mask_id
            kept += one.ids[position] == label
            other += one.ids[position] not in (label, VOCABULARY.mask_id)
    total = masked + kept + other
    assert abs(masked / total - 0.8) < 0.03 and abs(kept / total - 0.1) < 0.03 and abs(other / total - 0.1) < 0.03
    assert 0.35 < sum(one.is_random_next for one in made) / len(made) < 0.75


def test_a_line_may_be_a_book() -> None:
    first, second, start = list(range(300_000)), [1, 2, 3], time.process_time()
    truncate(first, second, 100, random.Random(0))
    assert first == list(range(first[0], first[0] + 97)) and second == [1, 2, 3]
    assert 149_000 < first[0] < 151_000  # from either end alike
    assert time.process_time() - start < 1.2  # 2.5 s where every token is taken out of the list


@pytest.mark.parametrize("size", [0, 1, 2, 3, 31, 32, 33, 1000])
def test_shuffle_is_pythons_own(size: int) -> None:
    mine, own, items, others = random.Random(size), random.Random(size), list(range(size)), list(range(size))
    shuffle(items, mine)
    own.shuffle(others)
    assert items == others and mine.getstate() == own.getstate()


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="1 documents with text; expected at least 2"):
        instances([[[1, 2]], [], [[]]], PairOptions())
    for name, value, wanted in (
        ("max_seq_length", 4, "5 or more"),
        ("masked_lm_prob", 1.5, "0.0 to 1.0"),
        ("dupe_factor", 0, "1 or more"),
    ):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected {wanted}"):
            PairOptions(**{name: value})
