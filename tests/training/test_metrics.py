# SPDX-License-Identifier: Apache-2.0
"""Figures against values that other programs give (seqeval 1.2.2, scikit-learn 1.9.1, SQuAD's scripts)."""

from __future__ import annotations

import random

import pytest

from ctxfast.training.tasks import metrics


def test_entities_of_ill_formed_tags_as_seqeval() -> None:
    """Random tags, most of them ill-formed; figures by seqeval 1.2.2 (default mode)."""
    draw = random.Random(0)
    tags = ["O", "B-a", "I-a", "B-b", "I-b"]
    gold = [[draw.choice(tags) for _ in range(20)] for _ in range(1000)]
    predicted = [[draw.choice(tags) for _ in range(20)] for _ in range(1000)]
    found = metrics.entity_scores(gold, predicted)
    assert found["precision"] == pytest.approx(0.22892859881892783, abs=1e-12)
    assert found["recall"] == pytest.approx(0.23062659352545778, abs=1e-12)
    assert found["f1"] == pytest.approx(0.22977445924101303, abs=1e-12)


@pytest.mark.parametrize(
    ("gold", "predicted", "right", "found", "wanted"),
    [
        (["B-a", "I-a"], ["I-a", "I-a"], 1, 1, 1),  # I- after nothing begins a span
        (["B-a", "I-a"], ["B-a", "B-a"], 0, 2, 1),
        (["B-a", "I-a", "O"], ["B-a", "I-b", "O"], 0, 2, 1),  # I- of another kind begins one, too
        (["B-a", "O"], ["B-b", "O"], 0, 1, 1),
        (["O", "B-a"], ["O", "B-a"], 1, 1, 1),
        (["B-a", "O"], ["O", "O"], 0, 0, 1),
    ],
)
def test_spans(gold, predicted, right, found, wanted) -> None:
    scores = metrics.entity_scores([gold], [predicted])
    assert scores["precision"] == (right / found if found else 0)
    assert scores["recall"] == right / wanted


def test_no_spans_at_all() -> None:
    assert metrics.entity_scores([["O"]], [["O"]])["f1"] == 0.0


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="sentence 1 has 1 predicted tags; expected 2"):
        metrics.entity_scores([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="predicted has 1 entries; expected 2"):
        metrics.class_scores([0, 1], [0], 2)


def test_classes_as_scikit_learn() -> None:
    gold, predicted = [0, 1, 2, 1, 0, 2, 2, 1], [0, 1, 1, 1, 0, 2, 0, 1]
    found = metrics.class_scores(gold, predicted, 3)
    assert found["accuracy"] == 0.75
    assert found["f1_macro"] == pytest.approx(0.7190476190476190, abs=1e-6)
    assert found["matthews"] == pytest.approx(0.6758453353343745, abs=1e-6)
    found = metrics.class_scores([1, 0, 1, 1], [1, 1, 0, 1], 2)
    assert found["f1"] == pytest.approx(2 / 3, abs=1e-6) and found["matthews"] == pytest.approx(-1 / 3, abs=1e-6)


def _spans(tags):
    """Kind, start and end of each span, as conlleval takes them."""
    found, start, kind = set(), None, None
    for place, tag in enumerate([*tags, "O"]):
        if start is not None and (tag[0] != "I" or tag[2:] != kind):
            found.add((kind, start, place))
            start = None
        if tag != "O" and start is None:
            start, kind = place, tag[2:]
    return found


@pytest.mark.parametrize("kinds", [("a", "b"), ("creative-work", "work", "R-A0"), ("A", "A-B", "B")])
def test_entities_of_any_name_against_a_count_by_hand(kinds) -> None:
    draw = random.Random(1)
    tags = ["O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI")]
    gold = [[draw.choice(tags) for _ in range(draw.randint(1, 12))] for _ in range(200)]
    predicted = [[draw.choice(tags) for _ in row] for row in gold]
    one, other = ({(k, *span) for k, row in enumerate(rows) for span in _spans(row)} for rows in (gold, predicted))
    found = metrics.entity_scores(gold, predicted)
    assert found["f1"] == pytest.approx(2 * len(one & other) / (len(one) + len(other)), abs=1e-12)
    for kind in kinds:
        parts = [{span for span in spans if span[1] == kind} for spans in (one, other)]
        expected = 2 * len(parts[0] & parts[1]) / sum(map(len, parts))
        assert found[f"f1_{kind}"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("gold", "predicted"), [([0, 0, 1], [0, 0, 0]), ([0, 0], [0, 0]), ([1, 1, 1], [0, 1, 2])])
def test_a_constant_correlates_with_nothing(gold, predicted) -> None:
    """scikit-learn's values; torchmetrics has 0.41, 1 and so on, and no number for Pearson's."""
    assert metrics.class_scores(gold, predicted, 3)["matthews"] == 0.0
    found = metrics.regression_scores([float(k) for k in gold], [float(k) for k in predicted])
    assert found["pearson"] == found["spearman"] == 0.0


def test_equals_share_a_rank() -> None:
    found = metrics.regression_scores([1.0, 2.0, 2.0, 3.0, 0.0], [5.0, 1.0, 1.0, 2.0, 4.0])
    assert found["spearman"] == pytest.approx(-0.5789473684210528, abs=1e-12)  # scipy 1.17.1


def test_regression() -> None:
    found = metrics.regression_scores([1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 9.0])
    assert found["spearman"] == pytest.approx(0.8, abs=1e-5)
    assert found["pearson"] == pytest.approx(0.8261843893231645, abs=1e-6)
    assert found["mse"] == pytest.approx(6.75)


def test_squad() -> None:
    gold = {"a": ["the Red Cat", "a cat"], "b": [], "c": ["dog"], "d": []}
    found = metrics.squad_scores(gold, {"a": "red cat!", "b": "", "c": "big dog", "d": "x"})
    assert found["exact"] == 0.5 and found["f1"] == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)
    assert found["no_answer_accuracy"] == 0.5
    assert found["has_answer_exact"] == 0.5 and found["has_answer_f1"] == pytest.approx(5 / 6)
    assert "no_answer_accuracy" not in metrics.squad_scores({"a": ["x"]}, {"a": "y"})
    with pytest.raises(ValueError, match="no answer to 1 of 1 questions, a the first"):
        metrics.squad_scores({"a": ["x"]}, {})


def test_the_best_threshold_of_squad_is_the_best_of_all() -> None:
    draw = random.Random(0)
    for _ in range(300):
        ids = [str(k) for k in range(draw.randint(1, 9))]
        gold = {id: draw.choice([[], ["a cat"], ["red dog", "dog"], ["the"]]) for id in ids}
        answers = {id: draw.choice(["cat", "dog", "red", "", "the"]) for id in ids}
        odds = {id: float(draw.randint(-3, 3)) for id in ids}  # with equals among them
        best = metrics.squad_best_scores(gold, answers, odds)

        def scores(threshold, gold=gold, answers=answers, odds=odds):
            return metrics.squad_scores(gold, {id: answers[id] if odds[id] <= threshold else "" for id in gold})

        for name in ("exact", "f1"):
            possible = [scores(threshold)[name] for threshold in range(-4, 4)]
            assert best[f"best_{name}"] == pytest.approx(max(possible), abs=1e-12)
            assert scores(best[f"best_{name}_threshold"])[name] == pytest.approx(max(possible), abs=1e-12)


def test_squad_answers_are_normalised() -> None:
    assert metrics.normalized_answer("  The  U.S.  (an  Answer) ") == "us answer"
